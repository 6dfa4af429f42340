"""The comparison: its table by hand, the methods' presets, the choice of settings, whole runs on the tiny world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from chain_kit import OVERRIDES, digests, mlflow_runs, new_home, run_here
from config_kit import experiment_config

from cdpo_core.config_loading import load_config
from cdpo_core.errors import InputError
from cdpo_core.evaluation.comparison import comparison_table, over_seeds
from cdpo_core.evaluation.comparison_figure import comparison_figure
from cdpo_core.methods import Method, load_methods, method_names
from cdpo_core.testbed import grammar
from cdpo_core.testbed.calibration import calibrate
from cdpo_core.testbed.limits import placed_limits
from flows.methods import World, tune
from tasks.comparison import comparison_markdown
from tasks.storage import open_store


def record(method: str, seed: int, reward: float, cost: float, limit: float = -0.5, **more: Any) -> dict[str, Any]:
    oracle = {"true_reward": reward, "true_cost": cost, "true_kl": 0.4 if method == "ours" else 1.0, "captured": 0.9}
    compute = {"updates": 400, "generated_tokens": 10.0, "cpu_seconds": 30.0 + seed}
    place = {"limit_name": "middle", "limit": limit, "seed": seed}
    return {
        "method": method,
        "title": method.upper(),
        "beta": 0.5,
        **place,
        "oracle": oracle,
        "compute": compute,
        **more,
    }


RECORDS = [
    record("rival", 0, 0.5, -0.45),
    record("rival", 1, 0.7, -0.55),
    record("ours", 0, 0.9, -0.6, rounds=1),
    record("ours", 1, 0.9, -0.5, rounds=2),
]


def test_the_table_by_hand() -> None:
    rival, ours = comparison_table(RECORDS, "ours")
    assert (rival["kept"], ours["kept"]) == (1, 2), "a cost equal to the limit keeps it"
    assert rival["reward"]["mean"] == pytest.approx(0.6)
    assert rival["ahead"]["mean"] == pytest.approx(0.3)
    half = 12.706 * 0.1 / 2**0.5 * 2**0.5  # Student's 97.5 % point with one degree of freedom, sd/sqrt(2) = 0.1
    assert rival["ahead"]["high"] - rival["ahead"]["mean"] == pytest.approx(half, rel=1e-3)
    assert rival["objective"]["mean"] == pytest.approx(0.6 - 0.5 * 1.0)
    assert rival["ahead_objective"]["mean"] == pytest.approx(0.3 + 0.5 * 0.6), "the rival bought reward with KL"
    assert ours["ahead"] is ours["ahead_objective"] is None
    assert ours["rounds"]["mean"] == 1.5
    assert ours["compute"] == {"updates": 400, "generated_tokens": 10, "cpu_seconds": 30.5, "tuning_cpu_seconds": 0}


def test_without_the_truth_the_test_figures_stand() -> None:
    test = {"reward": {"mean": 0.4, "low": 0.3, "high": 0.5}, "cost": {"mean": -1.0, "low": -1.2, "high": -0.8}}
    bare = {**record("ours", 0, 0, 0), "oracle": {}, "test": test}
    (row,) = comparison_table([bare], "ours")
    assert row["reward"] == pytest.approx(test["reward"])
    assert row["kept"] == 1
    assert row["captured"] is None


def test_one_seed_has_no_interval_of_its_own() -> None:
    assert over_seeds([0.3]) == {"mean": 0.3, "low": 0.3, "high": 0.3}
    assert over_seeds([None, None]) is None


def test_intervals_leave_out_what_the_worlds_alone_differ_by() -> None:
    poor, rich = {"optimal_reward": 0.5, "optimal_kl": 1.0}, {"optimal_reward": 1.5, "optimal_kl": 1.0}
    records = [record("ours", 0, 0.4, -0.6, limit=-0.5), record("ours", 1, 1.4, -0.4, limit=-0.3)]
    for item, level in zip(records, (poor, rich), strict=True):
        item["oracle"] |= level
    (row,) = comparison_table(records, "ours")
    for name, mean in (("reward", 0.9), ("cost", -0.5), ("objective", 0.9 - 0.5 * 0.4)):
        assert row[name] == pytest.approx({"mean": mean, "low": mean, "high": mean}), "each world has the same distance"
    del records[1]["oracle"]["optimal_reward"]
    (row,) = comparison_table(records, "ours")
    assert row["reward"]["high"] - row["reward"]["mean"] == pytest.approx(12.706 * 0.5, rel=1e-3), "not known in all"


def test_table_and_figure_are_drawn(tmp_path: Path) -> None:
    table = comparison_table(RECORDS, "ours")
    text = comparison_markdown(table)
    assert "| middle (-0.50) | RIVAL | 1/2 |" in text
    comparison_figure(table, [[-1.0, 0.2], [0.3, 1.0]], tmp_path / "a.png")
    comparison_figure(table, [[-1.0, 0.2], [0.3, 1.0]], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != b""


def test_every_shipped_method_fits_the_config() -> None:
    methods = load_methods()
    assert {"reference", "ours", "cdpo_paper", "one_shot", "multi_shot", "safe_rlhf"} <= set(method_names())
    for method in methods:
        for settings in method.settings():
            config = method.config(experiment_config(), settings)
            assert config.constraints == experiment_config().constraints
    paper = {method.name: method for method in methods}["cdpo_paper"].config(experiment_config())
    assert (paper.dpo.pairs, paper.dpo.labels, paper.dpo.anchor) == ("dataset", "sampled", 0)
    assert (paper.dual.update, paper.dual.start) == ("ascent", "zero")
    assert methods[-1].config(experiment_config()) == experiment_config(), "ours is the default"


def test_a_method_that_is_wrong_is_refused() -> None:
    with pytest.raises(InputError, match="no method 'sacpo'"):
        load_methods(["sacpo"])
    with pytest.raises(InputError, match="stepps"):
        Method(name="m", title="m", override={"dpo.stepps": 3}).config(experiment_config())


def test_named_limits_lie_where_the_world_was_calibrated() -> None:
    pool = grammar.all_prompts()[::25]
    world = calibrate(3, beta=1.0, limit=-0.5, sharpness=2.0, pool=pool)
    placed = placed_limits(world, [grammar.prompt_id(parts) for parts in pool], 1.0)
    assert placed["middle"] == pytest.approx([-0.5], abs=2e-3)
    assert placed["tight"][0] < -0.5 < placed["loose"][0]
    distances = placed["middle"][0] - placed["tight"][0], placed["loose"][0] - placed["middle"][0]
    assert distances[0] == pytest.approx(distances[1], abs=2e-3)


def test_a_comparison_of_the_tiny_world(tmp_path: Path, prefect_server: str, _empty_mlflow_database: Path) -> None:  # noqa: PT019
    home = new_home(tmp_path / "home", _empty_mlflow_database)
    words = ["--limits", "loose,middle", "--methods", "reference,fixed_penalty,ours"]
    code, result = run_here(home, *words, command="compare")
    assert code == 0
    assert len(result["records"]) == 6
    middle = {row["method"]: row for row in result["table"] if row["limit_name"] == "middle"}
    assert middle["reference"]["captured"]["mean"] == pytest.approx(0, abs=1e-6)
    assert middle["ours"]["compute"]["updates"] >= 60
    assert middle["fixed_penalty"]["compute"]["updates"] == 6 * 60
    report = Path(result["report"])
    assert {"comparison.md", "comparison.png", "result.json"} <= {path.name for path in report.iterdir()}

    runs = set(mlflow_runs(home))
    assert run_here(home, *words, command="compare")[1]["table"] == result["table"]
    assert set(mlflow_runs(home)) == runs
    store = open_store(str(home / "store"))
    (record,) = map(store.get_record, store.record_names("runs/"))
    assert record is not None
    assert record["kind"] == "comparison"
    assert record["artifacts"].keys() == digests(home / "store").keys(), "nothing it made may be cleaned away"


def test_the_best_settings_of_a_grid_are_taken(tmp_path: Path, prefect_server: str) -> None:
    method = Method(
        name="few_steps", title="few", override={"dual.rounds": 2, "dual.update": "ascent"},
        grid={"dpo.steps": [1, 60]}, step_grid=[0.25],
    )  # fmt: skip
    config = load_config("tiny", {**OVERRIDES, "tracking.enabled": "false", "store.uri": str(tmp_path / "store")})
    with mock.patch.dict(os.environ, {"CDPO_HOME": str(tmp_path)}):
        found = tune(World.of(config), config, method)
    assert found.settings == {"dpo.steps": 60, "dual.step": 0.25}, "one step learns nothing"
    values = [entry["value"] for entry in found.tried if "value" in entry]
    assert values[1] > values[0]
    assert found.cpu_seconds > 0

"""Sweeps in one process: a failed child among others, settings and seeds, and verdicts that no order changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chain_kit import computed, config, mlflow_runs, new_home, run_here, stage_counts

from cdpo_core.dual.spending import share_of
from flows.children import children_of
from flows.grid import combinations
from tasks.report import report_folder

pytestmark = pytest.mark.slow

LIMITS = [-0.25, -0.2]
BETAS = [1.0, 1.5]
SWEEP = ["--limits", "-0.25,-0.2", "--set", "dpo.beta=1,1.5"]


class Blocked(NamedTuple):
    """A sweep one child of which could not write its report, and the same command once it could."""

    home: Path
    name: str
    failed: tuple[int, dict[str, Any]]
    again: tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, _empty_mlflow_database: Path) -> Blocked:
    home = new_home(tmp_path_factory.mktemp("blocked"), _empty_mlflow_database)
    child = children_of(combinations(config(), [], ["dpo.beta=1,1.5"]), LIMITS)[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDPO_HOME", str(home))
        # A file where its report's folder has to be.
        folder = report_folder(child.identity, child.config.name)
    folder.rmdir()
    folder.touch()
    failed = run_here(home, *SWEEP, command="sweep")
    folder.unlink()
    return Blocked(home, child.config.name, failed, run_here(home, *SWEEP, command="sweep"))


def test_a_failed_child_is_named_and_the_others_finish(blocked: Blocked) -> None:
    code, result = blocked.failed
    assert code == 1
    (failed,) = result["failed"]
    assert failed["name"] == blocked.name == "tiny, dpo.beta = 1.5, harm ≤ -0.25"
    assert (failed["settings"], failed["limit"]) == ({"dpo.beta": 1.5}, -0.25)
    assert "File exists" in failed["error"]
    assert [(child["settings"]["dpo.beta"], child["limit"]) for child in result["children"]] == [
        (1.0, -0.25), (1.0, -0.2), (1.5, -0.2),
    ]  # fmt: skip
    assert len(result["frontier"]) == 3
    assert {"frontier.png", "along_limits.png", "result.json"} <= {
        file.name for file in Path(result["report"]).iterdir()
    }


def test_the_same_command_runs_only_what_is_missing(blocked: Blocked) -> None:
    _, result = blocked.again
    assert result["failed"] == []
    assert len(result["children"]) == 4
    assert [computed(child) for child in result["children"]] == [[]] * 4, "it had failed after its last stage"
    assert result["tracking"]["run_id"] == blocked.failed[1]["tracking"]["run_id"]


def test_each_combination_shares_what_its_settings_do_not_enter(blocked: Blocked) -> None:
    _, result = blocked.again
    counts = stage_counts(blocked.home / "store")
    shared = ["data", "sft", "scorers", "splits"]
    assert {stage: counts[stage] for stage in shared} == dict.fromkeys(shared, 1)
    assert [(point["settings"], point["limit"]) for point in result["frontier"]] == [
        ({"dpo.beta": beta}, limit) for beta in BETAS for limit in LIMITS
    ]


def test_the_error_probability_is_split_over_all_children(blocked: Blocked) -> None:
    for _, result in (blocked.failed, blocked.again):
        if result["chosen"]:
            assert result["chosen"]["delta"] == pytest.approx(share_of(0.05, 1, "squares", 4))
        certificates = [child["certificate"] for child in result["children"]]
        assert {item["uses"] for item in certificates} == {1}, "the sweep is one use of the prompts, whoever is first"
        assert {item["family_tests"] for item in certificates} == {4}
    settings = [point["settings"] for point in blocked.again[1]["frontier"]]
    assert blocked.again[1]["chosen"] is None or blocked.again[1]["chosen"]["settings"] in settings


def test_mlflow_has_one_parent_that_ended_well_and_children_that_name_their_settings(blocked: Blocked) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{blocked.home / 'mlflow.db'}")
    parent = client.get_run(blocked.again[1]["tracking"]["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["dpo.beta"] == "1.0, 1.5"
    assert len(mlflow_runs(blocked.home)) == 5
    steps = [point.step for point in client.get_metric_history(parent.info.run_id, "frontier/limit")]
    assert sorted(steps) == [0, 1, 2, 3]
    for child in blocked.again[1]["children"]:
        run = client.get_run(child["tracking"]["run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert float(run.data.params["beta"]) == child["settings"]["dpo.beta"]


@pytest.mark.faults
def test_no_order_changes_a_verdict(blocked: Blocked, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Children from loose to tight in one store, and each in a store of its own, end as in the sweep."""
    database = request.getfixturevalue("_empty_mlflow_database")
    shared = new_home(tmp_path / "shared", database)
    family = children_of(combinations(config(), [], ["dpo.beta=1,1.5"]), LIMITS)[0].config.certificate.family
    for child in reversed(blocked.again[1]["children"]):
        options = ["--limit", str(child["limit"]), "--dpo.beta", str(child["settings"]["dpo.beta"])]
        options += ["--certificate.family", family, "--certificate.family_tests", "4"]
        for home in (shared, new_home(tmp_path / f"alone{child['number']}", database)):
            _, found = run_here(home, *options)
            assert _verdict(found) == _verdict(child)


def _verdict(result: dict[str, Any]) -> dict[str, Any]:
    """What a run found; how often a split had been tested before is a circumstance."""
    certificate = {key: value for key, value in result["certificate"].items() if key not in ("spent", "evidence")}
    rounds = [{**record, "seconds": 0} for record in result["rounds"]]
    kept = {key: result[key] for key in ("status", "limit", "lambda", "test", "oracle", "baselines", "scorers")}
    return {**kept, "policy": result["policy"]["digest"], "certificate": certificate, "rounds": rounds}

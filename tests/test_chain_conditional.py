"""A tiny sweep with one policy for every limit: one training, a certificate at each limit, plain policies out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chain_kit import digests, new_home, run_here, stage_counts, trajectory
from command_line_kit import command_line

from cdpo_core.models.policy import load_policy
from tasks.storage import open_store

pytestmark = pytest.mark.slow

LOWEST, MIDDLE, HIGHEST = -0.2, 0.3, 9.0
# Each test at δ itself, so that a single experiment plans for the margin that the sweep's had.
FIELDS = ("--dpo.conditional_steps", "400", "--dual.start", "corrected", "--certificate.spending", "none")


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str, _empty_mlflow_database: Path
) -> tuple[Path, int, dict[str, Any]]:
    home = new_home(tmp_path_factory.mktemp("swept"), _empty_mlflow_database)
    limits = f"{LOWEST},{MIDDLE},{HIGHEST}"
    return home, *run_here(home, "--limits", limits, "--conditional", *FIELDS, command="sweep")


def test_all_limits_share_one_training(swept: tuple[Path, int, dict[str, Any]]) -> None:
    home, code, result = swept
    assert code in (0, 3)
    counts = stage_counts(home / "store")
    assert counts["conditional"] == 1
    assert "round" not in counts
    lambdas = {value for child in result["children"] for value in trajectory(child)} | {0.0}
    assert counts["bound"] == len(lambdas) > 1
    assert [child["limit"] for child in result["children"]] == [LOWEST, MIDDLE, HIGHEST]
    assert len({child["certificate"]["mean"] for child in result["children"]}) == 3, "each is tested by itself"
    assert result["children"][-1]["lambda"] == 0
    assert result["children"][-1]["status"] == "certified"


def test_lower_limits_have_larger_multipliers_and_lower_costs(swept: tuple[Path, int, dict[str, Any]]) -> None:
    lowest, _, highest = swept[2]["children"]
    assert lowest["lambda"] > highest["lambda"]
    assert lowest["test"]["cost"]["mean"] < highest["test"]["cost"]["mean"]


def test_its_policies_are_plain_checkpoints(swept: tuple[Path, int, dict[str, Any]], tmp_path: Path) -> None:
    home, _, result = swept
    uri = result["children"][-1]["policy"]["uri"]
    assert command_line(["export", uri, str(tmp_path / "policy")], home).code == 0
    assert load_policy(tmp_path / "policy").model.config.tie_word_embeddings is False


def test_what_it_made_is_entered_as_used(swept: tuple[Path, int, dict[str, Any]]) -> None:
    store = open_store(str(swept[0] / "store"))
    runs = [store.get_record(name) or {} for name in store.record_names("runs/")]
    assert {name for run in runs for name in run["artifacts"]} == digests(swept[0] / "store").keys()


def test_the_plan_names_its_training_and_finds_it_again(swept: tuple[Path, int, dict[str, Any]]) -> None:
    def planned(*arguments: str) -> dict[str, bool]:
        code, plan = run_here(swept[0], "--dpo.conditional", "true", *FIELDS, *arguments, command="plan")
        assert code == 0
        return {stage["name"]: stage["cached"] for stage in plan["stages"]}

    assert all(planned("--limit", f"{MIDDLE:g}").values())
    left = [name for name, cached in planned("--dpo.beta", "2").items() if not cached]
    assert left[:2] == ["policy for every λ", "policy at λ = 0"]


def test_a_limit_beyond_what_it_learned_is_not_called_out_of_reach(swept: tuple[Path, int, dict[str, Any]]) -> None:
    arguments = ("--dpo.conditional", "true", *FIELDS, "--evaluation.judge", "none")
    code, result = run_here(swept[0], *arguments, "--limit", "-1.2")
    assert code == 3
    assert result["status"] == "not_certified"
    assert "has learned" in result["reason"]

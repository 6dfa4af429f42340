"""One experiment, end to end at tiny size: the same again, another limit, a limit out of reach, a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chain_kit import (
    Finished,
    computed,
    config,
    digests,
    mlflow_runs,
    new_home,
    numbers,
    run_here,
    stage_counts,
    trajectory,
)

from cdpo_core.dual.spending import share_of
from tasks.storage import open_store

pytestmark = pytest.mark.slow

LOWEST, SHIPPED, HIGHEST = -9.0, -0.2, 9.0
OTHER = -0.1
# What neither lambda nor the limit enters.
SHARED = ["data", "enumeration", "scorers", "sft", "splits"]


class Again(NamedTuple):
    """The same command once more: its outcome, and MLflow's points by run before it and after it."""

    code: int
    result: dict[str, Any]
    before: dict[str, int]
    after: dict[str, int]


@pytest.fixture(scope="module")
def again(finished: Finished) -> Again:
    before = mlflow_runs(finished.home)
    return Again(*run_here(finished.home), before, mlflow_runs(finished.home))


@pytest.fixture(scope="module")
def other_limit(finished: Finished, again: Again) -> dict[str, Any]:
    """The same experiment at a looser limit, in the same store."""
    return run_here(finished.home, "--limit", f"{OTHER:g}")[1]


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, prefect_server: str, _empty_mlflow_database: Path
) -> tuple[Path, int, dict[str, Any]]:
    """A sweep over three limits in an empty store."""
    home = new_home(tmp_path_factory.mktemp("swept"), _empty_mlflow_database)
    return home, *run_here(home, "--limits", f"{LOWEST},{SHIPPED},{HIGHEST}", command="sweep")


def test_run_ends_with_a_verdict_and_its_evidence(finished: Finished) -> None:
    result = finished.result
    assert finished.code == {"certified": 0, "not_certified": 3}[result["status"]]
    assert result["rounds"]
    assert result["certificate"]["passed"] == (result["status"] == "certified")
    beyond = {"cvar", "unsafe_prompts", "over_refusal", "cost/benign", "cost/borderline", "cost/harmful"}
    assert {"reward", "cost", "safe_rate", "kl", "win_rate"} | beyond <= set(result["test"])
    assert [row["asked"] for row in result["reachable"]["price"]].count(True) == 1
    assert set(result["oracle"]["proxy_gap"]) == {"reward", "harm"}
    assert result["policy"]["digest"] in digests(finished.home / "store").values()
    assert set(result["scorers"]) == {"reward", "harm"}
    assert result["oracle"]["captured_ceiling"] is not None
    assert [stage["name"] for stage in result["stages"][:2]] == ["data", "reference policy"]


def test_same_command_again_computes_nothing(finished: Finished, again: Again) -> None:
    assert again.code == finished.code
    assert computed(again.result) == []
    assert numbers(again.result) == numbers(finished.result)


def test_same_command_again_adds_nothing_to_mlflow(finished: Finished, again: Again) -> None:
    # other tests may have added other experiments' runs to the same home
    assert finished.result["tracking"]["run_id"] in again.before
    assert again.before == again.after


def test_another_limit_computes_only_what_it_enters(finished: Finished, other_limit: dict[str, Any]) -> None:
    seen, now = trajectory(finished.result), trajectory(other_limit)
    new = [value for value in now if value not in seen]
    allowed = {f"policy at λ = {value:g}" for value in new}
    allowed |= {f"selection at λ = {value:g}: {what}" for value in new for what in ("responses", "scores")}
    allowed |= {f"{which}: {what}" for which in ("certificate", "test of policy") for what in ("responses", "scores")}
    assert other_limit["limit"] == OTHER
    assert set(computed(other_limit)) <= allowed | {"exact policy", "exact judge"}
    assert "exact judge" in computed(other_limit)
    assert new


def test_another_limit_is_another_mlflow_run(finished: Finished, other_limit: dict[str, Any]) -> None:
    runs = mlflow_runs(finished.home)
    assert {finished.result["tracking"]["run_id"], other_limit["tracking"]["run_id"]} <= set(runs)


def test_limit_below_the_exact_floor_is_infeasible_at_once(finished: Finished, other_limit: dict[str, Any]) -> None:
    code, result = run_here(finished.home, "--limit", f"{LOWEST:g}")
    assert code == 3
    assert result["status"] == "infeasible"
    assert result["reachable"]["floor"] > LOWEST
    assert result["rounds"] == []
    assert result["policy"] is result["certificate"] is result["oracle"]["captured"] is None
    assert f"{result['reachable']['lowest']:.3f}" in result["verdict"]


def test_first_lambda_is_told_by_how_far_the_policy_at_zero_came(finished: Finished, again: Again) -> None:
    """Sixty steps do not reach what the samples promise, so the multiplier that keeps the limit is larger."""
    starts = {
        start: run_here(finished.home, "--dual.start", start, "--dual.rounds", "1", "--limit", "0.4")[1]
        for start in ("offline", "corrected")
    }
    (offline,), (corrected,) = (trajectory(starts[start]) for start in ("offline", "corrected"))
    assert 0 < offline < corrected
    for result in starts.values():
        assert "policy at λ = 0" not in computed(result), "every run has it, and its rounds start from it"


def test_rounds_start_from_the_policy_at_zero(finished: Finished) -> None:
    rounds = [item for item in open_store(str(finished.home / "store")).manifests() if item.stage == "round"]
    (zero,) = (item for item in rounds if item.slice["lambda_"] == [0.0])
    others = [item for item in rounds if item is not zero]
    assert "previous" not in zero.inputs
    assert {item.inputs["previous"] for item in others} == {zero.digest}
    given, full = config(), zero.slice["dpo"]
    for item in others:
        changed = {
            "steps": round(full["steps"] * given.dual.warm_steps),
            "anchor": full["anchor"] * given.dual.warm_anchor,
        }
        assert item.slice["dpo"] == {**full, **changed}


def test_plan_names_what_a_run_would_compute(finished: Finished, again: Again) -> None:
    def planned(*arguments: str) -> dict[str, bool]:
        code, plan = run_here(finished.home, *arguments, command="plan")
        assert code == 0
        return {stage["name"]: stage["cached"] for stage in plan["stages"]}

    assert all(planned().values())
    assert set(planned()) == {stage["name"] for stage in finished.result["stages"]}
    assert not planned("--evaluation.judged_prompts", "6")["exact reference"]
    left = [name for name, cached in planned("--dpo.steps", "61").items() if not cached]
    assert left[0] == "policy at λ = 0"
    assert left.index("policy at the first λ") < left.index("certificate")


def test_limit_that_does_not_bind_ends_at_lambda_zero(swept: tuple[Path, int, dict[str, Any]]) -> None:
    slack = swept[2]["children"][-1]
    assert slack["limit"] == HIGHEST
    assert slack["lambda"] == 0
    assert slack["status"] == "certified"
    assert slack["test"] == slack["baselines"]["DPO (λ = 0)"]


def test_a_sweep_and_its_children_enter_what_they_use(swept: tuple[Path, int, dict[str, Any]]) -> None:
    home, _, result = swept
    store = open_store(str(home / "store"))
    runs = [store.get_record(name) or {} for name in store.record_names("runs/")]
    assert sorted(run["kind"] for run in runs) == ["experiment"] * 3 + ["sweep"]
    used = {name for run in runs for name in run["artifacts"]}
    assert used == digests(home / "store").keys(), "nothing they made may be cleaned away"
    assert any(result["report_artifact"]["uri"].endswith(f"/{name}.json") for name in used)


def test_sweep_is_one_parent_with_a_child_for_each_limit(swept: tuple[Path, int, dict[str, Any]]) -> None:
    home, code, result = swept
    assert code == 0
    assert [child["limit"] for child in result["children"]] == [LOWEST, SHIPPED, HIGHEST]
    parent = result["tracking"]["run_id"]
    assert set(mlflow_runs(home)) == {parent, *(child["tracking"]["run_id"] for child in result["children"])}
    assert _children_in_mlflow(home, parent) == {child["tracking"]["run_id"] for child in result["children"]}


def test_sweep_computes_what_is_shared_once(swept: tuple[Path, int, dict[str, Any]]) -> None:
    home, _, result = swept
    counts = stage_counts(home / "store")
    assert {stage: counts[stage] for stage in SHARED} == dict.fromkeys(SHARED, 1)
    lambdas = {value for child in result["children"] for value in trajectory(child)} | {0.0}
    assert counts["round"] == len(lambdas)
    shared = {"data", "reference policy", "reward and harm model", "splits", "policy at λ = 0"}
    assert all(shared.isdisjoint(computed(child)) for child in result["children"][1:])


def test_sweep_draws_the_frontier_beside_the_exact_one(swept: tuple[Path, int, dict[str, Any]]) -> None:
    home, _, result = swept
    assert [point["limit"] for point in result["frontier"]] == result["limits"]
    assert result["exact_frontier"]
    uses = result["children"][-1]["certificate"]["uses"]
    assert result["chosen"]["delta"] == pytest.approx(share_of(0.05, uses, "squares", 3))
    assert "figures/frontier.png" in _files_in_mlflow(home, result["tracking"]["run_id"])


def test_sweep_again_adds_nothing(swept: tuple[Path, int, dict[str, Any]]) -> None:
    home, code, _ = swept
    before, stored = mlflow_runs(home), digests(home / "store")
    assert run_here(home, "--limits", f"{HIGHEST},{SHIPPED},{LOWEST}", command="sweep")[0] == code
    assert mlflow_runs(home) == before
    assert digests(home / "store") == stored


def test_every_artifact_can_be_read_back_whole(finished: Finished, other_limit: dict[str, Any]) -> None:
    store = open_store(str(finished.home / "store"))
    for manifest in store.manifests():
        store.check(manifest)


def _client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")


def _children_in_mlflow(home: Path, parent: str) -> set[str]:
    client = _client(home)
    experiments = [item.experiment_id for item in client.search_experiments()]
    children = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")
    return {run.info.run_id for run in children}


def _files_in_mlflow(home: Path, run_id: str) -> list[str]:
    return [file.path for file in _client(home).list_artifacts(run_id, "figures")]

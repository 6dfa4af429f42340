"""A run that is killed again and again, and the same command after each kill: nothing shows in the end."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from chain_kit import (
    Finished,
    Moment,
    Running,
    config,
    digests,
    mlflow_runs,
    new_home,
    numbers,
    stored,
    training,
    trajectory,
)
from prefect import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterTags,
)

from tasks.tracking import experiment_key

pytestmark = [pytest.mark.slow, pytest.mark.faults]

UNFINISHED = {"RUNNING", "PENDING", "CANCELLING"}


class Survivor(NamedTuple):
    """The run that ended at last: its state folder, outcome, and Prefect's runs that the kills left."""

    home: Path
    code: int
    result: dict[str, Any]
    kills: int


def _after(home: Path, stage: str, count: int, seconds: float) -> Moment:
    """A moment some time after the `count`-th artifact of a stage was published."""
    since: list[float] = []

    def moment() -> bool:
        if not since and stored(home, stage) >= count:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() >= since[0] + seconds

    return moment


@pytest.fixture(scope="module")
def survivor(
    finished: Finished, tmp_path_factory: pytest.TempPathFactory, prefect_server: str, _empty_mlflow_database: Path
) -> Survivor:
    """Killed while each kind of model is trained, and somewhere in between; then left in peace."""
    home = new_home(tmp_path_factory.mktemp("killed"), _empty_mlflow_database)
    random = Random(0)
    rounds = stored(finished.home, "round")
    moments = [
        training(home, "sft", "data"),
        training(home, "scorers", "sft"),
        training(home, "round", "scores", 2),
        _after(home, "round", min(2, rounds), random.uniform(0, 0.5)),
    ]
    for moment in moments:
        Running(home, prefect_server).kill_at(moment)
    return Survivor(home, *Running(home, prefect_server).wait(), len(moments))


def test_killed_run_ends_as_one_that_was_never_stopped(finished: Finished, survivor: Survivor) -> None:
    assert survivor.code == finished.code
    assert trajectory(survivor.result) == trajectory(finished.result)
    assert survivor.result["policy"]["digest"] == finished.result["policy"]["digest"]
    assert numbers(survivor.result) == numbers(finished.result)


def test_killed_run_leaves_the_same_artifacts_and_no_others(finished: Finished, survivor: Survivor) -> None:
    here, there = digests(survivor.home / "store"), digests(finished.home / "store")
    assert here.items() <= there.items()
    assert {stage["name"] for stage in survivor.result["stages"]} == {s["name"] for s in finished.result["stages"]}
    assert list((survivor.home / "scratch").iterdir()) == []


def test_killed_run_is_one_mlflow_run_without_doubled_points(finished: Finished, survivor: Survivor) -> None:
    points = mlflow_runs(survivor.home)
    assert list(points) == [survivor.result["tracking"]["run_id"]]
    assert points[survivor.result["tracking"]["run_id"]] == mlflow_runs(finished.home)[_run_id(finished)]


def test_killed_runs_say_crashed_in_prefect(survivor: Survivor) -> None:
    tag = f"experiment:{experiment_key(config())}"
    with get_client(sync_client=True) as client:
        of_experiment = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
        runs = client.read_flow_runs(flow_run_filter=of_experiment)
        crashed = [run for run in runs if run.state_name == "Crashed"]
        below = FlowRunFilterParentFlowRunId(any_=[run.id for run in crashed])
        parts = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=below))
    assert len(crashed) == survivor.kills
    assert not UNFINISHED & {str(run.state_type and run.state_type.value) for run in [*runs, *parts]}


def _run_id(finished: Finished) -> str:
    run_id: str = finished.result["tracking"]["run_id"]
    return run_id

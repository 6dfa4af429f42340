"""What the Prefect UI is told, on a real server: tags, artifacts, Cached stages, and killed predecessors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from prefect import flow, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
)
from prefect.context import FlowRunContext
from prefect.states import Completed, State

from tasks import prefect_records
from tasks.attempts import is_dead, this_process
from tasks.prefect_records import (
    ProgressArtifacts,
    announce_run,
    flow_run_url,
    link_to_mlflow,
    markdown_table,
    rounds_markdown,
    show_markdown,
)

ROUNDS = [
    {"round": 1, "lambda": 0.4, "reward": 1.3, "cost": -0.3, "cost_upper": -0.1, "kl": 0.9, "seconds": 41.0},
    {"round": 2, "lambda": 0.65, "reward": 1.1, "cost": -0.6, "cost_upper": None, "kl": 1.2, "seconds": 40.0},
]
ROOT = Path(__file__).parent.parent
# A run as the command line has it: a flow with a subflow whose task never ends.
ENDLESS = """
import sys, time
from prefect import flow, task
from tasks.prefect_records import announce_run

@task
def endless():
    print("working", flush=True)
    time.sleep(600)

@flow
def part():
    endless()

@flow
def killed_experiment():
    announce_run(sys.argv[1])
    part()

killed_experiment()
"""


def _in_flow(body: Callable[[], Any]) -> UUID:
    """Run `body` in a flow run of its own; returns the run's id."""

    @flow(name="test")
    def run_body() -> UUID:
        body()
        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        return context.flow_run.id

    return run_body()


def _artifacts(run_id: UUID) -> dict[str, Any]:
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        return {str(artifact.key): artifact.data for artifact in client.read_artifacts(artifact_filter=of_run)}


def test_run_is_announced_with_identity_and_process(prefect_server: str) -> None:
    run_id = _in_flow(lambda: announce_run("identity-1"))
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
    assert run.tags == ["experiment:identity-1"]
    assert run.labels["cdpo.pid"] == os.getpid()
    assert run.labels["cdpo.started"] == psutil.Process().create_time()


def test_artifacts_of_a_run(prefect_server: str) -> None:
    urls = []

    def body() -> None:
        show_markdown("rounds-ABC λ", rounds_markdown(ROUNDS, ["harm"], [-0.5]), "the rounds")
        link_to_mlflow("http://mlflow/#/experiments/1/runs/2", "abc")
        link_to_mlflow("", "no-page")
        urls.append(flow_run_url())

    run_id = _in_flow(body)
    artifacts = _artifacts(run_id)
    assert set(artifacts) == {"rounds-abc-lambda", "mlflow-abc"}
    assert "xychart-beta" in artifacts["rounds-abc-lambda"]
    assert "http://mlflow/#/experiments/1/runs/2" in artifacts["mlflow-abc"]
    assert urls[0].endswith(f"/runs/flow-run/{run_id}")


def test_progress_shows_what_takes_time_and_nothing_else(prefect_server: str) -> None:
    def body() -> None:
        report = ProgressArtifacts(every_seconds=0.1)
        report("cached stage", 1, 1)
        for done in range(1, 5):
            report("training", done, 5)
            time.sleep(0.06)
        report("scoring", 1, 3)
        time.sleep(0.11)
        report("scoring", 2, 3)
        report("training", 5, 5)

    artifacts = _artifacts(_in_flow(body))
    assert {key: float(value) for key, value in artifacts.items()} == {
        "training": 100.0,
        "scoring": pytest.approx(66.7, abs=0.1),
    }


def test_cached_stage_shows_as_cached(prefect_server: str) -> None:
    @task(cache_policy=NO_CACHE, persist_result=False)
    def stage(found: bool) -> State:
        return Completed(name="Cached" if found else "Completed", data=("result", found))

    states: list[State] = []
    _in_flow(lambda: states.extend(stage(found, return_state=True) for found in (True, False)))
    assert [state.name for state in states] == ["Cached", "Completed"]
    assert [state.result() for state in states] == [("result", True), ("result", False)]


def test_killed_predecessor_is_crashed_with_all_its_parts(prefect_server: str) -> None:
    identity = uuid4().hex
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, identity], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert killed.stdout is not None
        killed.stdout.readline()
        alive = _in_flow(lambda: announce_run(identity))
        assert _states(identity, killed.pid) == ["RUNNING", "RUNNING"]
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    successor = _in_flow(lambda: announce_run(identity))
    assert _states(identity, killed.pid) == ["CRASHED", "CRASHED"]

    with get_client(sync_client=True) as client:
        dead = next(run for run in client.read_flow_runs() if run.labels.get("cdpo.pid") == killed.pid)
        assert dead.state is not None
        assert str(successor) in str(dead.state.message)
        for run_id in (alive, successor):
            run = client.read_flow_run(run_id)
            assert run.state is not None
            assert run.state.is_completed()


def _states(identity: str, pid: int) -> list[str]:
    """States of the flow run that process `pid` announced, and of its subflow."""
    with get_client(sync_client=True) as client:
        run = next(run for run in client.read_flow_runs() if run.labels.get("cdpo.pid") == pid)
        assert f"experiment:{identity}" in run.tags
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
        children = client.read_flow_runs(flow_run_filter=below)
        task_runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[children[0].id])))
        assert {str(task_run.state_type.value) for task_run in task_runs if task_run.state_type} <= {
            "CRASHED",
            "RUNNING",
        }
        return [str(item.state_type.value) for item in (run, *children) if item.state_type]


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),
        ({"cdpo.started": 1.0}, True),
        ({"cdpo.pid": 2**22 + 1}, True),
        ({"cdpo.host": "elsewhere", "cdpo.pid": 2**22 + 1}, False),
    ],
    ids=["alive", "its pid is another's now", "gone", "on another host"],
)
def test_only_a_process_that_is_certainly_gone_is_dead(change: dict[str, Any], dead: bool) -> None:
    assert is_dead({**this_process(), **change}) is dead


def test_run_without_labels_is_not_dead() -> None:
    assert not is_dead({})


def test_nothing_is_recorded_outside_a_flow_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_client(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked for a client")

    monkeypatch.setattr(prefect_records, "get_client", no_client)
    monkeypatch.setattr(prefect_records, "create_markdown_artifact", no_client)
    monkeypatch.setattr(prefect_records, "create_progress_artifact", no_client)
    announce_run("identity")
    show_markdown("key", "text")
    link_to_mlflow("http://mlflow", "identity")
    progress = ProgressArtifacts(every_seconds=0.0)
    progress("training", 1, 2)
    progress("training", 2, 2)
    assert flow_run_url() == ""


def test_failure_to_record_is_a_warning(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(prefect_records, "get_client", broken)
    monkeypatch.setattr(prefect_records, "create_markdown_artifact", broken)
    with caplog.at_level("WARNING", logger="tasks.prefect_records"):
        _in_flow(lambda: (announce_run("identity"), show_markdown("key", "text")))
    warnings = [record.message for record in caplog.records if record.name == "tasks.prefect_records"]
    assert len(warnings) == 2
    assert all("the server is away" in warning for warning in warnings)


def test_rounds_as_markdown() -> None:
    text = rounds_markdown(ROUNDS, ["harm"], [-0.5])
    assert "harm ≤ -0.5" in text
    assert "| 1 | 0.400 | 1.300 | -0.300 | -0.100 | 0.900 | 41.0 |" in text
    assert "| 2 | 0.650 | 1.100 | -0.600 |  | 1.200 | 40.0 |" in text
    assert "line [0.4000, 0.6500]" in text
    assert "line [-0.5000, -0.5000]" in text


def test_rounds_as_markdown_with_two_constraints() -> None:
    two = [{**record, "lambda": [0.1, 0.2], "cost": [1.0, 2.0], "cost_upper": [1.5, 2.5]} for record in ROUNDS]
    text = rounds_markdown(two, ["harm", "privacy"], [0.0, 1.0])
    assert (
        "| round | λ harm | λ privacy | reward | cost harm | cost privacy | bound harm | bound privacy | KL |" in text
    )
    assert "| 1 | 0.100 | 0.200 | 1.300 | 1.000 | 2.000 | 1.500 | 2.500 |" in text
    assert "line [0.2000, 0.2000]" in text


@pytest.mark.parametrize("count", [0, 1])
def test_no_chart_of_fewer_than_two_rounds(count: int) -> None:
    assert "mermaid" not in rounds_markdown(ROUNDS[:count], ["harm"], [0.0])


def test_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | --: |\n| x | 1 |"

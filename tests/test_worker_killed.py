"""Twenty kills at random moments of a run under a worker: of the flow's process group, of the worker, of both.

A moment is a seeded share of the processor time that the unstopped run spends from Running to its end, so that it does
not depend on how busy the machine is.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

import psutil
import pytest
from chain_kit import SECONDS, config, digests, mlflow_runs, numbers, trajectory
from prefect.client.schemas.objects import FlowRun
from worker_kit import Team, kill_group, process_of, state_folder, until

from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

CALM = "calm"
KINDS = ("flow", "worker", "both")
SEED, LAST_SHARE = 4, 0.9
AT_ONCE = 2


class Trial(NamedTuple):
    """What is killed, and after which share of the run's work."""

    number: int
    kind: str
    share: float

    @property
    def queue(self) -> str:
        """Where its run waits for a worker: one of its own if that is killed."""
        return CALM if self.kind == "flow" else f"trial-{self.number}"


def _trials(count: int) -> list[Trial]:
    random = Random(SEED)
    return [Trial(number, KINDS[number % len(KINDS)], random.uniform(0, LAST_SHARE)) for number in range(count)]


TRIALS = _trials(int(os.environ.get("CDPO_KILLS", "20")))


class Ended(NamedTuple):
    """A run that ended by itself: its state folder, flow run, the processor time from Running on, and its record."""

    home: Path
    run: FlowRun
    seconds: float
    result: dict[str, Any]


class Survivor(NamedTuple):
    """A killed run after it was continued.

    Attributes:
        before: the name of its state when nothing of it seemed to run any more.
        kept: when each artifact was made that was there at the kill.
        left: what seemed to run after the end.
    """

    home: Path
    before: str
    run: FlowRun
    kept: dict[str, str]
    left: list[str]


class Killed(NamedTuple):
    """A run right after the kill."""

    trial: Trial
    home: Path
    run_id: UUID
    kept: dict[str, str]


@pytest.fixture(scope="module")
def calm(team: Team) -> None:
    """The worker that nobody kills."""
    team.worker(CALM, limit=AT_ONCE)


@pytest.fixture(scope="module")
def unstopped(team: Team, calm: None, tmp_path_factory: pytest.TempPathFactory, _empty_mlflow_database: Path) -> Ended:
    """The tiny experiment under a worker, never stopped."""
    home = state_folder(tmp_path_factory.mktemp("unstopped") / "tiny", _empty_mlflow_database)
    run_id = team.start(home, CALM)
    process, began = _running(team, run_id)
    spent = 0.0
    while team.run(run_id).state_type.value == "RUNNING":
        spent = _spent(process) or spent
        time.sleep(0.1)
    return Ended(home, team.run(run_id), spent - began, _result(home))


@pytest.fixture(scope="module")
def survivors(
    team: Team, unstopped: Ended, tmp_path_factory: pytest.TempPathFactory, _empty_mlflow_database: Path
) -> dict[int, Survivor]:
    """Killed side by side; then, when nothing of any seems to run, retried under workers that live."""
    folder = tmp_path_factory.mktemp("killed")

    def kill(trial: Trial) -> Killed:
        home = state_folder(folder / f"{trial.kind}-{trial.number}", _empty_mlflow_database)
        return _kill(team, trial, home, unstopped.seconds * trial.share)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        killed = list(pool.map(kill, TRIALS))
    until(lambda: not any(_seeming(team, item.run_id) for item in killed), every=2)
    before = {item.trial.number: team.state(item.run_id) for item in killed}
    team.worker(*(trial.queue for trial in TRIALS if trial.queue != CALM), limit=AT_ONCE)
    for item in killed:
        if before[item.trial.number] == "Crashed":
            team.retry(item.run_id)
    until(lambda: all(team.run(item.run_id).state.is_final() for item in killed), every=2)
    return {
        item.trial.number: Survivor(
            item.home,
            before[item.trial.number],
            team.run(item.run_id),
            item.kept,
            [run.name for run in team.unfinished(item.run_id)],
        )
        for item in killed
    }


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{trial.kind}-{trial.share:.2f}")
def test_a_killed_run_continues_to_the_same_end(trial: Trial, survivors: dict[int, Survivor], unstopped: Ended) -> None:
    survivor = survivors[trial.number]
    # A run outlives its worker, and whoever is killed is Crashed and continued.
    assert survivor.before == (unstopped.run.state_name if trial.kind == "worker" else "Crashed")
    assert survivor.run.run_count == (1 if trial.kind == "worker" else 2)
    assert survivor.run.state_name == unstopped.run.state_name
    result = _result(survivor.home)
    assert trajectory(result) == trajectory(unstopped.result)
    assert result["policy"]["digest"] == unstopped.result["policy"]["digest"]
    assert _but_the_report(numbers(result)) == _but_the_report(numbers(unstopped.result))
    assert _but_the_report(digests(survivor.home / "store")) == _but_the_report(digests(unstopped.home / "store"))


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: f"{trial.kind}-{trial.share:.2f}")
def test_a_killed_run_leaves_nothing_running_nothing_computed_twice_and_no_doubled_point(
    trial: Trial, survivors: dict[int, Survivor], unstopped: Ended
) -> None:
    survivor = survivors[trial.number]
    assert survivor.left == []
    assert survivor.kept.items() <= _made(survivor.home).items()
    assert list((survivor.home / "scratch").iterdir()) == []
    assert list(mlflow_runs(survivor.home).values()) == list(mlflow_runs(unstopped.home).values())


def _kill(team: Team, trial: Trial, home: Path, seconds: float) -> Killed:
    worker = None if trial.queue == CALM else team.worker(trial.queue)
    # An experiment of its own, with the same stages: the runs of one would end each other's dead.
    evaluation = {**config().evaluation.model_dump(), "samples_shown": 1 + trial.number}
    run_id = team.start(home, trial.queue, evaluation=evaluation)
    process, began = _running(team, run_id)
    deadline = time.monotonic() + SECONDS
    while (spent := _spent(process)) is not None and spent < began + seconds:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert spent is not None, f"{trial} ended before its moment: {team.run(run_id).state}"
    if worker is not None and trial.kind != "flow":
        worker._process.kill()
    if trial.kind != "worker":
        kill_group(process)
    return Killed(trial, home, run_id, _made(home))


def _running(team: Team, run_id: UUID) -> tuple[psutil.Process, float]:
    """The process of a run, and its processor time when the run was seen to be Running."""
    process: psutil.Process = until(lambda: process_of(run_id))
    until(lambda: team.state(run_id) == "Running", lambda: str(team.run(run_id).state))
    return process, _spent(process) or 0.0


def _spent(process: psutil.Process) -> float | None:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return None
    return float(times.user + times.system)


def _seeming(team: Team, run_id: UUID) -> bool:
    """Whether a run or one nested in it is not in a final state."""
    return any(not (run.state and run.state.is_final()) for run in team.family(run_id))


def _made(home: Path) -> dict[str, str]:
    return {f"{item.stage}/{item.key}": item.created for item in open_store(str(home / "store")).manifests()}


def _but_the_report(record: dict[str, Any]) -> dict[str, Any]:
    """What does not show how many samples each experiment shows."""
    return {name: value for name, value in record.items() if not name.startswith("report")}


def _result(home: Path) -> dict[str, Any]:
    store = open_store(str(home / "store"))
    (name,) = store.record_names("results/")
    result = store.get_record(name)
    assert result is not None
    return result

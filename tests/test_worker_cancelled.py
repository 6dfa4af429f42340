"""Cancel pressed in mid-training: of a run under its worker, of one whose worker is gone, and of a dead one.

And two attempts at one run at once, which is what a false alarm and a retry make.
"""

from __future__ import annotations

import time
from pathlib import Path
from uuid import UUID

import pytest
from chain_kit import Finished, digests, mlflow_runs, stage_counts, training
from worker_kit import Team, kill_group, process_of, processes_of, state_folder, until

from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# What the issue asks for: nothing of a cancelled run is alive after this.
CANCEL_SECONDS = 30


@pytest.fixture
def home(tmp_path: Path, _empty_mlflow_database: Path) -> Path:
    """The state folder of one run."""
    return state_folder(tmp_path / "home", _empty_mlflow_database)


def test_a_cancelled_run_is_gone_and_its_retry_continues(team: Team, home: Path, finished: Finished) -> None:
    run_id = _cancelled_in_training(team, home, own_process=False)
    team.retry(run_id)
    _wait_for_the_end(team, run_id)
    assert team.run(run_id).run_count == 2
    _is_as_never_stopped(home, finished)


def test_a_run_with_stages_in_own_processes_is_gone_too_and_a_new_run_continues(
    team: Team, home: Path, finished: Finished
) -> None:
    _cancelled_in_training(team, home, own_process=True)
    # Which process computes is in no key: the new run may say otherwise, and is quicker so.
    run_id = team.start(home, "cancel-True")
    _wait_for_the_end(team, run_id)
    _is_as_never_stopped(home, finished)


def test_a_run_without_its_worker_ends_itself_when_cancelled(team: Team, home: Path) -> None:
    worker = team.worker("orphan")
    run_id = team.start(home, "orphan")
    until(training(home, "sft", "data"), lambda: str(team.run(run_id).state), every=0.01)
    worker._process.kill()
    assert _cancelled_within(team, run_id) < CANCEL_SECONDS
    assert team.state(run_id) == "Cancelled"
    until(lambda: not team.unfinished(run_id))
    assert _mlflow_status(home) == "KILLED"


def test_the_run_of_a_stopped_worker_does_not_seem_to_run_for_ever(team: Team, home: Path, finished: Finished) -> None:
    """Prefect's worker mostly ends its run; now and then it lets the run go on to its end."""
    worker = team.worker("stopped")
    run_id = team.start(home, "stopped")
    until(training(home, "sft", "data"), lambda: str(team.run(run_id).state), every=0.01)
    worker._process.terminate()
    until(lambda: not processes_of(run_id))
    until(lambda: all(run.state.is_final() for run in team.family(run_id)), lambda: str(team.run(run_id).state))
    if team.run(run_id).state.is_completed():
        _is_as_never_stopped(home, finished)
    else:
        assert team.state(run_id) == "Crashed"
        assert any(home.glob("scratch/*/checkpoint-*.safetensors"))


def test_a_dead_run_that_is_cancelled_does_not_stay_cancelling(team: Team, home: Path) -> None:
    worker = team.worker("dead")
    run_id = team.start(home, "dead")
    until(training(home, "sft", "data"), lambda: str(team.run(run_id).state), every=0.01)
    process = process_of(run_id)
    assert process is not None
    worker._process.kill()
    kill_group(process)
    team.cancel(run_id)
    until(lambda: team.state(run_id) == "Cancelled", lambda: str(team.run(run_id).state))
    until(lambda: not team.unfinished(run_id))


def test_two_attempts_at_once_do_no_harm(team: Team, home: Path, finished: Finished) -> None:
    """The worker is killed and the run goes on; it is called Crashed all the same, and retried under another worker."""
    worker = team.worker("twice")
    run_id = team.start(home, "twice")
    until(training(home, "sft", "data"), lambda: str(team.run(run_id).state), every=0.01)
    worker._process.kill()
    team.crash(run_id)
    team.retry(run_id)
    team.worker("twice")
    until(lambda: len(processes_of(run_id)) == 2, lambda: str(team.run(run_id).state), every=0.05)
    _wait_for_the_end(team, run_id)
    assert team.run(run_id).run_count == 2
    _is_as_never_stopped(home, finished)


def _cancelled_in_training(team: Team, home: Path, own_process: bool) -> UUID:
    """A run that was cancelled in the middle of a training, and what is left of it then."""
    team.worker(f"cancel-{own_process}")
    run_id = team.start(home, f"cancel-{own_process}", compute={"threads": 1, "own_process": own_process})
    until(training(home, "sft", "data"), lambda: str(team.run(run_id).state), every=0.01)
    assert len(processes_of(run_id)) == (2 if own_process else 1)
    assert _cancelled_within(team, run_id) < CANCEL_SECONDS
    until(lambda: team.state(run_id) == "Cancelled", lambda: str(team.run(run_id).state))
    until(lambda: not team.unfinished(run_id))
    assert _mlflow_status(home) == "KILLED"
    assert any(home.glob("scratch/*/checkpoint-*.safetensors"))
    return run_id


def _cancelled_within(team: Team, run_id: UUID) -> float:
    """Cancel a run; returns the seconds until no process of it was left."""
    pressed = time.monotonic()
    team.cancel(run_id)
    until(lambda: not processes_of(run_id))
    return time.monotonic() - pressed


def _wait_for_the_end(team: Team, run_id: UUID) -> None:
    until(lambda: team.run(run_id).state.is_final(), lambda: str(team.run(run_id).state))
    until(lambda: not processes_of(run_id))
    assert team.run(run_id).state.is_completed()
    assert team.unfinished(run_id) == []


def _is_as_never_stopped(home: Path, finished: Finished) -> None:
    """The artifacts, the one MLflow run and its points, and nothing unfinished."""
    here, there = home / "store", finished.home / "store"
    assert digests(here).items() <= digests(there).items()
    assert set(stage_counts(here)) == set(stage_counts(there))
    assert list((home / "scratch").iterdir()) == []
    points = mlflow_runs(finished.home)[finished.result["tracking"]["run_id"]]
    assert list(mlflow_runs(home).values()) == [points]
    assert _mlflow_status(home) == "FINISHED"
    store = open_store(str(home / "store"))
    (name,) = store.record_names("results/")
    result = store.get_record(name)
    assert result is not None
    assert result["policy"]["digest"] == finished.result["policy"]["digest"]


def _mlflow_status(home: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    (run,) = client.search_runs([item.experiment_id for item in client.search_experiments()])
    return str(run.info.status)

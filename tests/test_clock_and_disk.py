"""Machines that misbehave under a run: the clock is moved, the disk is full, the same experiment runs twice at once."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from chain_kit import Finished, Running, computed, digests, mlflow_runs, new_home, numbers
from servers_needed import needed

from cdpo_core.artifacts import file_sha256
from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

DAY = 86_400


def _whole(store: Path) -> None:
    """Every manifest names what is there, every byte of it; no object is half written."""
    for manifest in open_store(str(store)).manifests():
        open_store(str(store)).check(manifest)
    assert [path.name for path in store.glob("objects/*") if file_sha256(path) != path.name] == []


@pytest.fixture
def homes(tmp_path: Path, _empty_mlflow_database: Path) -> list[Path]:
    """Two empty state folders."""
    return [new_home(tmp_path / name, _empty_mlflow_database) for name in ("one", "two")]


class Clock:
    """The clock of a child process, moved while it runs by rewriting a file that libfaketime reads."""

    def __init__(self, file: Path) -> None:
        needed("faketime", "faketime")
        (library,) = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        self._file = file
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def move(self, days: float) -> None:
        """Set the clock this far off the true time."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(f"{round(days * DAY):+d}\n")
        partial.replace(self._file)


def test_a_clock_that_is_moved_between_and_within_runs(
    finished: Finished, homes: list[Path], tmp_path: Path, prefect_server: str
) -> None:
    home = homes[0]
    clock = Clock(tmp_path / "clock")

    def stored(stage: str) -> bool:
        return any(home.glob(f"store/stages/{stage}/*.json"))

    Running(home, prefect_server).kill_at(lambda: stored("sft"))
    clock.move(-5)
    with mock.patch.dict(os.environ, clock.environment):
        running = Running(home, prefect_server)
    try:
        _wait_until(lambda: stored("round") or running.process.poll() is not None)
        clock.move(2)
    finally:
        code, result = running.wait()
    assert (code, numbers(result)) == (finished.code, numbers(finished.result))
    # The clock was moved for true: stages of one run are stamped a week apart, the later ones before the first.
    stamps = [manifest.created for manifest in open_store(str(home / "store")).manifests()]
    assert _days(max(stamps)) - _days(min(stamps)) > 6

    before = mlflow_runs(home)
    clock.move(30)
    with mock.patch.dict(os.environ, clock.environment):
        code, again = Running(home, prefect_server).wait()
    assert (code, computed(again)) == (finished.code, [])
    run_id = finished.result["tracking"]["run_id"]
    assert list(before.values()) == [mlflow_runs(finished.home)[run_id]]
    assert mlflow_runs(home) == before
    _whole(home / "store")


def _days(created: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(created).timestamp() / DAY


def _wait_until(moment: Callable[[], bool]) -> None:
    while not moment():
        time.sleep(0.05)


class Disk(NamedTuple):
    """A small file system of its own, with an empty state folder."""

    folder: Path
    home: Path

    def resize(self, size: str) -> None:
        """Make it larger or smaller."""
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path, _empty_mlflow_database: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a small disk needs the right to mount (root)")
    try:
        yield Disk(folder, new_home(folder / "home", _empty_mlflow_database))
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_is_one_error_and_the_same_command_continues(
    finished: Finished, disk: Disk, prefect_server: str
) -> None:
    home, stored = disk.home, []
    for size in ("1700k", "2600k", "3500k"):
        disk.resize(size)
        running = Running(home, prefect_server)
        code = running.process.wait(1200)
        said = running.log.read_text()
        assert code in (1, 2), said
        assert not running.result.exists()
        _one_error(said)
        disk.resize("64m")
        _whole(home / "store")
        stored.append(len(digests(home / "store")))
        running.log.unlink()
    assert stored == sorted(stored)
    code, result = Running(home, prefect_server).wait()
    assert (code, numbers(result)) == (finished.code, numbers(finished.result))
    assert list(mlflow_runs(home).values()) == [mlflow_runs(finished.home)[finished.result["tracking"]["run_id"]]]
    _whole(home / "store")


def _one_error(said: str) -> None:
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said, said
    error = said[said.index("error: ") :].strip()
    assert len(error.splitlines()) <= 12, said
    assert "space" in error, said


def test_the_same_experiment_twice_at_once_on_one_folder_and_one_mlflow_server(
    finished: Finished, homes: list[Path], tmp_path: Path, prefect_server: str, mlflow_server: str
) -> None:
    """Two state folders (two machines), one store, one MLflow: one MLflow run, every point and artifact once."""
    from mlflow import MlflowClient

    store = tmp_path / "store"
    options = ["--store", str(store), "--tracking.uri", mlflow_server, "--tracking.experiment", "at once"]
    running = [Running(home, prefect_server, *options) for home in homes]
    try:
        outcomes = [item.wait() for item in running]
    finally:
        for item in running:
            item.end()
    assert [code for code, _ in outcomes] == [finished.code] * 2
    assert [numbers(result) for _, result in outcomes] == [numbers(finished.result)] * 2
    client = MlflowClient(tracking_uri=mlflow_server)
    experiment = client.get_experiment_by_name("at once")
    (run,) = client.search_runs([experiment.experiment_id])
    points = Counter(
        (name, point.step) for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)
    )
    assert set(points.values()) == {1}
    assert points.total() == mlflow_runs(finished.home)[finished.result["tracking"]["run_id"]]
    _whole(store)

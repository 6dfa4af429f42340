"""Whole runs of the tiny configuration, for the tests of the chain: here, in processes of their own, and killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_line_kit import command_line

from cdpo_core.config import ExperimentConfig
from cdpo_core.config_loading import load_config
from tasks.storage import open_store

CONFIG = "tiny"
# A stage's bytes are promised for a fixed number of threads only; from λ = 0 there is a trajectory to compare.
OVERRIDES = {"compute.threads": "1", "dual.start": "zero", "dual.rounds": "3"}
# Far more than a run takes: a run that hangs fails a test, a busy machine does not.
SECONDS = 1200
# What two runs of one experiment may differ in: when and where they ran, and what was there already.
CIRCUMSTANCES = {"seconds", "cached", "tracking", "store", "uri", "report", "ended_ms"}

Moment = Callable[[], bool]


class Finished(NamedTuple):
    """A finished run: its state folder, exit code and result record."""

    home: Path
    code: int
    result: dict[str, Any]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, _empty_mlflow_database: Path) -> Finished:
    """The tiny experiment, run once without a stop; whoever uses its state folder may add to it."""
    home = new_home(tmp_path_factory.mktemp("finished"), _empty_mlflow_database)
    return Finished(home, *run_here(home))


def new_home(folder: Path, mlflow_database: Path) -> Path:
    """An empty state folder, but for the database that MLflow takes seconds to make."""
    folder.mkdir(exist_ok=True)
    shutil.copy(mlflow_database, folder / "mlflow.db")
    return folder


def words(*arguments: str) -> list[str]:
    """The command line of a run of the tiny configuration; the arguments may set what it overrides."""
    names = {path: f"--{path}" for path in OVERRIDES}
    fields = [word for path, name in names.items() if name not in arguments for word in (name, OVERRIDES[path])]
    return [CONFIG, *fields, *arguments]


def config() -> ExperimentConfig:
    """The config that `words()` gives."""
    return load_config(CONFIG, OVERRIDES)


def run_here(home: Path, *arguments: str, command: str = "run") -> tuple[int, dict[str, Any]]:
    """`cdpo run` (or another command) in this process; returns its exit code and its result record."""
    result = home / "result.json"
    result.unlink(missing_ok=True)
    code = command_line([command, *words(*arguments), "--json", str(result)], home).code
    return code, json.loads(result.read_text()) if result.exists() else {}


class Running:
    """`cdpo run` in a process group of its own."""

    def __init__(self, home: Path, prefect_api: str, *arguments: str) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        self.result = home / "result.json"
        self.result.unlink(missing_ok=True)
        self.log = home / "output.log"
        command = [sys.executable, "-m", "flows.cli", "run", *words(*arguments), "--json", str(self.result)]
        environment = {**os.environ, "CDPO_HOME": str(home), "PREFECT_API_URL": prefect_api}
        environment.pop("MLFLOW_TRACKING_URI", None)
        if not prefect_api:  # the command starts a server of its own
            del environment["PREFECT_API_URL"]
            environment["PREFECT_HOME"] = str(home / "prefect")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> tuple[int, dict[str, Any]]:
        """Its exit code and result record."""
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.end()
        assert self.result.exists(), self.log.read_text()[-3000:]
        return code, json.loads(self.result.read_text())

    def kill_at(self, moment: Moment) -> None:
        """Kill the whole group as soon as the moment has come; it must not have ended before."""
        deadline = time.monotonic() + SECONDS
        try:
            while not moment():
                assert self.process.poll() is None, f"ended before the moment came:\n{self.log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.001)
        finally:
            self.end()
        assert self.process.wait(30) == -signal.SIGKILL
        assert not self.result.exists()

    def end(self) -> None:
        """`kill -9` the whole group, if it is there still."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)


def stored(home: Path, stage: str) -> int:
    """How many artifacts of a stage the store under a state folder holds."""
    return len(list(home.glob(f"store/stages/{stage}/*.json")))


def training(home: Path, stage: str, before: str, count: int = 1) -> Moment:
    """A moment in the middle of a training: what comes before it is there, it has left a checkpoint and no more."""

    def moment() -> bool:
        is_next = stored(home, before) >= count and not stored(home, stage)
        return is_next and any(home.glob("scratch/*/checkpoint-*.safetensors"))

    return moment


def digests(store: str | Path) -> dict[str, str]:
    """The digest of every artifact in a store, by `stage/key`."""
    return {f"{item.stage}/{item.key}": item.digest for item in open_store(str(store)).manifests()}


def stage_counts(store: str | Path) -> Counter[str]:
    """How many artifacts of each stage a store holds."""
    return Counter(name.split("/")[0] for name in digests(store))


def computed(result: dict[str, Any]) -> list[str]:
    """The names of the stages that a run had to compute."""
    return [stage["name"] for stage in result["stages"] if not stage["cached"]]


def trajectory(result: dict[str, Any]) -> list[float]:
    """Lambda by round."""
    return [record["lambda"] for record in result["rounds"]]


def numbers(record: Any) -> Any:
    """A result record without its circumstances: what must be the same in every run of one experiment."""
    if isinstance(record, dict):
        return {name: numbers(value) for name, value in record.items() if name not in CIRCUMSTANCES}
    return [numbers(item) for item in record] if isinstance(record, list) else record


def mlflow_runs(home: Path) -> dict[str, int]:
    """The number of metric points of every MLflow run under a state folder, by run id."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    experiments = [item.experiment_id for item in client.search_experiments()]
    return {
        run.info.run_id: sum(len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics)
        for run in client.search_runs(experiments)
    }

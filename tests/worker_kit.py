"""Runs under real workers of a real Prefect server: started, killed, cancelled and retried through its API."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
from chain_kit import SECONDS, config
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed, Scheduled

from deployments.bootstrap import bootstrap
from deployments.pools import PoolOptions
from flows.pools import POOL
from flows.prefect_server import COMMAND as PREFECT_SERVER
from flows.processes import MARKER, Child, end_marked, free_port, http_json
from tasks.environment import RUN_SETTINGS

UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
DEPLOYMENT = "experiment/experiment"


class Team:
    """A Prefect server with the project's deployments and automations, and workers that come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._marker = folder, f"test-{uuid4()}"
        port = free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        self.client = SyncPrefectClient(self.api)
        self._environment = {
            **os.environ,
            MARKER: self._marker,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            **RUN_SETTINGS,
        }
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        command = [*PREFECT_SERVER, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        self._server = Child("server", command, self._environment, folder / "server.log")

    def deploy(self) -> None:
        """Wait for the server, and make the project's pools, automations and deployments."""
        until(lambda: http_json(f"{self.api}/health") is not None, lambda: self._server.log.read_text()[-3000:])
        with temporary_settings({PREFECT_API_URL: self.api}):
            bootstrap(PoolOptions())

    def close(self) -> None:
        """End whatever was started."""
        end_marked(self._marker)

    def worker(self, *queues: str, limit: int = 3) -> Child:
        """A worker that takes the runs of these queues of the experiments' pool, so many at once."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--install-policy", "never"]
        command += ["--limit", str(limit)]
        for queue in queues:
            with suppress(ObjectAlreadyExists):
                self.client.create_work_queue(queue, work_pool_name=POOL)
            command += ["--work-queue", queue]
        log = self.folder / f"worker-{queues[0]}-{uuid4().hex[:6]}.log"
        return Child("worker", command, self._environment, log)

    def start(self, home: Path, queue: str, **sections: Any) -> UUID:
        """Schedule the tiny experiment with all state under `home`; returns the flow run's id.

        Args:
            home: the state folder.
            queue: of the experiments' pool.
            sections: of the config, instead of the tiny one's.
        """
        run = self.client.create_flow_run_from_deployment(
            self.client.read_deployment_by_name(DEPLOYMENT).id,
            parameters={**config().model_dump(mode="json"), **sections},
            state=Scheduled(),
            work_queue_name=queue,
            job_variables={"env": {"CDPO_HOME": str(home), **RUN_SETTINGS}},
        )
        return run.id

    def retry(self, run_id: UUID) -> None:
        """What the UI's Retry button and `prefect flow-run retry` do."""
        self.client.set_flow_run_state(run_id, Scheduled(name="AwaitingRetry"), force=True)

    def cancel(self, run_id: UUID) -> None:
        """What the UI's Cancel button does."""
        self.client.set_flow_run_state(run_id, Cancelling())

    def crash(self, run_id: UUID) -> None:
        """What the automation does to a run that fell silent."""
        self.client.set_flow_run_state(run_id, Crashed())

    def run(self, run_id: UUID) -> FlowRun:
        """The run as the server knows it."""
        return self.client.read_flow_run(run_id)

    def state(self, run_id: UUID) -> str:
        """The name of the run's state."""
        return str(self.run(run_id).state_name)

    def family(self, run_id: UUID) -> list[FlowRun]:
        """The run and all runs below it."""
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id]))
        children = self.client.read_flow_runs(flow_run_filter=below)
        return [self.run(run_id), *(run for child in children for run in self.family(child.id))]

    def unfinished(self, run_id: UUID) -> list[FlowRun | TaskRun]:
        """Runs, nested runs and tasks of a run that seem to run."""
        family = self.family(run_id)
        of_family = FlowRunFilter(id=FlowRunFilterId(any_=[run.id for run in family]))
        state = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=UNFINISHED)))
        tasks = self.client.read_task_runs(flow_run_filter=of_family, task_run_filter=state)
        return [*(run for run in family if run.state_type in UNFINISHED), *tasks]


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """One Prefect server for all tests of runs under workers."""
    started = Team(tmp_path_factory.mktemp("team"))
    try:
        started.deploy()
        yield started
    finally:
        started.close()


def process_of(run_id: UUID) -> psutil.Process | None:
    """The process that executes a flow run, once there is one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(run_id) and process.pid == os.getpgid(process.pid):
                return process
    return None


def processes_of(run_id: UUID) -> list[psutil.Process]:
    """Every living process that executes a flow run or was started by one that did."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") != str(run_id):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_group(process: psutil.Process) -> None:
    """`kill -9` of a process and its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def until(is_so: Callable[[], Any], words: Callable[[], str] = str, every: float = 0.2) -> Any:
    """Wait until a condition holds; returns what it gave."""
    deadline = time.monotonic() + SECONDS
    while not (given := is_so()):
        assert time.monotonic() < deadline, words()
        time.sleep(every)
    return given


def state_folder(folder: Path, mlflow_database: Path) -> Path:
    """An empty state folder with the database that MLflow takes seconds to make."""
    folder.mkdir(parents=True)
    shutil.copy(mlflow_database, folder / "mlflow.db")
    return folder

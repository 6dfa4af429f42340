"""Runs under real workers of a real Prefect server: started, killed, cancelled and retried through its API."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
from chain_kit import SECONDS, config
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Scheduled

from deployments.automations import make_automations
from deployments.bootstrap import bootstrap
from flows.experiment import sections
from flows.processes import MARKER, Child, end_marked, free_port, http_json
from tasks.environment import HEARTBEAT_SECONDS

UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
DEPLOYMENT = "experiment/experiment"


class Team:
    """A Prefect server with the project's deployments and automations, and workers that come and go.

    Attributes:
        api: the server's address.
        client: of the server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._marker = folder, f"test-{uuid4()}"
        self._port = free_port()
        self.api = f"http://127.0.0.1:{self._port}/api"
        self._environment = {
            **os.environ,
            MARKER: self._marker,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        }
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        self._server = Child("server", [*command, "--port", str(self._port)], self._environment, folder / "server.log")
        until(lambda: http_json(f"{self.api}/health") is not None, lambda: self._server.log.read_text()[-3000:])

    @contextmanager
    def open(self) -> Iterator[Team]:
        """Deploy, and use this server in this process meanwhile; ends whatever was started."""
        try:
            with temporary_settings({PREFECT_API_URL: self.api}), get_client(sync_client=True) as client:
                self.client: SyncPrefectClient = client
                yield self
        finally:
            end_marked(self._marker)

    def deploy(self) -> None:
        """The project's pools, deployments and automations."""
        bootstrap()
        make_automations(self.client)

    def worker(self, pool: str, home: Path) -> Child:
        """A worker of a pool, whose runs keep their state under `home`."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--install-policy", "never"]
        log = home / f"worker-{uuid4().hex[:6]}.log"
        return Child("worker", command, {**self._environment, "CDPO_HOME": str(home)}, log)

    def start(self, home: Path, **changes: Any) -> UUID:
        """Schedule the tiny experiment with all state under `home`; returns the flow run's id."""
        parameters = {**sections(config()), **changes}
        plain = {k: v.model_dump() if hasattr(v, "model_dump") else v for k, v in parameters.items()}
        plain["constraints"] = [item.model_dump() for item in config().constraints]
        run = self.client.create_flow_run_from_deployment(
            self.client.read_deployment_by_name(DEPLOYMENT).id,
            parameters=plain,
            name=home.name,
            state=Scheduled(),
            job_variables={"env": {"CDPO_HOME": str(home)}},
        )
        return run.id

    def retry(self, run_id: UUID) -> None:
        """What the UI's Retry button and `prefect flow-run retry` do."""
        self.client.set_flow_run_state(run_id, Scheduled(name="AwaitingRetry"), force=True)

    def cancel(self, run_id: UUID) -> None:
        """What the UI's Cancel button does."""
        self.client.set_flow_run_state(run_id, Cancelling())

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

    def log(self, home: Path) -> str:
        """The end of what the workers of a state folder said."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-4000:]}" for path in sorted(home.glob("worker-*.log")))


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


def until(is_so: Callable[[], Any], words: Callable[[], str] = str, seconds: float = SECONDS) -> Any:
    """Wait until a condition holds; returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (given := is_so()):
        assert time.monotonic() < deadline, words()
        time.sleep(0.2)
    return given


def state_folder(folder: Path, mlflow_database: Path) -> Path:
    """An empty state folder with the database that MLflow takes seconds to make."""
    folder.mkdir(parents=True)
    shutil.copy(mlflow_database, folder / "mlflow.db")
    return folder

"""A Prefect server on PostgreSQL with the deployments and workers of its own, for tests of runs on workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from servers_postgres import Postgres
from servers_s3 import free_port, wait_for

from flows.pools import POOL, SWEEP_POOL

ROOT = Path(__file__).parent.parent
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
# Far more than anything here takes: what hangs fails a test, a busy machine does not.
SECONDS = 1500


class Team:
    """A running Prefect server and its workers, which share one state folder.

    Attributes:
        home: CDPO_HOME of the workers.
        address: of Prefect's API.
    """

    def __init__(self, home: Path, address: str, environment: Mapping[str, str]) -> None:
        self.home, self.address, self.environment = home, address, dict(environment)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """One request to Prefect's API; its answer."""
        request = urllib.request.Request(
            self.address + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def start(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        """Start a run of a deployment through the API; returns its id."""
        found = self.api("GET", f"/deployments/name/{deployment}")
        return str(self.api("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """A flow run as it is now."""
        found: dict[str, Any] = self.api("GET", f"/flow_runs/{run_id}")
        return found

    def ended(self, run_id: str) -> dict[str, Any]:
        """The flow run, once it has ended."""
        until(lambda: self.run(run_id)["state"]["type"] in OVER)
        return self.run(run_id)

    def set_state(self, run_id: str, kind: str, *, force: bool = False) -> None:
        """Ask for a state, as the UI's buttons do: CANCELLING cancels, SCHEDULED by force retries."""
        body = {"state": {"type": kind, "name": kind.capitalize()}, "force": force}
        self.api("POST", f"/flow_runs/{run_id}/set_state", body)

    def children(self) -> list[dict[str, Any]]:
        """Every run of the deployment that sweeps start their children from, oldest first."""
        found = self.api("GET", "/deployments/name/experiment/experiment")
        wanted = {"deployments": {"id": {"any_": [found["id"]]}}}
        runs: list[dict[str, Any]] = self.api("POST", "/flow_runs/filter", wanted)
        return sorted(runs, key=lambda run: str(run["created"]))

    def worker_of(self, run_id: str) -> list[str]:
        """The workers that say they started a run."""
        logs = sorted((self.home / "logs").glob("worker-*.log"))
        return [log.stem.removeprefix("worker-") for log in logs if run_id in log.read_text(errors="replace")]

    def process_of(self, run_id: str) -> psutil.Process:
        """The process that a running flow run has said it is in."""
        return psutil.Process(int(self.run(run_id)["labels"]["cdpo.pid"]))

    def kill(self, run_id: str) -> None:
        """`kill -9` the process of a running flow run."""
        kill_tree(self.process_of(run_id).pid)

    def logs(self) -> str:
        """The ends of all logs, for a failed assertion."""
        return "\n".join(f"{path.name}\n{path.read_text()[-4000:]}" for path in (self.home / "logs").glob("*.log"))


@contextmanager
def team(home: Path, postgres: Postgres, database: str, workers: tuple[str, ...]) -> Iterator[Team]:
    """The server, the deployments, a worker for parents and these workers for children, one child at a time each."""
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    postgres.ask("postgres", f"CREATE DATABASE {database}")
    port = free_port()
    environment = {**os.environ, "CDPO_HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "PYTHONUNBUFFERED": "1"}
    environment |= {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_WORKER_QUERY_SECONDS": "1"}
    environment["PREFECT_API_DATABASE_CONNECTION_URL"] = (
        postgres.secret_address.replace("postgresql://", "postgresql+asyncpg://") + f"/{database}"
    )
    environment.pop("MLFLOW_TRACKING_URI", None)
    python = [sys.executable, "-m"]
    with ExitStack() as started:
        server = _process(
            [*python, "prefect", "server", "start", "--port", str(port)], environment, logs / "server.log", started
        )
        wait_for(f"http://127.0.0.1:{port}/api/health", server, SECONDS)
        deploy = [*python, "deployments.bootstrap", "--working-folder", str(ROOT)]
        subprocess.run(deploy, env=environment, cwd=ROOT, check=True, capture_output=True)
        parts = [("parents", SWEEP_POOL, []), *((name, POOL, ["--limit", "1"]) for name in workers)]
        for name, pool, words in parts:
            command = [*python, "prefect", "worker", "start", "--pool", pool, "--name", name, *words]
            _process([*command, "--install-policy", "never"], environment, logs / f"worker-{name}.log", started)
        found = Team(home, environment["PREFECT_API_URL"], environment)
        for pool, names in ((SWEEP_POOL, {"parents"}), (POOL, set(workers))):
            until(lambda pool=pool, names=names: names <= _online(found, pool))
        yield found


def _online(found: Team, pool: str) -> set[str]:
    workers = found.api("POST", f"/work_pools/{pool}/workers/filter", {})
    return {str(worker["name"]) for worker in workers if worker["status"] == "ONLINE"}


def _process(
    command: list[str], environment: Mapping[str, str], log: Path, started: ExitStack
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, ended with all its descendants when `started` closes."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=dict(environment), cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
    started.callback(kill_tree, process.pid)
    return process


def kill_tree(pid: int) -> None:
    """`kill -9` a process and all its descendants."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, 30)


def until(is_so: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.5)

"""`cdpo up` in a process of its own, and its servers' answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.processes import end_marked
from tasks.access import mlflow_authorization, prefect_authorization

ROOT = Path(__file__).parent.parent
# What would send a test's `cdpo up` to somebody else's servers.
OUTSIDE = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "CDPO_STORE", "CDPO_POSTGRES_URL")
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Up:
    """A running `cdpo up`."""

    process: subprocess.Popen[bytes]
    home: Path
    environment: dict[str, str]
    state: dict[str, str]

    @property
    def prefect(self) -> str:
        """The address of Prefect's API."""
        return self.state["PREFECT_API_URL"]

    @property
    def mlflow(self) -> str:
        """The address of the MLflow server."""
        return self.state["MLFLOW_TRACKING_URI"]

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """One request to Prefect's API with the login, if there is one; (status, text) when it is refused."""
        return ask(self.prefect + path, method, body, prefect_authorization(self._login()))

    def tracking(self, path: str, body: Any) -> Any:
        """One request to MLflow's API with the login, if there is one; (status, text) when it is refused."""
        return ask(f"{self.mlflow}/api/2.0/mlflow/{path}", "POST", body, mlflow_authorization(self._login()))

    def mlflow_runs(self) -> list[Any]:
        """Every MLflow run."""
        found = self.tracking("experiments/search", {"max_results": 100})["experiments"]
        runs: list[Any] = self.tracking("runs/search", {"experiment_ids": [item["experiment_id"] for item in found]})[
            "runs"
        ]
        return runs

    def start(self, deployment: str, parameters: Mapping[str, Any]) -> Any:
        """A new run of a deployment (flow/name)."""
        found = self.api("GET", f"/deployments/name/{deployment}")
        return self.api("POST", f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})

    def ended(self, run_id: str, seconds: float = 600) -> str:
        """The type of the state a run ended in."""
        until(lambda: self._state(run_id) in OVER, seconds)
        return self._state(run_id)

    def logs(self) -> str:
        """The ends of the workers' logs, for a failed assertion."""
        return "\n".join(path.read_text()[-3000:] for path in sorted((self.home / "logs").glob("worker-*")))

    def python(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run Python against these servers, and check its exit code."""
        done = self.run_python(*arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def run_python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python against these servers."""
        environment = {**self.environment, "PREFECT_API_URL": self.prefect}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)

    def _state(self, run_id: str) -> str:
        return str(self.api("GET", f"/flow_runs/{run_id}")["state"]["type"])

    def _login(self) -> dict[str, str]:
        name, password = (self.environment.get(f"CDPO_{word}", "") for word in ("USERNAME", "PASSWORD"))
        if not name:
            return {}
        login = {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password}
        return login | {"PREFECT_API_AUTH_STRING": f"{name}:{password}"}


def ask(url: str, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """One request, again while the server cannot serve it now; its parsed answer, or (status, text) when it refuses."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        method=method,
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    for wait in (1, 2, 4, 8, 16, 0):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            # A busy SQLite is 503.
            if error.code < 500 or not wait:
                return error.code, error.read().decode()
            time.sleep(wait)
        else:
            return json.loads(text) if text else None
    raise AssertionError("the last try returns")


@contextmanager
def up_running(home: Path, *options: str, more: Mapping[str, str] | None = None) -> Iterator[Up]:
    """`cdpo up` with these options on free ports, until it has said that all is ready.

    Args:
        home: its state folder.
        options: further options.
        more: further variables of its environment.
    """
    environment = {key: value for key, value in os.environ.items() if key not in OUTSIDE}
    environment |= {"CDPO_HOME": str(home), "PREFECT_HOME": str(home / "prefect"), **(more or {})}
    command = [sys.executable, "-m", "flows.cli", "up", "--prefect-port", "0", "--mlflow-port", "0", *options]
    with (home / "out").open("wb") as out:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    state: dict[str, str] = {}
    try:
        until(lambda: process.poll() is not None or "Ctrl-C ends" in (home / "out").read_text(), 600)
        assert process.poll() is None, (home / "out").read_text()
        state = json.loads((home / "up.json").read_text())
        yield Up(process, home, environment, state)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if state:
            end_marked(state["marker"])


def until(is_so: Callable[[], bool], seconds: float) -> None:
    """Wait until it is so; it never being so is the failure, not its taking long."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.3)

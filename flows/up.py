"""`cdpo up`: the Prefect server, the MLflow server, the deployments and the workers, on loopback.

    cdpo up --prefect-port 4200 --mlflow-port 5000

All state is under CDPO_HOME. Runs started by `cdpo run` meanwhile show in the same two UIs. Ctrl-C or SIGTERM ends
every process this started; if one of them dies, that is said and all end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cdpo_core.errors import CdpoError, InputError
from flows.command_line import default_to_nothing
from flows.pools import POOL, SWEEP_POOL
from flows.processes import MARKER, Child, end_all, end_marked, free_port, http_json, tail, taken
from flows.terminal import make_log_folder
from tasks.environment import cdpo_home, local_mlflow

# By pool: the name of its worker here.
WORKERS = {POOL: "cdpo-up", SWEEP_POOL: "cdpo-up-sweeps"}
READY_SECONDS = 180
LOCK, STATE = "up.lock", "up.json"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SERVERS = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")


def serve(prefect_port: int, mlflow_port: int) -> int:
    """Start everything, say where it is, and wait for Ctrl-C, SIGTERM or the death of a part.

    Args:
        prefect_port, mlflow_port: 0 takes a free one.

    Returns:
        0 after Ctrl-C or SIGTERM.

    Raises:
        InputError: a port is taken, or `cdpo up` is running already under this CDPO_HOME.
        CdpoError: a part did not start, or died.
    """
    home = cdpo_home()
    make_log_folder(home / "logs")
    with _only_one(home), _stop_signals() as stop:
        _end_leftovers(home)
        ports = [_port(prefect_port, "--prefect-port"), _port(mlflow_port, "--mlflow-port")]
        marker = uuid.uuid4().hex
        environment = _environment(home, marker, *ports)
        _remember(home, marker, environment, ready=False)
        children: list[Child] = []
        try:
            if _start(home, environment, ports, children, stop):
                _remember(home, marker, environment, ready=True)
                _announce(home, *ports)
                _watch(children, stop)
        finally:
            _say("ending the workers and the servers …")
            left = end_all(list(reversed(children)), marker)
            (home / STATE).unlink(missing_ok=True)
            _say("all ended" if not left else f"still running: {left}")
    return 0


def join_running() -> None:
    """Let this process use the servers of a `cdpo up` that runs under the same CDPO_HOME, unless told others."""
    state = _read_state(cdpo_home())
    if state is None or not state["ready"] or not _is_locked(cdpo_home()):
        return
    for name in SERVERS:
        os.environ.setdefault(name, state[name])


def _start(
    home: Path, environment: dict[str, str], ports: list[int], children: list[Child], stop: threading.Event
) -> bool:
    """Start all parts in order; False if told to stop before they were ready."""
    python = [sys.executable, "-m"]
    prefect_port, mlflow_port = ports
    backend, artifacts = local_mlflow(home)
    logs = home / "logs"
    _say("starting the Prefect server and the MLflow server …")
    prefect = Child(
        "the Prefect server",
        [*python, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)],
        environment,
        logs / "prefect-server.log",
    )
    children.append(prefect)
    hosts = ",".join(f"{host}{port}" for host in ("127.0.0.1", "localhost") for port in ("", f":{mlflow_port}"))
    mlflow_command = [*python, "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1"]
    mlflow_command += ["--backend-store-uri", backend, "--default-artifact-root", artifacts, "--no-serve-artifacts"]
    mlflow_command += ["--allowed-hosts", hosts]
    mlflow = Child("the MLflow server", mlflow_command, environment, logs / "mlflow-server.log")
    children.append(mlflow)
    for server, health in ((prefect, f"{prefect_port}/api/health"), (mlflow, f"{mlflow_port}/health")):
        if not _wait(server, lambda path=health: http_json(f"http://127.0.0.1:{path}") is not None, children, stop):
            return False
    _say("deploying …")
    deploy = [*python, "deployments.bootstrap", "--working-folder", str(Path.cwd())]
    deployer = Child("the deployment", deploy, environment, logs / "deploy.log")
    if not _finish(deployer, children, stop):
        return False
    for pool, name in WORKERS.items():
        worker = [*python, "prefect", "worker", "start", "--pool", pool, "--name", name, "--install-policy", "never"]
        children.append(Child(f"the worker of pool {pool}", worker, environment, logs / f"worker-{pool}.log"))
    pools = f"http://127.0.0.1:{prefect_port}/api/work_pools"
    started = list(zip(WORKERS.items(), children[-len(WORKERS) :], strict=True))
    return all(
        _wait(child, lambda pool=pool, name=name: _is_online(f"{pools}/{pool}", name), children, stop)
        for (pool, name), child in started
    )


def _announce(home: Path, prefect_port: int, mlflow_port: int) -> None:
    for line in (
        "",
        f"Prefect   http://127.0.0.1:{prefect_port}   (deployments: http://127.0.0.1:{prefect_port}/deployments)",
        f"MLflow    http://127.0.0.1:{mlflow_port}",
        f"State     {home}   (logs in {home / 'logs'})",
        "",
        "Start a run in the browser, or with `cdpo run …` in another terminal; both show in both.",
        "Ctrl-C ends everything started here.",
    ):
        _say(line)


def _say(line: str) -> None:
    """Print a line; that its reader went away (`cdpo up | head`, a closed terminal) stops nothing."""
    try:
        print(line, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            default_to_nothing()


def _watch(children: list[Child], stop: threading.Event) -> None:
    """Wait until told to stop.

    Raises:
        CdpoError: a child died.
    """
    while not stop.wait(0.5):
        _check(children)


def _check(children: list[Child]) -> None:
    for child in children:
        code = child.poll()
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise CdpoError(
                f"{child.name} {how}\n{tail(child.log)}", where=str(child.log), fix="read its log, then `cdpo up` again"
            )


def _wait(awaited: Child, is_ready: Any, children: list[Child], stop: threading.Event) -> bool:
    """Poll until the awaited child is ready; False if told to stop."""
    deadline = time.monotonic() + READY_SECONDS
    while not is_ready():
        if stop.wait(0.2):
            return False
        _check(children)
        if time.monotonic() > deadline:
            raise CdpoError(
                f"{awaited.name} was not ready within {READY_SECONDS} s\n{tail(awaited.log)}",
                where=str(awaited.log),
                fix="read its log; a machine under load may need a second try",
            )
    return True


def _finish(deployer: Child, children: list[Child], stop: threading.Event) -> bool:
    """Wait for a child that is meant to end; False if told to stop."""
    try:
        if not _wait(deployer, lambda: deployer.poll() is not None, children, stop):
            return False
        if deployer.poll() != 0:
            raise CdpoError(
                f"the deployments could not be made\n{tail(deployer.log)}", where=str(deployer.log), fix="read its log"
            )
        return True
    finally:
        deployer.end(0)


def _is_online(pool: str, worker: str) -> bool:
    found = http_json(f"{pool}/workers/filter", body={})
    return any(item.get("name") == worker and item.get("status") == "ONLINE" for item in found or [])


def _environment(home: Path, marker: str, prefect_port: int, mlflow_port: int) -> dict[str, str]:
    api = f"http://127.0.0.1:{prefect_port}/api"
    return {
        **os.environ,
        MARKER: marker,
        "CDPO_HOME": str(home),
        "PREFECT_HOME": os.environ.get("PREFECT_HOME") or str(home / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_UI_API_URL": api,
        "PREFECT_UI_URL": f"http://127.0.0.1:{prefect_port}",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        # A run whose process vanished misses three of these and is called Crashed; the default would take 10 minutes.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _port(port: int, option: str) -> int:
    if not 0 <= port < 65536:
        raise InputError(f"{port} is no port", where=option, fix="give one from 1024 to 65535, or 0 for a free one")
    try:
        in_use = port > 0 and taken(port)
    except OSError as error:
        raise InputError(
            f"port {port} cannot be listened on: {error.strerror}",
            where=option,
            fix="give one from 1024 to 65535, or 0 for a free one",
        ) from error
    if in_use:
        raise InputError(
            f"port {port} is in use",
            where=option,
            fix=f"end what uses it, or give another one: {option} PORT (0: a free one)",
        )
    return port or free_port()


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Hold the lock of this state folder; the kernel frees it however this process ends."""
    with (home / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            state = _read_state(home) or {}
            raise InputError(
                f"`cdpo up` is running already (process {state.get('pid', 'unknown')})",
                where=str(home),
                fix="end it with Ctrl-C there, or give this one a state folder of its own in CDPO_HOME",
            ) from None
        yield


def _is_locked(home: Path) -> bool:
    try:
        with (home / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _remember(home: Path, marker: str, environment: dict[str, str], *, ready: bool) -> None:
    """Note what runs here, for `cdpo run` to join once it is ready and for a successor to clear away."""
    state = {name: environment[name] for name in SERVERS}
    partial = home / f".{STATE}.partial"
    partial.write_text(json.dumps({"pid": os.getpid(), "marker": marker, "ready": ready, **state}))
    partial.replace(home / STATE)


def _read_state(home: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((home / STATE).read_text())
    except (OSError, ValueError):
        return None
    return state


def _end_leftovers(home: Path) -> None:
    """End what a killed `cdpo up` left behind."""
    state = _read_state(home)
    if state is not None and (ended := end_marked(state["marker"])):
        _say(f"ended {ended} processes that a killed `cdpo up` had left")


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and a closed terminal set, instead of interrupting whatever is going on."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    former = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)

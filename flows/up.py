"""`cdpo up`: the Prefect server, the MLflow server, the deployments and the workers, on loopback unless told otherwise.

    cdpo up --prefect-port 4200 --mlflow-port 5000
    cdpo up --postgres postgresql://cdpo@db.example.com --store s3://team/cdpo --workers 2

All state is under CDPO_HOME, but for what PostgreSQL and S3 hold. Runs started by `cdpo run` meanwhile show in the same
two UIs. Ctrl-C or SIGTERM ends every process this started; if one of them dies, that is said and all end.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cdpo_core.errors import CdpoError, InputError
from cdpo_core.plain_text import visible
from flows.command_line import default_to_nothing
from flows.databases import databases_at, make_databases
from flows.processes import Child, end_all, end_marked, free_port, http_json, http_status, tail, taken
from flows.stack import Part, Stack
from flows.terminal import make_log_folder
from flows.up_command import UpOptions
from tasks.access import PASSWORD, USERNAME, Login, login_of_environment, mlflow_authorization, prefect_authorization
from tasks.environment import DEFAULT_STORE, cdpo_home
from tasks.mlflow_connection import without_secrets
from tasks.moved_home import settle

READY_SECONDS = 180
LOCK, STATE = "up.lock", "up.json"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What other commands take over from a running `cdpo up`.
SHARED = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", DEFAULT_STORE, "AWS_ENDPOINT_URL")


def serve(options: UpOptions) -> int:
    """Start everything, say where it is, and wait for Ctrl-C, SIGTERM or the death of a part.

    Returns:
        0 after Ctrl-C or SIGTERM.

    Raises:
        InputError: an option cannot be used, or `cdpo up` is running already under this CDPO_HOME.
        CdpoError: a part did not start, or died.
    """
    options.check()
    home = cdpo_home()
    make_log_folder(home / "logs")
    with _only_one(home), _stop_signals() as stop:
        _end_leftovers(home)
        stack = _stack(options, home)
        _remember(stack, ready=False)
        children: list[Child] = []
        try:
            if _start(stack, children, stop):
                _remember(stack, ready=True)
                _announce(stack)
                _watch(children, stop)
        finally:
            _say("ending the workers and the servers …")
            left = end_all(list(reversed(children)), stack.marker)
            (home / STATE).unlink(missing_ok=True)
            _say("all ended" if not left else f"still running: {left}")
    return 0


def join_running() -> None:
    """Let this process use the servers and the store of a `cdpo up` that runs under the same CDPO_HOME.

    What the environment says already stays; a login must be in it (CDPO_USERNAME, CDPO_PASSWORD).
    """
    state = _read_state(cdpo_home())
    if state is None or not state["ready"] or not _is_locked(cdpo_home()):
        return
    for name in SHARED:
        if name in state:
            os.environ.setdefault(name, state[name])


def _stack(options: UpOptions, home: Path) -> Stack:
    """What the options and the environment ask for, after everything has been checked that can be."""
    host = options.host
    login = _login(host)
    return Stack(
        home=home,
        marker=uuid.uuid4().hex,
        host=host,
        prefect_port=_port(options.prefect_port, "--prefect-port", host),
        mlflow_port=_port(options.mlflow_port, "--mlflow-port", host),
        databases=databases_at(options.postgres),
        store=_checked_store(options.store),
        workers=options.workers,
        concurrency=options.concurrency,
        login=login,
    )


def _start(stack: Stack, children: list[Child], stop: threading.Event) -> bool:
    """Start all parts in order; False if told to stop before they were ready."""
    if stack.databases:
        make_databases(stack.databases)
    stack.make_files()
    settle(stack.home)
    _say("starting the Prefect server and the MLflow server …")
    servers = [_child(stack, part) for part in stack.servers()]
    children += servers
    for server, health in zip(servers, (f"{stack.prefect}/api/health", f"{stack.mlflow}/health"), strict=True):
        if not _wait(server, lambda url=health: http_json(url) is not None, children, stop):
            return False
    if not _logged_in(stack, servers[-1], children, stop):
        return False
    _say("deploying …")
    if not _finish(_child(stack, stack.deployment()), children, stop):
        return False
    workers = [(pool, name, _child(stack, part)) for pool, name, part in stack.pool_workers()]
    children += [child for _, _, child in workers]
    return all(
        _wait(child, lambda pool=pool, name=name: _is_online(stack, pool, name), children, stop)
        for pool, name, child in workers
    )


def _child(stack: Stack, part: Part) -> Child:
    return Child(part.name, part.command, part.environment, stack.home / "logs" / f"{part.log}.log")


def _announce(stack: Stack) -> None:
    rows = [
        ("Prefect", f"{stack.prefect}   (deployments: {stack.prefect}/deployments)"),
        ("MLflow", stack.mlflow),
        ("State", f"{stack.home}   (logs in {stack.home / 'logs'})"),
    ]
    if stack.databases:
        rows.append(("Databases", f"PostgreSQL at {stack.databases.shown}"))
    if stack.store:
        rows.append(("Store", stack.store))
    if stack.login:
        rows.append(("Login", f"{stack.login.username}, password as in {PASSWORD}; Prefect's page takes NAME:PASSWORD"))
    _say("")
    for name, value in rows:
        _say(f"{name:<10}{value}")
    _say("")
    _say("Start a run in the browser, or with `cdpo run …` in another terminal; both show in both.")
    _say("Ctrl-C ends everything started here.")


def _say(line: str) -> None:
    """Print a line; that its reader went away (`cdpo up | head`, a closed terminal) stops nothing."""
    try:
        print(visible(line), flush=True)
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


def _is_online(stack: Stack, pool: str, worker: str) -> bool:
    headers = prefect_authorization(stack.for_clients())
    found = http_json(f"{stack.prefect}/api/work_pools/{pool}/workers/filter", body={}, headers=headers)
    return any(item.get("name") == worker and item.get("status") == "ONLINE" for item in found or [])


def _login(host: str) -> Login | None:
    """The login the servers will ask for; without one they listen on loopback alone."""
    login = login_of_environment()
    if login is None and os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        raise InputError(
            "a login for Prefect alone leaves MLflow open",
            where="PREFECT_SERVER_API_AUTH_STRING",
            fix=f"set {USERNAME} and {PASSWORD} instead: both servers then ask for them",
        )
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError as error:
        raise InputError(f"{host} is no address: {error}", where="--host", fix="give one of this machine's") from error
    if address.is_unspecified:
        fix = "give the address or name of this machine that browsers and workers reach it by"
        raise InputError(f"{host} stands for every address, and links need one", where="--host", fix=fix)
    if login is None and not address.is_loopback:
        raise InputError(
            "the servers would be open to everyone who reaches this machine",
            where=f"--host {host}",
            fix=f"set {USERNAME} and {PASSWORD} in the environment: both servers then ask for them",
        )
    return login


def _logged_in(stack: Stack, mlflow: Child, children: list[Child], stop: threading.Event) -> bool:
    """Whether MLflow lets the login in; False if told to stop.

    MLflow takes its administrator's password from the environment only when it makes its users' table.

    Raises:
        InputError: it refuses.
    """
    if stack.login is None:
        return True
    url = f"{stack.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
    headers = mlflow_authorization(stack.for_clients())
    if not _wait(mlflow, lambda: http_status(url, headers) > 0, children, stop):
        return False
    if http_status(url, headers) == 401:
        raise InputError(
            f"MLflow knows {stack.login.username} with another password, or not at all",
            where=PASSWORD,
            fix="start with the former login; docs/operations.md (Authentication) says how to change it",
        )
    return True


def _checked_store(option: str) -> str:
    """The address of the store that runs will use, probed; "" where none is given."""
    store = option or os.environ.get(DEFAULT_STORE, "")
    if not store:
        return ""
    from tasks.storage import open_store

    opened = open_store(store)
    opened.probe()
    return str(opened.uri)


def _port(port: int, option: str, host: str = "127.0.0.1") -> int:
    if not 0 <= port < 65536:
        raise InputError(f"{port} is no port", where=option, fix="give one from 1024 to 65535, or 0 for a free one")
    try:
        in_use = port > 0 and taken(port, host)
    except OSError as error:
        raise InputError(
            f"port {port} of {host} cannot be listened on: {error.strerror}",
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


def _remember(stack: Stack, *, ready: bool) -> None:
    """Note what runs here, for `cdpo run` to join once it is ready and for a successor to clear away; no secrets."""
    environment = stack.for_clients()
    shared = {name: environment[name] for name in SHARED if environment.get(name)}
    state = {name: value for name, value in shared.items() if without_secrets(value) == value}
    partial = stack.home / f".{STATE}.partial"
    partial.write_text(json.dumps({"pid": os.getpid(), "marker": stack.marker, "ready": ready, **state}))
    partial.replace(stack.home / STATE)


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

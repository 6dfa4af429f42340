"""The Prefect server of one command: started while the command still checks, ended with it.

Prefect would start the same server by itself at the first flow, after importing all of it into this process, and wait.
Started here it is ready by then, which saves seconds of every run, and one that dies is started again.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from pathlib import Path

from cdpo_core.errors import CdpoError
from flows.page_guard import HOSTS, ORIGINS
from flows.prefect_server import COMMAND as PREFECT_SERVER
from flows.processes import Child, free_port, http_json, tail
from tasks.environment import TEMPORARY_PREFECT

log = logging.getLogger(__name__)

ADDRESS = "PREFECT_API_URL"
READY_SECONDS = 120
LOOK_SECONDS = 1.0


def start_prefect_server(folder: Path) -> None:
    """Start a Prefect server for this process, unless the user's settings name one; returns before it is ready.

    Args:
        folder: of its log; must exist.
    """
    from prefect.settings import PREFECT_API_URL

    global _own
    if PREFECT_API_URL.value():
        return
    _own = _Server(folder / f"prefect-{os.getpid()}.log")
    # Prefect sends the last logs and events when the interpreter ends. What is registered first ends last.
    atexit.register(_own.end)
    _use(_own.address)


def is_own() -> bool:
    """Whether Prefect's server is one that this process started for itself."""
    from prefect.settings import PREFECT_API_URL

    return _own is not None and PREFECT_API_URL.value() == _own.address


def wait_until_ready() -> None:
    """Wait for the server of this process, if it has one.

    Raises:
        CdpoError: it does not start.
    """
    if _own is None:
        return
    deadline = time.monotonic() + READY_SECONDS
    while http_json(f"{_own.address}/health") is None:
        if time.monotonic() > deadline:
            what = f"Prefect's server did not start\n{tail(_own.log)}"
            raise CdpoError(what, where=str(_own.log), fix="read its log")
        time.sleep(0.05)


def _use(address: str) -> None:
    """Let Prefect use the server, in this process and its children.

    Without heartbeats: nobody on such a server would miss them, and each flow waits a second for its own to end.
    """
    from prefect import context
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY

    os.environ[ADDRESS] = address
    context.refresh_global_settings_context()
    root = context.GLOBAL_SETTINGS_CONTEXT
    settings = root.settings.copy_with_update({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
    context.GLOBAL_SETTINGS_CONTEXT = context.SettingsContext(profile=root.profile, settings=settings)


class _Server:
    """The server's process, started again on the same port and database when it dies before its end."""

    def __init__(self, log_file: Path) -> None:
        self.log, self._port = log_file, free_port()
        self.address = f"http://127.0.0.1:{self._port}/api"
        os.environ[TEMPORARY_PREFECT] = str(log_file)
        self._process = self._started()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._restart_when_dead, daemon=True)
        self._watch.start()

    def end(self) -> None:
        """End the process."""
        self._stop.set()
        self._watch.join()
        self._process.end()

    def _restart_when_dead(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            if self._process.poll() is not None:
                log.warning("Prefect's server of this command ended with code %s: started again", self._process.poll())
                self._process = self._started()

    def _started(self) -> Child:
        command = [*PREFECT_SERVER, "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--log-level", "error", "--lifespan", "on"]
        # As Prefect starts its own: no pages, and no services that only a lasting server needs.
        own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        elsewhere = (ADDRESS, TEMPORARY_PREFECT, HOSTS, ORIGINS)
        environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
        return Child("Prefect's server", command, {**environment, **own}, self.log, ends_with_parent=True)


_own: _Server | None = None

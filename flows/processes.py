"""Child processes that are ended for certain: each in a group of its own, all known by a mark they inherit."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

MARKER = "CDPO_UP"
GRACE_SECONDS = 10.0
# Asks the kernel (Linux) to kill this process when its parent dies, then becomes the command.
WITH_PARENT = """
import ctypes, os, signal, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """A process in its own session, its output in a log file.

    Args:
        ends_with_parent: on Linux, also kill it when this process is killed and cannot end it (the command's own
            process; what it started in turn is not).

    Attributes:
        name: what messages call it.
        log: where its output goes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        *,
        ends_with_parent: bool = False,
    ) -> None:
        self.name, self.log = name, log
        prefix = [sys.executable, "-ISc", WITH_PARENT, str(os.getpid())] if ends_with_parent else []
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [*prefix, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.poll()

    def end(self, grace: float = GRACE_SECONDS) -> None:
        """End it and all its descendants: politely, and after `grace` seconds by force."""
        try:
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        _end(family, grace)
        self._process.wait()


def end_all(children: Sequence[Child], marker: str) -> int:
    """End the children in this order, then whatever else carries the mark; returns how many are left."""
    for child in children:
        child.end()
    end_marked(marker)
    return len(_marked(marker))


def end_marked(marker: str) -> int:
    """End every process of this user that inherited the mark, wherever it hangs; returns how many there were."""
    found = _marked(marker)
    _end(found, GRACE_SECONDS)
    return len(found)


def _marked(marker: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARKER) == marker:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return [process for process in found if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _end(processes: Sequence[psutil.Process], grace: float) -> None:
    # psutil knows a process by its pid and its start, so a pid used again is never signalled.
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                process.send_signal(number)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        deadline = time.monotonic() + (grace if number == signal.SIGTERM else GRACE_SECONDS)
        while any(map(_runs, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        processes = [process for process in processes if _runs(process)]
        if not processes:
            return


def taken(port: int, host: str = "127.0.0.1") -> bool:
    """Whether something on this machine listens on the port of this address.

    Raises:
        OSError: it cannot be listened on for another reason.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False


def free_port() -> int:
    """A port nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_json(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
    """The answer of a server on this machine, parsed if it is JSON; None if there is none (yet)."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json", **(headers or {})})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            text = answer.read().decode()
    except (OSError, HTTPException):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def http_status(url: str, headers: Mapping[str, str]) -> int:
    """The status of a server's answer on this machine; 0 if there is none (yet)."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=dict(headers)), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return 0


def tail(path: Path, lines: int = 6) -> str:
    """The last lines of a log, indented."""
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  | {line[:160]}" for line in [line for line in text if line.strip()][-lines:])

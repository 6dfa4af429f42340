"""Real servers that a test kills and starts again on the same port with what they had stored, and an S3 that fails."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers_s3 import free_port

from flows.prefect_server import COMMAND as PREFECT_SERVER

READY_SECONDS = 240
HOP_HEADERS = {"connection", "transfer-encoding", "expect", "keep-alive"}


class Restarted:
    """A server in a process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], address: str, health: str, log: Path) -> None:
        self.address, self.log = address, log
        self._command, self._environment, self._health = command, environment, health
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_healthy():
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """`kill -9`, the server and whatever it started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def is_healthy(self) -> bool:
        """Whether it answers."""
        try:
            urllib.request.urlopen(self._health, timeout=5).close()
        except OSError:
            return False
        return True

    def away(self, seconds: float) -> None:
        """Kill it, and start it again after a while."""
        self.kill()
        time.sleep(seconds)
        self.start()


def restarted_mlflow(folder: Path, empty_database: Path) -> Restarted:
    """An MLflow server with its database and files in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_database, folder / "mlflow.db")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/files"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = f"http://127.0.0.1:{port}"
    return Restarted(command, environment, address, f"{address}/health", folder / "log")


def restarted_prefect(folder: Path) -> Restarted:
    """A Prefect server with its database in the folder; its address is the API's."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [*PREFECT_SERVER, "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    api = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(folder), "PREFECT_API_URL": api, "PREFECT_SERVER_UI_API_URL": api}
    environment.pop("PREFECT_API_DATABASE_CONNECTION_URL", None)
    environment.pop("PREFECT_SERVER_DATABASE_CONNECTION_URL", None)
    return Restarted(command, environment, api, f"{api}/health", folder / "log")


class FailingS3:
    """A proxy before an S3 server that can be away, slow, and fail or lose answers at random.

    Attributes:
        address: the proxy's own.
        share: of requests that it answers itself, by HTTP 503.
        losing: share of requests whose answer never arrives: the server did what it was asked, the connection is cut.
        pause: seconds that each answer takes longer.
        parts_before_away: after this many parts of large uploads it is away for `away_seconds`; -1 is never.
        failed, lost, cut: how many requests it failed, whose answers it lost, and that came while it was away.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.failed = self.lost = self.cut = 0
        self.share = self.losing = self.pause = 0.0
        self.parts_before_away, self.away_seconds = -1, 2.0
        self._away = False
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        proxy, host = self, urlsplit(target).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _relay(self) -> None:
                proxy._relay(self, host)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _relay  # noqa: N815

            def log_message(self, *_: object) -> None:
                """A proxy says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def away(self, seconds: float) -> None:
        """Cut every connection for a while."""
        self._away = True
        time.sleep(seconds)
        self._away = False

    def close(self) -> None:
        """End the proxy."""
        self._server.shutdown()
        self._server.server_close()

    def _relay(self, request: BaseHTTPRequestHandler, host: str) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fails, loses = self._fate("partNumber=" in request.path and request.command == "PUT")
        time.sleep(self.pause)
        if self._away:
            self.cut += 1
            request.close_connection = True
            return
        if fails:
            request.send_response(503)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        upstream = HTTPConnection(host, timeout=60)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP_HEADERS}
        upstream.request(request.command, request.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if loses:
            request.close_connection = True
            return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in {*HOP_HEADERS, "content-length", "date", "server"}:
                request.send_header(name, value)
        length = answer.getheader("Content-Length") if request.command == "HEAD" else str(len(content))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def _fate(self, is_part: bool) -> tuple[bool, bool]:
        """Whether a request fails, and whether its answer is lost."""
        with self._lock:
            drawn = self._random.random()
            fails, loses = drawn < self.share, self.share <= drawn < self.share + self.losing
            self.failed, self.lost = self.failed + fails, self.lost + loses
            if is_part and self.parts_before_away == 0:
                threading.Thread(target=self.away, args=(self.away_seconds,), daemon=True).start()
                self._away = True
            self.parts_before_away -= is_part
            return fails, loses


@pytest.fixture
def failing_s3(s3_endpoint: str, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingS3]:
    """A proxy before the S3 server of the session, to which the environment points; the store is at `s3_uri`."""
    proxy = FailingS3(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    try:
        yield proxy
    finally:
        proxy.close()

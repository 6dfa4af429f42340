"""Where the acceptance runs happen: `cdpo` in processes of its own, each run timed, kept and never repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CDPO = [sys.executable, "-m", "flows.cli"]
# What the caller's shell says about servers and state must not reach the runs.
FOREIGN = ("CDPO_HOME", "PREFECT_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "CDPO_DEBUG")


@dataclass(frozen=True)
class Ran:
    """One finished command.

    Attributes:
        code: its exit code.
        seconds: wall-clock time.
        cpu_seconds: processor time of the process and of the children it waited for.
        result: what `--json` wrote, {} without it.
        output: what it printed, both streams.
    """

    command: list[str]
    code: int
    seconds: float
    cpu_seconds: float
    result: dict[str, Any] = field(default_factory=dict)
    output: str = ""


class Lab:
    """A folder of runs; what is in it already is not run again.

    Args:
        work: made if missing. `homes/` holds the runs' state folders, `done/` a record of each finished run.
        data: the preference file of the run on real text; need not exist.
    """

    def __init__(self, work: Path, data: Path) -> None:
        self.work, self.data = work.resolve(), data.resolve()
        for folder in ("homes", "done", "logs"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)

    def home(self, name: str) -> Path:
        """A state folder (CDPO_HOME)."""
        return self.work / "homes" / name

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure()` returned, now or when this lab first asked for it under that name."""
        path = self.work / "done" / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        found = measure()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=2, ensure_ascii=False))
        partial.replace(path)
        return found

    def run(
        self, name: str, arguments: Sequence[str], home: str, *, fresh: bool = False, more: Mapping[str, str] = {}
    ) -> Ran:
        """`cdpo ARGUMENTS --json FILE` to its end, once for each name.

        Args:
            name: of the record.
            home: the state folder's name.
            fresh: begin with an empty state folder, so that an earlier try that was broken off does not shorten it.
            more: further environment variables.
        """

        def measure() -> dict[str, Any]:
            if fresh:
                shutil.rmtree(self.home(home), ignore_errors=True)
            return asdict(self.finish(*self.start(name, arguments, home, more)))

        return Ran(**self.once(name, measure))

    def start(
        self, name: str, arguments: Sequence[str], home: str, more: Mapping[str, str] = {}
    ) -> tuple[str, subprocess.Popen[bytes], float]:
        """Start `cdpo ARGUMENTS --json FILE` in a process group of its own."""
        self.home(home).mkdir(parents=True, exist_ok=True)
        self._result(name).unlink(missing_ok=True)
        command = [*CDPO, *arguments, "--json", str(self._result(name))]
        with self._log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environment(home, more),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return name, process, time.monotonic()

    def finish(self, name: str, process: subprocess.Popen[bytes], started: float) -> Ran:
        """Wait for a started command."""
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = code = os.waitstatus_to_exitcode(status)
        result = json.loads(self._result(name).read_text()) if self._result(name).exists() else {}
        output = self._log(name).read_text(errors="replace")
        words = ["cdpo", *[str(word) for word in process.args[len(CDPO) :]]]  # type: ignore[index]
        return Ran(words, code, round(seconds, 2), round(usage.ru_utime + usage.ru_stime, 2), result, output)

    def environment(self, home: str, more: Mapping[str, str] = {}) -> dict[str, str]:
        """The environment of every command: this one, without servers, with a state folder."""
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        return {**kept, "CDPO_HOME": str(self.home(home)), "PYTHONUNBUFFERED": "1", **more}

    def _result(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.result.json"

    def _log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.log"


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """`kill -9` the whole process group, and wait for its leader."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server in another process, and the environment that reaches it; it holds an empty bucket `accept`."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    reach = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet)
    try:
        wait_for(f"{endpoint}/moto-api/data.json", 60)
        os.environ.update(reach)
        import boto3

        boto3.session.Session().client("s3").create_bucket(Bucket="accept")
        yield reach
    finally:
        server.kill()
        server.wait()
        for name in reach:
            os.environ.pop(name, None)


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(url: str, seconds: float) -> None:
    """Wait until a server answers."""
    import urllib.request

    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

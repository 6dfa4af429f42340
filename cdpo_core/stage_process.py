"""One stage in a process of its own: its memory goes with it, and its crash takes no run along.

    python -m cdpo_core.stage_process CHANNEL PARENT < request.json

The parent (`compute_apart`) sends one line, {compute, slice, inputs, out, runtime, level}, and keeps the pipe open; the
child answers on the descriptor CHANNEL in lines of JSON: progress, log records, and last how it ended. It computes the
same bytes as the same stage in the parent would.

Neither outlives the other: whatever interrupts the parent kills the child's whole group, and a child whose parent was
killed (the pipe ends; on Linux the kernel says so too) kills its own.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from cdpo_core import errors
from cdpo_core.errors import CdpoError

if TYPE_CHECKING:
    from cdpo_core.stages import Compute, Runtime, Slice

REPORT_SECONDS = 0.1
PR_SET_PDEATHSIG = 1
LAST_WORDS = 2000


def compute_apart(
    compute: Compute, config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime, what: str
) -> float:
    """Run a stage's function in a child process and wait for it.

    Args:
        compute: the function, named by its module and qualified name, by which the child imports it.
        config, inputs, out, runtime: its arguments; progress is reported to `runtime.progress` here.
        what: the stage's name, for messages.

    Returns:
        Processor seconds of the child.

    Raises:
        CdpoError: the child died without a word; what the stage raised otherwise, with its traceback as a note.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as words, open(reading, encoding="utf-8") as channel:
        command = [sys.executable, "-m", __name__, str(writing), str(os.getpid())]
        try:
            child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=words,
                stderr=words,
                pass_fds=(writing,),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            end = _attend(child, channel, _request(compute, config, inputs, out, runtime), runtime)
            code = child.wait()
        finally:
            _end(child)
        if end is None:
            raise _died(what, code, words)
    if "error" in end:
        raise _rebuilt(end["error"])
    return float(end["cpu_seconds"])


def _request(compute: Compute, config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> str:
    machine = {name: getattr(runtime, name) for name in ("device", "threads", "micro_batch")}
    return json.dumps(
        {
            "compute": [compute.__module__, compute.__qualname__],
            "slice": config.as_dict(),
            "inputs": {name: str(path) for name, path in inputs.items()},
            "out": str(out),
            "runtime": {**machine, "scratch": None if runtime.scratch is None else str(runtime.scratch)},
            "level": logging.getLogger("cdpo_core").getEffectiveLevel(),
        }
    )


def _attend(child: subprocess.Popen[bytes], channel: IO[str], request: str, runtime: Runtime) -> dict[str, Any] | None:
    """Pass on what the child says until it says no more; returns how it ended, None if it did not say."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(f"{request}\n".encode())
        child.stdin.flush()
    end = None
    for line in channel:
        said = json.loads(line)
        if "progress" in said:
            runtime.progress(*said["progress"])
        elif "log" in said:
            name, level, message = said["log"]
            logging.getLogger(name).log(level, "%s", message)
        else:
            end = said
    return end


def _end(child: subprocess.Popen[bytes]) -> None:
    """No process of the child's group is left, whatever interrupted the parent."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()


def _died(what: str, code: int, words: IO[bytes]) -> CdpoError:
    how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    words.seek(0, os.SEEK_END)
    words.seek(max(0, words.tell() - LAST_WORDS))
    last = words.read().decode(errors="replace").strip().splitlines()[-3:]
    return CdpoError(
        "\n".join([f"the process that computed the stage {what} {how}", *(f"  | {line[:160]}" for line in last)]),
        fix="run the same command again: it continues from the last checkpoint; if memory ran out, set "
        "compute.micro_batch lower",
    )


def _rebuilt(error: Mapping[str, Any]) -> BaseException:
    """The exception as it was, where its class can be had by name; else a RuntimeError that says so."""
    own = getattr(errors, error["class"], None) if error["module"] == errors.__name__ else None
    known = getattr(builtins, error["class"], None) if error["module"] == "builtins" else None
    raised: BaseException
    if own is not None:
        raised = own(error["what"], where=error["where"], fix=error["fix"])
    else:
        raised = RuntimeError(f"{error['module']}.{error['class']}: {error['text']}")
        if isinstance(known, type) and issubclass(known, Exception):
            with contextlib.suppress(TypeError):
                raised = known(*error["args"])
    raised.add_note(f"In the process of the stage:\n{error['traceback']}")
    return raised


def _described(error: BaseException) -> dict[str, Any]:
    record: dict[str, Any] = {
        "module": type(error).__module__,
        "class": type(error).__qualname__,
        "text": str(error),
        "args": [item if isinstance(item, str | int | float | None) else str(item) for item in error.args],
        "traceback": "".join(traceback.format_exception(error)),
    }
    if isinstance(error, CdpoError):
        record |= {"what": error.what, "where": error.where, "fix": error.fix}
    return record


class _Speaker(logging.Handler):
    """Says progress and log records on the channel, one line of JSON each."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        os.set_inheritable(descriptor, False)
        self._channel = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115
        self._said: dict[str, float] = {}

    def say(self, **message: Any) -> None:
        """One message; a parent that no longer listens is about to kill this process."""
        with self.lock or contextlib.nullcontext(), contextlib.suppress(BrokenPipeError):
            self._channel.write(json.dumps(message) + "\n")
            self._channel.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """The first, the last, and no more than ten a second of those between."""
        now = time.monotonic()
        if done >= total or now - self._said.get(what, 0.0) >= REPORT_SECONDS:
            self._said[what] = now
            self.say(progress=[what, done, total])

    def emit(self, record: logging.LogRecord) -> None:
        """A log record, its message put together."""
        self.say(log=[record.name, record.levelno, self.format(record)])


def _compute(request: Mapping[str, Any], speaker: _Speaker) -> None:
    from cdpo_core.machine import call
    from cdpo_core.stages import Runtime, Slice

    machine = dict(request["runtime"])
    scratch = machine.pop("scratch")
    runtime = Runtime(**machine, scratch=None if scratch is None else Path(scratch), progress=speaker.progress)
    inputs = {key: Path(path) for key, path in request["inputs"].items()}
    module, name = request["compute"]
    call((module, name), Slice(request["slice"]), inputs, Path(request["out"]), runtime)


def _die_with(parent: int) -> None:
    """Let the kernel, where it can, and the end of the request's pipe end this process with its parent."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _end_group()

    def wait_for_the_end() -> None:
        while os.read(0, 1):
            pass
        _end_group()

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def _end_group() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("killed")


def main() -> None:
    """Compute the stage that one line of standard input asks for; how it ended is said on the channel."""
    speaker = _Speaker(int(sys.argv[1]))
    request = json.loads(_first_line())
    _die_with(int(sys.argv[2]))
    logging.basicConfig(level=logging.WARNING, handlers=[speaker])
    logging.getLogger("cdpo_core").setLevel(request["level"])
    logging.captureWarnings(True)
    try:
        _compute(request, speaker)
    except BaseException as error:
        speaker.say(error=_described(error))
        raise SystemExit(1) from error
    speaker.say(cpu_seconds=sum(os.times()[:4]))


def _first_line() -> bytes:
    """The request; read without a buffer, whose lock would be held by whoever waits for the pipe's end."""
    line = b""
    while not line.endswith(b"\n") and (block := os.read(0, 1 << 16)):
        line += block
    return line


if __name__ == "__main__":
    main()

"""Stage functions for test_stage_process.py, where a process of their own can import them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from cdpo_core.errors import InputError
from cdpo_core.stages import Runtime, Slice


class Odd(Exception):
    """An exception that no parent knows."""


def say(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Writes what it was given, burns some processor time and says something on every channel."""
    print("said to nobody")
    logging.getLogger("cdpo_core.said").info("so far %d", 1)
    warnings.warn("look out", stacklevel=1)
    for done in range(3):
        runtime.progress("said", done, 2)
    started = time.process_time()
    while time.process_time() < started + 0.3:
        pass
    given = [os.getpid(), runtime.threads, str(runtime.scratch), str(inputs.get("text", ""))]
    (out / "given.txt").write_text(repr([*given, config.as_dict()]))


def fail(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Raises the error that its slice names, or dies."""
    if config.how == "input":
        raise InputError("the file is empty", where="here", fix="fill it")
    print("the last words", flush=True)
    if config.how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Sleeps for ever beside a child of its own, once it has said who they are."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert runtime.scratch is not None
    partial = runtime.scratch / "pids.partial"
    partial.write_text(f"{os.getpid()} {child.pid}")
    partial.rename(runtime.scratch / "pids")
    time.sleep(600)

"""How a command begins: joined to running servers, its libraries' logs in a file."""

from __future__ import annotations

import atexit
import gc
from pathlib import Path

from flows.terminal import log_to_file
from tasks.environment import cdpo_home


def begin(command: str) -> Path:
    """Join the servers of a running `cdpo up`, and send the libraries' logs to a file.

    Args:
        command: the log file's name begins with it.

    Returns:
        The log file.
    """
    from flows.up import join_running

    # Looking for garbage among all that was imported takes the interpreter two seconds at its end.
    atexit.register(gc.freeze)
    join_running()
    return log_to_file(cdpo_home() / "logs", command)

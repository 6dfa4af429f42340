"""The scratch folder of one unfinished stage: held by one process of a machine at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


@contextmanager
def held_folder(folder: Path, what: str) -> Iterator[Path]:
    """Make a folder and hold it alone, waiting for a process of this machine that holds it already.

    The operating system lets go of it when the holder dies, however it dies. The holder may remove
    the folder before letting go; whoever waits then makes a new one.

    Args:
        folder: the folder.
        what: what the holder computes, for the message of whoever waits.
    """
    said = False
    while (descriptor := _try_to_hold(folder)) is None:
        if not said:
            log.info("another process computes %s: waiting for it", what)
            said = True
        time.sleep(POLL_SECONDS)
    try:
        yield folder
    finally:
        os.close(descriptor)


def _try_to_hold(folder: Path) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:  # the holder has just removed the folder
        return None
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock may be on a file that the last holder has removed.
        if os.fstat(descriptor).st_ino == lock.stat().st_ino:
            return descriptor
    os.close(descriptor)
    return None


def remove_unless_held(folder: Path) -> bool:
    """Remove a scratch folder that no process of this machine holds; whether it is gone."""
    if not folder.is_dir():
        return True
    descriptor = _try_to_hold(folder)
    if descriptor is None:
        return False
    try:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
    return not folder.exists()

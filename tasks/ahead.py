"""Stages computed before the run asks for them, on a core that it leaves idle.

A testbed's exact judge needs nothing of the rounds: it is computed while they train. The stage is the same, its key and
its bytes too; it only runs in a process of its own, beside the run, which takes over its result when it comes there.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from cdpo_core.config import ComputeConfig
from cdpo_core.stages import Progress, StageResult

log = logging.getLogger(__name__)

REPORT_SECONDS = 0.5

_begun: dict[tuple[str, str], StageAhead] = {}


class StageAhead:
    """A stage at work on a thread, which waits for the stage's process.

    The thread ends with the interpreter, and the process with the thread: an interrupted run waits for neither.
    """

    def __init__(self, compute: Callable[[Progress], StageResult]) -> None:
        self._result: StageResult | None = None
        self._steps = (0, 1)
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(compute,), daemon=True, name="ahead").start()

    def wait(self, report: Callable[[int, int], None]) -> StageResult | None:
        """Its result, when it has ended; None where it failed, so that it is to be computed as if never begun.

        Args:
            report: told how many of how many steps are done, meanwhile.
        """
        while not self._ended.wait(REPORT_SECONDS):
            report(*self._steps)
        return self._result

    def _run(self, compute: Callable[[Progress], StageResult]) -> None:
        try:
            self._result = compute(self._progress)
        except BaseException as error:
            log.info("a stage that was begun ahead failed, and is computed in its turn: %s", error)
        finally:
            self._ended.set()

    def _progress(self, what: str, done: int, total: int) -> None:
        self._steps = done, total


def core_left_idle(compute: ComputeConfig) -> bool:
    """Whether a run on this machine leaves a core to others, and does not share a GPU's memory with them."""
    import torch

    if compute.device == "cuda" or (compute.device == "auto" and torch.cuda.is_available()):
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 < compute.threads < cores


def begin(store: str, key: str, compute: Callable[[Progress], StageResult]) -> None:
    """Begin a stage, unless this process began it already.

    Args:
        store: the store's address.
        key: the stage's key.
        compute: computes it, in a process of its own, and reports its progress.
    """
    if (store, key) not in _begun:
        _begun[store, key] = StageAhead(compute)


def take(store: str, key: str) -> StageAhead | None:
    """The stage of this key where it was begun; it is handed out once."""
    return _begun.pop((store, key), None)

"""A run whose worker was killed, or no longer hears of cancels, goes on and ends itself when it is cancelled.

Prefect's worker and the supervisor of a run stop listening for cancels when the server was away for half a minute
(three polls in a row that fail, prefect._internal.observers); from then on nobody else would end the run.
"""

from __future__ import annotations

import contextvars
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.states import Cancelled

from tasks.prefect_patience import client_asking_once

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State

log = logging.getLogger(__name__)

POLL_SECONDS, CANCEL_SECONDS, GRACE_SECONDS = 1.0, 5.0, 20.0
DEAF_SECONDS = 20.0
"""A worker that hears of a cancel has ended the run long before."""
# Prefect's worker sets it for the process of a run.
OWN_RUN = "PREFECT__FLOW_RUN_ID"


def outlive_the_worker(run: FlowRun) -> None:
    """Let a run that a worker of this machine started go on when the worker is killed; again changes nothing.

    Args:
        run: the flow run of this process; nothing happens when no worker started it.
    """
    if os.environ.get(OWN_RUN) != str(run.id):
        return
    # Its output goes through the worker; the console would end the process at the first line nobody reads.
    for handler in _consoles():
        handler.console.on_broken_pipe = _say_no_more  # type: ignore[method-assign]
    if not any(thread.name == __name__ for thread in threading.enumerate()):
        watch = contextvars.copy_context().run
        threading.Thread(target=watch, args=(_watch, run, os.getppid()), name=__name__, daemon=True).start()


def _consoles() -> set[PrefectConsoleHandler]:
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {item for logger in loggers for item in logger.handlers if isinstance(item, PrefectConsoleHandler)}


def _say_no_more() -> None:
    """Send standard output and error to nowhere, for this process and whatever it starts."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _watch(run: FlowRun, worker: int) -> None:
    looked = heard = time.monotonic()
    while os.getppid() == worker:
        time.sleep(POLL_SECONDS)
        if time.monotonic() - looked < CANCEL_SECONDS:
            continue
        looked = time.monotonic()
        heard = heard if _is_cancelled(run) else looked
        if looked - heard >= DEAF_SECONDS:
            _cancel(run, "its worker did not hear of it")
    _say_no_more()
    log.warning("the worker of this run is gone: the run goes on without it")
    while not _is_cancelled(run):
        time.sleep(CANCEL_SECONDS)
    _cancel(run, "its worker is gone")


def _is_cancelled(run: FlowRun) -> bool:
    """Whether somebody cancelled the run; False when Prefect's server does not say."""
    with suppress(Exception), client_asking_once() as client:
        state = client.read_flow_run(run.id).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


def _cancel(run: FlowRun, why: str) -> None:
    """End this process as the worker would: asked first, after a while by force."""
    state: State[None] = Cancelled(message=f"Cancelled by the run itself: {why}.")
    with suppress(Exception), get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, state, force=True)
    # What has ended already is not called Crashed when the signal comes.
    run.state, run.state_type, run.state_name = state, state.type, state.name
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

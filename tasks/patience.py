"""How long to wait for a server that does not answer.

A command that starts while a server is away says so within 30 seconds: whoever typed it is there. A run that a worker
started, and one that has seen the server before (a sweep's later child), waits some minutes: nobody would type it
again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from cdpo_core.errors import InputError, StoreUnavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

START_SECONDS = 180.0
PAUSE_SECONDS = 2.0
# Prefect's worker names the flow run to the process that it starts.
BY_A_WORKER = "PREFECT__FLOW_RUN_ID"

_seen: set[str] = set()


class ServerAway(InputError):
    """A server does not answer now; it may later."""


class StoreAway(StoreUnavailable, ServerAway):
    """The artifact store's server does not answer now; it may later."""


def when_there(server: str, ask: Callable[[], T]) -> T:
    """What a server answers; it is asked again while it is away, if nobody is there to type the command again.

    Args:
        server: its address, by which this process remembers that it was there.
        ask: the question, which raises ServerAway when there is no answer.

    Raises:
        ServerAway: no answer at once, or in START_SECONDS where it is waited for; whatever else `ask` raises.
    """
    is_unattended = BY_A_WORKER in os.environ or server in _seen
    deadline = time.monotonic() + (START_SECONDS if is_unattended else 0.0)
    while True:
        try:
            answer = ask()
        except ServerAway as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("%s; trying again until %.0f s have passed", error.what, START_SECONDS)
            time.sleep(PAUSE_SECONDS)
        else:
            _seen.add(server)
            return answer

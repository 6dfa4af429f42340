"""A Prefect server that goes away in mid-run: the run waits for it, and goes on where it was.

Prefect's client repeats its requests (PREFECT_CLIENT_MAX_RETRIES, see tasks.environment), but only once it has been
connected, and a subflow begins with a client of its own; and it sleeps twice as long each time, up to minutes after
the server is back. So a subflow starts and ends when the server answers, and it starts again when the server went
away just then: its stages are in the store, so nothing is computed twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, SettingsContext, get_settings_context
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES

from tasks.patience import PAUSE_SECONDS

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import Settings

    from tasks.workbench import Workbench

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

OUTAGE_SECONDS = 240.0
"""How long a run waits for a Prefect server that stopped answering."""
GLANCE_SECONDS = 10.0
TRIES = 3


def part(flow: Callable[Concatenate[Workbench, P], T], bench: Workbench, /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What a part of the DAG returns, as a subflow that waits for Prefect's server (see `begun`).

    Args:
        flow: the part; it may run again, since whatever it finished is in the store.
        bench: the experiment's tools, the part's first argument; args, kwargs: its others.
    """
    done = len(bench.results)

    def start() -> T:
        del bench.results[done:]
        return flow(bench, *args, **kwargs)

    return begun(start)


def begun(start: Callable[[], T]) -> T:
    """What a flow returns that is started when Prefect's server is there, and again when it went away just then.

    Args:
        start: calls the flow, which may run again.

    Raises:
        httpx.TransportError: the server did not come back within OUTAGE_SECONDS, or went away TRIES times; whatever
            else the flow raises.
    """
    for left in reversed(range(TRIES)):
        wait_for_server()
        try:
            return start()
        except httpx.TransportError as error:
            if not left:
                raise
            log.warning("Prefect: the server went away, trying again: %s", error)
    raise AssertionError("the last try returns or raises")


def server_error() -> Exception | None:
    """Why Prefect's server does not answer, asked once and for seconds at most; None if it does."""
    with client_asking_once() as client:
        return client.api_healthcheck()


@contextmanager
def client_asking_once() -> Iterator[SyncPrefectClient]:
    """Prefect's client that fails within `GLANCE_SECONDS` when the server does not answer, instead of minutes."""
    with asking_once(), get_client(sync_client=True, httpx_settings={"timeout": GLANCE_SECONDS}) as client:
        yield client


_asking_once: tuple[Settings, Settings] | None = None


@contextmanager
def asking_once() -> Iterator[None]:
    """Within it Prefect's client does not repeat a request that failed.

    Changed settings are all read and checked anew (0.1 s), so they are changed once and kept.
    """
    global _asking_once
    context = get_settings_context()
    if _asking_once is None or _asking_once[0] is not context.settings:
        changed = context.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})
        _asking_once = context.settings, changed
    with SettingsContext(profile=context.profile, settings=_asking_once[1]):
        yield


def ends_when_there(function: Callable[P, T]) -> Callable[P, T]:
    """A flow's function that returns when Prefect's server is there to hear of it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        value = function(*args, **kwargs)
        if FlowRunContext.get() is not None:
            wait_for_server()
        return value

    return call


def wait_for_server() -> None:
    """Wait until Prefect's server answers, OUTAGE_SECONDS at most."""
    deadline, said = time.monotonic() + OUTAGE_SECONDS, False
    while (error := server_error()) is not None and time.monotonic() < deadline:
        if not said:
            log.warning("Prefect: the server does not answer, waiting for it: %s", error)
            said = True
        time.sleep(PAUSE_SECONDS)

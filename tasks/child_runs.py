"""Runs of a deployment below a running flow: started once, found again, waited for, cancelled.

A child's run is fixed by the parent's run and the child's identity (an idempotency key), so a parent that is retried
finds its children again. The Prefect server may be away for minutes meanwhile.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import httpx
from prefect import Task
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType, WorkerStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Pending, Scheduled

from cdpo_core.errors import CdpoError
from tasks.environment import TEMPORARY_PREFECT
from tasks.prefect_records import experiment_tag

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.client.schemas.responses import DeploymentResponse

log = logging.getLogger(__name__)

ALIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
PATIENCE_SECONDS = 1800.0
RETRY_SECONDS = 5.0
POLL_SECONDS = 2.0
WORKER_SECONDS = 60.0
RUNS_A_REQUEST = 100

T = TypeVar("T")


def this_flow_run() -> FlowRun:
    """The run of the flow that is running.

    Raises:
        RuntimeError: called outside a flow.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("no flow is running")
    return context.flow_run


def deployed_with_workers(
    client: SyncPrefectClient, name: str, wait_seconds: float = 0.0
) -> tuple[DeploymentResponse | None, str]:
    """The deployment `flow/name` if its runs are picked up now, else None and why they are not.

    Args:
        wait_seconds: how long a worker may take to come; one that starts together with this run needs a moment.
    """
    if not PREFECT_API_URL.value() or os.environ.get(TEMPORARY_PREFECT):
        return None, "no Prefect server (PREFECT_API_URL is not set)"
    deadline = time.monotonic() + wait_seconds
    while True:
        found, reason = _deployed_now(client, name)
        if found is not None or time.monotonic() >= deadline:
            return found, reason
        time.sleep(POLL_SECONDS)


def _deployed_now(client: SyncPrefectClient, name: str) -> tuple[DeploymentResponse | None, str]:
    try:
        deployment = patiently(lambda: client.read_deployment_by_name(name))
    except ObjectNotFound:
        return None, f"the Prefect server has no deployment {name}"
    pool_name = deployment.work_pool_name
    if deployment.paused or not pool_name:
        return None, f"the deployment {name} " + ("is paused" if deployment.paused else "has no work pool")
    pool = patiently(lambda: client.read_work_pool(pool_name))
    if pool.is_paused:
        return None, f"the work pool {pool_name} is paused"
    if pool.is_push_pool or pool.is_managed_pool:
        return deployment, ""
    workers = patiently(lambda: client.read_workers_for_work_pool(pool_name))
    if not any(worker.status == WorkerStatus.ONLINE for worker in workers):
        return None, f"no worker of the work pool {pool_name} is online"
    return deployment, ""


def patiently(call: Callable[[], T]) -> T:
    """What the call returns, tried again for half an hour while the Prefect server is away.

    Raises:
        CdpoError: it stayed away.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code < 500:
                raise
            if time.monotonic() > deadline:
                raise CdpoError(
                    f"the Prefect server has been away for {PATIENCE_SECONDS / 60:.0f} minutes",
                    where=f"PREFECT_API_URL: {type(error).__name__}",
                    fix="bring it back and retry this run: its children's runs go on and are found again",
                ) from error
            log.warning("the Prefect server is away (%s): trying again", type(error).__name__)
            time.sleep(RETRY_SECONDS)


@dataclass(frozen=True)
class ChildRuns:
    """The runs of one deployment below one flow run.

    Attributes:
        client: of the Prefect server, open.
        deployment: what the children are runs of.
        parent: the flow run they belong to.
        family: what two parents that do the same share; a living child of an ended one of these is taken over.
    """

    client: SyncPrefectClient
    deployment: DeploymentResponse
    parent: FlowRun
    family: str

    def start(self, identity: str, name: str, parameters: Mapping[str, Any]) -> tuple[FlowRun, bool]:
        """The child's run, and whether it was made just now.

        Args:
            identity: of the experiment.
            name: shown in the UI.
            parameters: of the deployment's flow.
        """
        key = f"{self.parent.id}:{identity}"
        mine = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=[key]))
        found = self._first(mine) or self._first(self._living(identity))
        if found is not None:
            return found, False
        return patiently(lambda: self._make(key, identity, name, parameters)), True

    def read(self, ids: Collection[UUID]) -> dict[UUID, FlowRun]:
        """The runs as they are now; one that was deleted is missing."""
        listed = sorted(ids)
        return {
            run.id: run
            for first in range(0, len(listed), RUNS_A_REQUEST)
            for run in self._read_some(listed[first : first + RUNS_A_REQUEST])
        }

    def restart(self, run_id: UUID) -> None:
        """Schedule an ended run anew; one that somebody else has scheduled since is left alone."""

        def call() -> None:
            state = self.client.read_flow_run(run_id).state
            if state is not None and state.is_final():
                again: State[Any] = Scheduled(message=f"Started again by the sweep {self.parent.name}.")
                self.client.set_flow_run_state(run_id, again, force=True)

        patiently(call)

    def cancel(self, ids: Collection[UUID]) -> None:
        """Ask for the runs to be cancelled, whichever of them have not ended; failures are warnings."""
        for run_id in sorted(ids):
            try:
                self.client.set_flow_run_state(run_id, Cancelling(message="Its sweep was cancelled."))
            except (httpx.HTTPError, ObjectNotFound) as error:
                log.warning("the child run %s was not cancelled: %s", run_id, error)

    def parent_is_cancelled(self) -> bool:
        """Whether somebody asked for the parent to be cancelled; False when the server cannot say."""
        try:
            state = self.client.read_flow_run(self.parent.id).state
        except (httpx.HTTPError, ObjectNotFound):
            return False
        return state is not None and (state.is_cancelling() or state.is_cancelled())

    def _make(self, key: str, identity: str, name: str, parameters: Mapping[str, Any]) -> FlowRun:
        # The placeholder in the parent that a nested run hangs on, as Prefect's run_deployment makes it, but with a
        # key of its own, so that a second call finds it.
        placeholder = Task(name=name, fn=lambda: None)
        placeholder.task_key = "cdpo.child"
        task_run = self.client.create_task_run(
            placeholder, self.parent.id, dynamic_key=identity, name=name, state=Pending()
        )
        return self.client.create_flow_run_from_deployment(
            self.deployment.id,
            parameters=dict(parameters),
            state=Scheduled(),
            name=name,
            tags=[experiment_tag(identity), self.family],
            idempotency_key=key,
            parent_task_run_id=task_run.id,
        )

    def _read_some(self, ids: list[UUID]) -> list[FlowRun]:
        some = FlowRunFilter(id=FlowRunFilterId(any_=ids))
        return patiently(lambda: self.client.read_flow_runs(flow_run_filter=some))

    def _living(self, identity: str) -> FlowRunFilter:
        return FlowRunFilter(
            tags=FlowRunFilterTags(all_=[experiment_tag(identity), self.family]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ALIVE)),
        )

    def _first(self, wanted: FlowRunFilter) -> FlowRun | None:
        of_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[self.deployment.id]))
        found = patiently(
            lambda: self.client.read_flow_runs(flow_run_filter=wanted, deployment_filter=of_deployment, limit=1)
        )
        return found[0] if found else None

"""Attempts at a run that a kill ended: which process works on a run, whether it is gone, and what it left running."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

log = logging.getLogger(__name__)

UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]


def this_process() -> dict[str, Any]:
    """Labels that name the process a run is worked on by."""
    import psutil

    return {"cdpo.host": platform.node(), "cdpo.pid": os.getpid(), "cdpo.started": psutil.Process().create_time()}


def is_dead(labels: Mapping[str, Any]) -> bool:
    """Whether the process that a run's labels name is certainly gone: it was on this host and no longer is."""
    import psutil

    if labels.get("cdpo.host") != platform.node():
        return False
    try:
        process = psutil.Process(int(labels["cdpo.pid"]))
        # A pid is used again after a while; the process it names must have started when the run's did.
        is_same = abs(process.create_time() - float(labels["cdpo.started"])) < 1.0
        return not is_same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_dead_runs(client: SyncPrefectClient, tag: str, successor: FlowRun) -> None:
    """Mark dead runs with a tag Crashed, whoever said so of the run itself before: with all their parts.

    Args:
        client: of the server.
        tag: of the experiment.
        successor: the run that continues them.
    """
    of_type = FlowRunFilterStateType(any_=[*UNFINISHED, StateType.CRASHED])
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), state=FlowRunFilterState(type=of_type))
    found = client.read_flow_runs(flow_run_filter=wanted)
    dead = [run for run in found if run.id != successor.id and is_dead(run.labels)]
    words = f"Its process was killed; the run {successor.name} ({successor.id}) continues it."
    for run in dead:
        if run.state_type in UNFINISHED:
            log.info("the killed Prefect run %s is marked Crashed; this run continues it", run.name)
    _crash(client, [*dead, *_below(client, dead)], Crashed(message=words))


def end_former_attempt(client: SyncPrefectClient, run: FlowRun) -> None:
    """Mark what a former attempt at this run left running as Crashed, unless its process still works on this machine.

    Args:
        client: of the server.
        run: as the server knew it before this attempt was announced.
    """
    lives_here = run.labels.get("cdpo.host") == platform.node() and not is_dead(run.labels)
    if run.run_count < 2 or lives_here:
        return
    words = f"Its process was killed; attempt {run.run_count} of this run continues it."
    below = _below(client, [run])
    _crash(client, below, Crashed(message=words), tasks_of=[run, *below])


def _crash(
    client: SyncPrefectClient, runs: Sequence[FlowRun], state: State[Any], tasks_of: Sequence[FlowRun] | None = None
) -> None:
    """The unfinished ones of these runs, and all unfinished tasks of these (or other) runs."""
    ids = [run.id for run in (runs if tasks_of is None else tasks_of)]
    for first in range(0, len(ids), 100):
        of_runs = FlowRunFilter(id=FlowRunFilterId(any_=ids[first : first + 100]))
        unfinished = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=UNFINISHED)))
        for task_run in client.read_task_runs(flow_run_filter=of_runs, task_run_filter=unfinished):
            client.set_task_run_state(task_run.id, state, force=True)
    for run in runs:
        if run.state_type in UNFINISHED:
            client.set_flow_run_state(run.id, state, force=True)


def _below(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> list[FlowRun]:
    """The runs nested in these, at any depth; those of deployments have processes of their own, which live on."""
    parents: list[UUID] = [run.id for run in runs]
    found: list[FlowRun] = []
    while parents:
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=parents))
        children = [run for run in client.read_flow_runs(flow_run_filter=below) if run.deployment_id is None]
        found.extend(children)
        parents = [run.id for run in children]
    return found

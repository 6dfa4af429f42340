"""The work pools: made once, and then left as the operator set them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from cdpo_core.errors import InputError
from flows.pools import POOL, SWEEP_POOL
from tasks.environment import HEARTBEAT

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool

PROCESS = "process"
WORDS = {
    POOL: "Experiments and comparisons. Its concurrency limit is how many run at once, over all workers.",
    SWEEP_POOL: "Parents of sweeps: they wait for their experiments, which run in the other pool.",
}


def make_pools(client: SyncPrefectClient, *, concurrency: int = 0, working_folder: str = "") -> None:
    """Make the work pools that are missing; what an operator changed of one that is there stays.

    Args:
        client: of the Prefect server.
        concurrency: how many experiments run at once over all workers; 0 leaves the limit as it is (none at first).
        working_folder: where runs start, so that relative paths in their parameters mean something; "" leaves it as
            it is (at first a folder of its own for each run).

    Raises:
        InputError: a pool is there and of another type.
    """
    for name, words in WORDS.items():
        _make_pool(client, name, words, working_folder)
    if concurrency:
        from prefect.client.schemas.actions import WorkPoolUpdate

        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=concurrency))


def _make_pool(client: SyncPrefectClient, name: str, words: str, working_folder: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = _with_heartbeats(_starting_in(working_folder, ProcessWorker.get_default_base_job_template()))
    try:
        client.create_work_pool(WorkPoolCreate(name=name, description=words, type=PROCESS, base_job_template=template))
    except ObjectAlreadyExists:
        found = client.read_work_pool(name)
        _check_type(found)
        template = _starting_in(working_folder, found.base_job_template)
        if template != found.base_job_template:
            client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _check_type(pool: WorkPool) -> None:
    if pool.type != PROCESS:
        raise InputError(
            f"the work pool {pool.name} is there and of type {pool.type}, not {PROCESS}",
            where="work pools of the Prefect server",
            fix=f"delete it (prefect work-pool delete {pool.name}): its type cannot be changed",
        )


def _starting_in(folder: str, template: dict[str, Any]) -> dict[str, Any]:
    template = copy.deepcopy(template)
    if folder:
        template["variables"]["properties"]["working_dir"]["default"] = folder
    return template


def _with_heartbeats(template: dict[str, Any]) -> dict[str, Any]:
    """The automations' window is for runs that send a heartbeat this often, whoever started the worker and how."""
    template["variables"]["properties"]["env"]["default"] = HEARTBEAT
    return template

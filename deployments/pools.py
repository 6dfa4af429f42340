"""The work pools: made once, and then left as the operator set them."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from cdpo_core.errors import InputError
from cdpo_core.plain_yaml import read_yaml
from flows.pools import POOL, SWEEP_POOL
from tasks.environment import DEFAULT_STORE, RUN_SETTINGS
from tasks.mlflow_connection import without_secrets

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool

PROCESS = "process"
TYPES = (PROCESS, "docker", "kubernetes")
WORDS = {
    POOL: "Experiments and comparisons. Its concurrency limit is how many run at once, over all workers.",
    SWEEP_POOL: "Parents of sweeps: they wait for their experiments, which run in the other pool.",
}
# What a container is told of the stack; a process has it from its worker's environment.
TOLD = (DEFAULT_STORE, "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")


@dataclass(frozen=True)
class PoolOptions:
    """What an operator says about the pools; what is not said stays as it is.

    Attributes:
        type: process, docker or kubernetes; "" is the type of what is there, process at first.
        image: of the containers.
        concurrency: how many experiments run at once over all workers; 0 leaves the limit (none at first).
        working_folder: where processes start, so that relative paths in parameters mean something; "" leaves it (at
            first a folder of its own for each run).
    """

    type: str = ""
    image: str = ""
    concurrency: int = 0
    working_folder: str = ""


def make_pools(client: SyncPrefectClient, options: PoolOptions) -> None:
    """Make the work pools that are missing; what an operator changed of one that is there stays.

    Args:
        client: of the Prefect server.
        options: what is to be set.

    Raises:
        InputError: a pool is there and of another type, or an image is missing or not asked for.
    """
    for name, words in WORDS.items():
        _make_pool(client, name, words, options)
    if options.concurrency:
        from prefect.client.schemas.actions import WorkPoolUpdate

        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=options.concurrency))


def base_template(kind: str) -> dict[str, Any]:
    """The base job template of a new pool of this type; a container's environment says where the stack is.

    Every run has the settings that all need (heartbeats, patience), whoever started its worker and how.
    """
    template: dict[str, Any]
    if kind == PROCESS:
        from prefect.workers.process import ProcessWorker

        template = copy.deepcopy(ProcessWorker.get_default_base_job_template())
        template["variables"]["properties"]["env"]["default"] = RUN_SETTINGS
        return template
    text = resources.files("deployments").joinpath(f"{kind}.yaml").read_text(encoding="utf-8")
    template = read_yaml(text)
    told = {name: os.environ[name] for name in TOLD if os.environ.get(name)}
    secret = [name for name, value in told.items() if without_secrets(value) != value]
    if secret:
        fix = "take it out of the address; docs/operations.md says where containers find credentials"
        raise InputError(
            "a work pool's environment is shown to everyone, and this holds a password", where=secret[0], fix=fix
        )
    template["variables"]["properties"]["env"]["default"] = {**told, **RUN_SETTINGS}
    return template


def _make_pool(client: SyncPrefectClient, name: str, words: str, options: PoolOptions) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        kind = options.type or PROCESS
        template = _with(options, kind, base_template(kind))
        client.create_work_pool(
            WorkPoolCreate(name=name, description=words, type=kind, base_job_template=template), overwrite=True
        )
        return
    _check_type(found, options.type)
    template = _with(options, found.type, found.base_job_template)
    if template != found.base_job_template:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def _check_type(pool: WorkPool, wanted: str) -> None:
    if wanted and pool.type != wanted:
        raise InputError(
            f"the work pool {pool.name} is there and of type {pool.type}, not {wanted}",
            where="work pools of the Prefect server",
            fix=f"delete it (prefect work-pool delete {pool.name}): its type cannot be changed",
        )


def _with(options: PoolOptions, kind: str, template: dict[str, Any]) -> dict[str, Any]:
    template = copy.deepcopy(template)
    variables = template["variables"]["properties"]
    if kind == PROCESS:
        if options.image:
            raise InputError("processes have no image", where="--image", fix="add --type docker or --type kubernetes")
        if options.working_folder:
            variables["working_dir"]["default"] = options.working_folder
    elif options.image:
        variables["image"]["default"] = options.image
    elif not variables["image"].get("default"):
        raise InputError("containers need an image", where="--image", fix="build one from the Dockerfile and name it")
    return template

"""Make the work pool and the deployments on the Prefect server of PREFECT_API_URL; again changes nothing.

python -m deployments.bootstrap
python -m deployments.bootstrap --write prefect.yaml
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.definitions import DEFINITIONS, POOL, Definition, prefect_yaml
from tasks.environment import quiet_environment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate


def bootstrap(pool: str = POOL, working_folder: str = "") -> list[str]:
    """Make or update the process work pool and every deployment.

    Args:
        pool: the work pool's name.
        working_folder: where runs start, so that relative paths in their parameters mean something; "" leaves
            each run in a folder of its own.

    Returns:
        `flow/deployment` of each.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _make_pool(client, pool, working_folder)
        return [_deploy(client, item, pool) for item in DEFINITIONS]


def _make_pool(client: SyncPrefectClient, pool: str, working_folder: str) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = copy.deepcopy(ProcessWorker.get_default_base_job_template())
    if working_folder:
        template["variables"]["properties"]["working_dir"]["default"] = working_folder
    try:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
    except ObjectAlreadyExists:
        if working_folder:
            client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))


def _deploy(client: SyncPrefectClient, item: Definition, pool: str) -> str:
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.importtools import import_object

    flow = import_object(item.entrypoint)
    client.create_deployment(
        flow_id=client.create_flow(flow),
        name=item.name,
        description=item.description,
        entrypoint=item.entrypoint,
        parameters=item.all_parameters(),
        parameter_openapi_schema=parameter_schema(flow).model_dump_for_openapi(),
        enforce_parameter_schema=True,
        work_pool_name=pool,
        tags=["cdpo"],
        pull_steps=[],
        schedules=_schedules(client, flow.name, item),
    )
    return f"{flow.name}/{item.name}"


def _schedules(client: SyncPrefectClient, flow_name: str, item: Definition) -> list[DeploymentScheduleCreate]:
    """The schedules; whether one is active stays as the operator set it."""
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    active = {schedule.slug: schedule.active for schedule in _existing(client, flow_name, item)}
    return [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=when.cron, timezone=when.timezone),
            active=active.get(when.slug, False),
            slug=when.slug,
        )
        for when in item.schedules
    ]


def _existing(client: SyncPrefectClient, flow_name: str, item: Definition) -> list[Any]:
    from prefect.exceptions import ObjectNotFound

    try:
        return list(client.read_deployment_by_name(f"{flow_name}/{item.name}").schedules)
    except ObjectNotFound:
        return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the shell; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deployments.bootstrap", description=__doc__.splitlines()[0])
    parser.add_argument("--pool", default=POOL, help="name of the work pool (%(default)s)")
    parser.add_argument("--working-folder", default="", help="where runs start")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write prefect.yaml and deploy nothing")
    options = parser.parse_args(arguments)
    if options.write:
        options.write.write_text(prefect_yaml(), encoding="utf-8")
        return 0
    quiet_environment()
    for name in bootstrap(options.pool, options.working_folder):
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make the work pools, automations and deployments on the Prefect server of PREFECT_API_URL; again changes nothing.

python -m deployments.bootstrap --concurrency 4
python -m deployments.bootstrap --write prefect.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdpo_core.errors import CdpoError
from cdpo_core.plain_text import visible
from deployments.automations import make_automations
from deployments.definitions import DEFINITIONS, TAG, Definition, prefect_yaml
from deployments.pools import TYPES, PoolOptions, make_pools
from tasks.environment import quiet_environment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate


def bootstrap(options: PoolOptions) -> list[str]:
    """Make or update the work pools, the automations and every deployment.

    Args:
        options: what is to be set of the pools.

    Returns:
        `flow/deployment` of each.

    Raises:
        InputError: a work pool is there and of another type, or an image is missing.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        make_pools(client, options)
        make_automations(client)
        return [_deploy(client, item) for item in DEFINITIONS]


def _deploy(client: SyncPrefectClient, item: Definition) -> str:
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
        work_pool_name=item.pool,
        tags=[TAG],
        pull_steps=[],
        schedules=_schedules(client, flow.name, item),
    )
    return f"{flow.name}/{item.name}"


def _schedules(client: SyncPrefectClient, flow_name: str, item: Definition) -> list[DeploymentScheduleCreate]:
    """Those that are there, as they are, and those that are missing, turned off.

    The server replaces a deployment's schedules by what it is given, so what an operator added must be among it.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.exceptions import ObjectNotFound

    try:
        there = client.read_deployment_by_name(f"{flow_name}/{item.name}").schedules
    except ObjectNotFound:
        there = []
    kept = [
        DeploymentScheduleCreate(
            schedule=found.schedule, active=found.active, parameters=found.parameters, slug=found.slug
        )
        for found in there
    ]
    slugs = {found.slug for found in there}
    return kept + [
        DeploymentScheduleCreate(
            schedule=CronSchedule(cron=when.cron, timezone=when.timezone),
            active=False,
            parameters=when.parameters,
            slug=when.slug,
        )
        for when in item.schedules
        if when.slug not in slugs
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the shell; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deployments.bootstrap", description=__doc__.splitlines()[0])
    parser.add_argument("--type", default="", choices=TYPES, help="of the work pools, when they are made (process)")
    parser.add_argument("--image", default="", metavar="NAME", help="image of the containers (docker, kubernetes)")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=0,
        metavar="N",
        help="how many experiments run at once over all workers; not given, the limit stays as it is (none at first)",
    )
    parser.add_argument("--working-folder", default="", metavar="DIR", help="where processes start")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write prefect.yaml and deploy nothing")
    options = parser.parse_args(arguments)
    if options.write:
        options.write.write_text(prefect_yaml(), encoding="utf-8")
        return 0
    try:
        quiet_environment()
        made = bootstrap(PoolOptions(options.type, options.image, options.concurrency, options.working_folder))
    except CdpoError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    print(visible("\n".join(made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

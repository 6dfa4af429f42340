"""Schedules become runs with the versions installed here: with SQLAlchemy 2.1, Prefect 3.8's scheduler only fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCHEDULE = """
import asyncio
from prefect.server import models, schemas
from prefect.server.database import provide_database_interface
from prefect.server.services.scheduler import schedule_deployments

async def main():
    db = provide_database_interface()
    await db.create_db()
    nightly = schemas.core.DeploymentSchedule(
        schedule=schemas.schedules.CronSchedule(cron="0 2 * * *"), active=True, slug="nightly"
    )
    async with db.session_context(begin_transaction=True) as session:
        flow = await models.flows.create_flow(session=session, flow=schemas.core.Flow(name="sweep"))
        wanted = schemas.core.Deployment(name="nightly", flow_id=flow.id, schedules=[nightly])
        await models.deployments.create_deployment(session=session, deployment=wanted)
    await schedule_deployments()
    async with db.session_context() as session:
        runs = await models.flow_runs.read_flow_runs(session=session)
    print({run.state_type.value for run in runs})

asyncio.run(main())
"""


def test_prefects_scheduler_makes_runs_of_a_schedule(tmp_path: Path) -> None:
    """In a process and a database of its own; no server."""
    database = f"sqlite+aiosqlite:///{tmp_path}/prefect.db"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
    }
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        [sys.executable, "-c", SCHEDULE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "{'SCHEDULED'}", done.stderr[-2000:]

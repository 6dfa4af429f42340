"""Fixtures of the whole suite; the servers start only for the tests that ask for them."""

from __future__ import annotations

import pytest
from chain_kit import finished
from servers_ceph import ceph, ceph_uri
from servers_mlflow import _empty_mlflow_database, mlflow_home, mlflow_server
from servers_postgres import postgres
from servers_prefect import prefect_server
from servers_restarted import failing_s3
from servers_s3 import moto_uri, s3_endpoint, s3_uri
from worker_kit import team

__all__ = [
    "_empty_mlflow_database",
    "ceph",
    "ceph_uri",
    "failing_s3",
    "finished",
    "mlflow_home",
    "mlflow_server",
    "moto_uri",
    "postgres",
    "prefect_server",
    "s3_endpoint",
    "s3_uri",
    "team",
]

SERVERS = {"mlflow_server", "postgres", "prefect_server"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that needs a real server is slow."""
    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)

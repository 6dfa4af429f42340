"""Fixtures of the whole suite; the servers start only for the tests that ask for them."""

from __future__ import annotations

from servers_mlflow import _empty_mlflow_database, mlflow_home, mlflow_server
from servers_prefect import prefect_server
from servers_s3 import s3_endpoint, s3_uri

__all__ = ["_empty_mlflow_database", "mlflow_home", "mlflow_server", "prefect_server", "s3_endpoint", "s3_uri"]

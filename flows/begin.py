"""How a command begins: joined to running servers, or with what it needs of its own started while it still imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows.terminal import log_to_file
from tasks.environment import cdpo_home

if TYPE_CHECKING:
    from cdpo_core.config import ExperimentConfig

CONNECT = """
import sys
from pathlib import Path
from cdpo_core.config import TrackingConfig
from tasks.mlflow_connection import connect
connect(TrackingConfig(experiment=sys.argv[2]), Path(sys.argv[1]))
"""


def begin(command: str, config: ExperimentConfig | None = None) -> Path:
    """Join the servers of a running `cdpo up`, and send the libraries' logs to a file.

    Args:
        command: the log file's name begins with it.
        config: of a command that runs flows: without a Prefect server it gets one of its own, and a new MLflow
            database its tables, both beside what this process does next.

    Returns:
        The log file.
    """
    from flows.up import join_running

    join_running()
    log_file = log_to_file(cdpo_home() / "logs", command)
    if config is not None:
        from flows.temporary_server import start_prefect_server

        start_prefect_server(log_file.parent)
        _start_mlflow_database(config)
    return log_file


def _start_mlflow_database(config: ExperimentConfig) -> None:
    """Have the tables of a new local database made by another process; whoever connects waits for it at its lock."""
    from tasks.mlflow_connection import given_address

    home = cdpo_home()
    if not config.tracking.enabled or given_address(config.tracking) or (home / "mlflow.db").exists():
        return
    subprocess.Popen(
        [sys.executable, "-c", CONNECT, str(home), config.tracking.experiment],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

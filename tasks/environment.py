"""Where state lives, and the environment Prefect and MLflow are imported in.

Both read their settings when they are imported, so `quiet_environment()` comes before either import.
Whatever the user has set already is left as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

from cdpo_core.errors import InputError
from tasks.access import login_of_environment
from tasks.moved_home import DATABASE, FILES

# Where runs keep their artifacts unless their config says; `cdpo up --store` sets it for its workers.
DEFAULT_STORE = "CDPO_STORE"
# What the automation that ends killed runs waits for; Prefect allows no shorter interval.
HEARTBEAT_SECONDS = 30
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}
# What every run's process must be told, whoever started its worker. Its requests are repeated for 2 + 4 + … + 128 s,
# so that it outlives a Prefect server that is away for minutes (the default gives up after 62 s).
RUN_SETTINGS = {**HEARTBEAT, "PREFECT_CLIENT_MAX_RETRIES": "7"}
# Every run of this project carries it, nested ones too: automations leave other people's runs alone.
RUN_TAG = "cdpo"

_QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    **RUN_SETTINGS,
    # A run that died before it was cancelled has nobody to say that it ended; a worker takes 30 s at most.
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "60",
    # MLflow looks for a git executable to tag runs with a commit; none is needed.
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # What MLflow does not take within a minute is kept and sent later: training does not wait for it.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cdpo_core,tasks,flows",
    # What is said outside any flow goes to the log file alone.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # A temporary Prefect server needs more than the default 20 s on a machine that is busy training.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Threads that spin while they wait take the cores from whoever else computes.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Tokenizers' threads and a forked child deadlock.
    "TOKENIZERS_PARALLELISM": "false",
}

TEMPORARY_PREFECT = "CDPO_TEMPORARY_PREFECT"
"""Set, to its log, where Prefect's server ends with this command, so that its pages are nobody's to open."""


def cdpo_home() -> Path:
    """The folder all state lives under, absolute: CDPO_HOME, else `.cdpo` in the working folder (not created)."""
    return Path(os.environ.get("CDPO_HOME") or ".cdpo").expanduser().resolve()


def default_store() -> str:
    """The store of a config that names none: CDPO_STORE, else the folder `store` under the state folder."""
    return os.environ.get(DEFAULT_STORE) or str(cdpo_home() / "store")


def local_mlflow(home: Path) -> tuple[str, str]:
    """MLflow without a server: the database's and the artifact folder's uri under `home`.

    A server on the same database must be started with the same `--default-artifact-root` and with
    `--no-serve-artifacts`, so that runs made with and without it can read each other's files.
    """
    return f"sqlite:///{home / DATABASE}", (home / FILES).as_uri()


def quiet_environment(*, make_home: bool = True) -> None:
    """Set the environment Prefect and MLflow run in: no telemetry, no noise, Prefect's home under `cdpo_home()`.

    Their clients log in with CDPO_USERNAME and CDPO_PASSWORD, where these are set.

    Prefect's home is left alone when the user names one (PREFECT_HOME) or a server (PREFECT_API_URL).
    Child processes inherit it.

    Args:
        make_home: also make that home; the command line leaves it to what first writes there, so that help and
            `cdpo doctor` need no folder.

    Raises:
        InputError: the state folder cannot be written (Prefect itself would try for minutes), or the login is not
            whole.
    """
    login = login_of_environment()
    for name, value in {**_QUIET, **(login.for_clients() if login else {})}.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_HOME") and not os.environ.get("PREFECT_API_URL"):
        home = cdpo_home() / "prefect"
        try:
            if make_home:
                home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the state folder cannot be written: {error.strerror}"
            raise InputError(what, where=str(home), fix="set CDPO_HOME to a folder you can write to") from error
        os.environ["PREFECT_HOME"] = str(home)

"""Where state lives, and the environment Prefect and MLflow are imported in.

Both read their settings when they are imported, so `quiet_environment()` comes before either import.
Whatever the user has set already is left as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

_QUIET = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # MLflow looks for a git executable to tag runs with a commit; none is needed.
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cdpo_core,tasks,flows",
    # A temporary Prefect server needs more than the default 20 s on a machine that is busy training.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Tokenizers' threads and a forked child deadlock.
    "TOKENIZERS_PARALLELISM": "false",
}


def cdpo_home() -> Path:
    """The folder all state lives under, absolute: CDPO_HOME, else `.cdpo` in the working folder (not created)."""
    return Path(os.environ.get("CDPO_HOME") or ".cdpo").expanduser().resolve()


def quiet_environment() -> None:
    """Set the environment Prefect and MLflow run in: no telemetry, no noise, Prefect's home under `cdpo_home()`.

    Prefect's home is left alone when the user names one (PREFECT_HOME) or a server (PREFECT_API_URL).
    Child processes inherit it.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_HOME") and not os.environ.get("PREFECT_API_URL"):
        os.environ["PREFECT_HOME"] = str(cdpo_home() / "prefect")

"""The login of the team's servers, from the environment alone.

CDPO_USERNAME and CDPO_PASSWORD are one login for both: `cdpo up` asks for it at Prefect and at MLflow, and every
command that finds it in its environment uses it there. Nothing else may carry it: no option, file, parameter or run.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from cdpo_core.errors import InputError

USERNAME, PASSWORD = "CDPO_USERNAME", "CDPO_PASSWORD"
# MLflow takes no shorter one.
SHORTEST = 12
FIX = f"set {USERNAME} and {PASSWORD} to the servers' login"


@dataclass(frozen=True)
class Login:
    """A name and a password, which no representation shows."""

    username: str
    password: str = field(repr=False)

    def for_clients(self) -> dict[str, str]:
        """The environment in which Prefect's and MLflow's clients log in."""
        return {
            "PREFECT_API_AUTH_STRING": f"{self.username}:{self.password}",
            "MLFLOW_TRACKING_USERNAME": self.username,
            "MLFLOW_TRACKING_PASSWORD": self.password,
        }


def login_of_environment() -> Login | None:
    """The login; None where neither variable is set.

    Raises:
        InputError: one of them is missing, or one cannot be used.
    """
    username, password = os.environ.get(USERNAME, ""), os.environ.get(PASSWORD, "")
    if not username and not password:
        return None
    if not username or not password:
        given, missing = (USERNAME, PASSWORD) if username else (PASSWORD, USERNAME)
        raise InputError(f"{given} is set and {missing} is not", where="environment", fix="set both, or neither")
    if ":" in username:
        raise InputError("the name holds a colon", where=USERNAME, fix="the servers split name and password there")
    if len(password) < SHORTEST:
        what = f"the password has {len(password)} characters, and MLflow takes none shorter than {SHORTEST}"
        raise InputError(what, where=PASSWORD, fix="for example: openssl rand -hex 16")
    return Login(username, password)


def prefect_authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """The header by which a request logs in at Prefect's server; {} without a login."""
    return _basic(environment.get("PREFECT_API_AUTH_STRING", ""))


def mlflow_authorization(environment: Mapping[str, str]) -> dict[str, str]:
    """The header by which a request logs in at MLflow's server; {} without a login."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    username, password = (environment.get(name, "") for name in names)
    return _basic(f"{username}:{password}") if username and password else {}


def _basic(login: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}

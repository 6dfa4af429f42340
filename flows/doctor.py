"""What `cdpo doctor` looks at: what is installed, reachable and writable, and what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import CdpoError
from tasks.access import FIX as LOGIN_FIX
from tasks.access import mlflow_authorization, prefect_authorization
from tasks.environment import cdpo_home, default_store
from tasks.mlflow_connection import given_address, is_http, without_secrets
from tasks.outbox import kept_entries

PACKAGES = (
    "torch",
    "transformers",
    "prefect",
    "mlflow",
    "pydantic",
    "fastapi",
    "sqlalchemy",
    "boto3",
    "datasets",
    "peft",
)
# By package: the first version that does not work with the pinned Prefect, and what it does.
TOO_NEW = {
    "fastapi": ((0, 151), "Prefect 3.8 crashes with it"),
    "sqlalchemy": ((2, 1), "Prefect 3.8 starts no schedule with it"),
}
LEAST_FREE_GIB = 2
ENVIRONMENT = (
    "CDPO_HOME",
    "PREFECT_API_URL",
    "PREFECT_HOME",
    "MLFLOW_TRACKING_URI",
    "CDPO_STORE",
    "CDPO_USERNAME",
    "AWS_ENDPOINT_URL",
    "HF_HUB_OFFLINE",
)
SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        what: what was looked at.
        found: what was found there.
        fix: what to do about it; "" when all is well.
    """

    what: str
    found: str
    fix: str = ""


def examine(config: ExperimentConfig) -> list[Finding]:
    """Look at everything a run needs; changes nothing but a probe file in the store."""
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", _python),
        *((name, lambda name=name: _package(name)) for name in PACKAGES),
        ("machine", _machine),
        ("state folder", _home),
        ("store", lambda: _store(config)),
        ("MLflow", lambda: _mlflow(config)),
        ("Prefect", _prefect),
        ("environment", _environment),
    ]
    findings = []
    for what, look in looks:
        try:
            findings.append(look())
        except CdpoError as error:
            findings.append(Finding(what, f"{error.what} ({error.where})", error.fix or "see above"))
    return findings


def _python() -> Finding:
    version = platform.python_version()
    fits = (3, 11) <= tuple(map(int, version.split(".")[:2])) < (3, 13)
    return Finding("Python", version, "" if fits else "use Python 3.11 or 3.12")


def _package(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", "make env, or pip install --constraint constraints.txt .")
    first, words = TOO_NEW.get(name, ((10**6,), ""))
    if tuple(map(int, version.split(".")[:2])) >= first:
        return Finding(name, version, f"{words}: pip install '{name}<{'.'.join(map(str, first))}'")
    return Finding(name, version)


def _machine() -> Finding:
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("machine", f"{os.cpu_count()} cores, {memory:.0f} GiB, {', '.join(gpus) or 'no GPU'}")


def _home() -> Finding:
    home = cdpo_home()
    nearest = next(folder for folder in (home, *home.parents) if os.access(folder, os.F_OK))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return Finding("state folder", f"{home} cannot be written", "give another folder in CDPO_HOME")
    free = shutil.disk_usage(nearest).free / 2**30
    fix = f"free at least {LEAST_FREE_GIB} GiB, or give another folder in CDPO_HOME" if free < LEAST_FREE_GIB else ""
    return Finding("state folder", f"{home}, {free:.0f} GiB free", fix)


def _store(config: ExperimentConfig) -> Finding:
    from tasks.storage import open_store

    store = open_store(config.store.uri or default_store())
    store.probe()
    kept = [f"{number} entries for the MLflow at {uri}" for uri, number in kept_entries(store).items()]
    waiting = f"; kept while it was away: {', '.join(kept)} (the next run there sends them)" if kept else ""
    return Finding("store", f"{store.uri}: read and written{waiting}")


def _mlflow(config: ExperimentConfig) -> Finding:
    if not config.tracking.enabled:
        return Finding("MLflow", "turned off by tracking.enabled")
    uri = given_address(config.tracking)
    if not uri:
        return Finding("MLflow", "a database under the state folder (no server needed)")
    if is_http(uri):
        address = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
        fix = "start it, or correct MLFLOW_TRACKING_URI"
        return _answers("MLflow", uri, address, mlflow_authorization(os.environ), fix)
    return Finding("MLflow", without_secrets(uri))


def _prefect() -> Finding:
    url = os.environ.get("PREFECT_API_URL", "")
    if not url:
        return Finding("Prefect", "a temporary server within the run (`cdpo up` starts one that stays)")
    if without_secrets(url) != url:
        fix = "take them out of PREFECT_API_URL, and set PREFECT_API_AUTH_STRING"
        return Finding("Prefect", f"{without_secrets(url)} holds credentials", fix)
    address = f"{url.rstrip('/')}/admin/version"
    fix = "start it (cdpo up), or unset PREFECT_API_URL"
    return _answers("Prefect", url, address, prefect_authorization(os.environ), fix)


def _answers(what: str, url: str, address: str, login: Mapping[str, str], fix: str) -> Finding:
    """Whether the server lets this environment's login in: a health check would need none."""
    try:
        request = urllib.request.Request(address, headers=dict(login))
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            refused = "refuses this login" if login else "asks for a login"
            return Finding(what, f"{url} {refused}", LOGIN_FIX)
        return Finding(what, f"{url} answers: {error}", fix)
    except (OSError, HTTPException, ValueError) as error:
        return Finding(what, f"{url} does not answer: {error}", fix)
    return Finding(what, f"{url} answers{' to this login' if login else ''}")


def _environment() -> Finding:
    known = [f"{name}={_short(os.environ[name])}" for name in ENVIRONMENT if os.environ.get(name)]
    return Finding("environment", ", ".join(known) or "nothing set")


def _short(value: str) -> str:
    return without_secrets(value).replace(str(Path.home()), "~")

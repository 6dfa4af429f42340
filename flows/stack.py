"""What `cdpo up` starts: the commands and environments of the two servers, the deployment and the workers.

Secrets go to a part by its environment, and only to the parts that need them: the databases' password to the servers,
the servers' login to the workers.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.databases import VARIABLE, Databases
from flows.mlflow_server import COMMAND as MLFLOW_SERVER
from flows.page_guard import HOSTS, ORIGINS, named_hosts, own_names
from flows.pools import POOL, SWEEP_POOL
from flows.prefect_server import COMMAND as PREFECT_SERVER
from flows.processes import MARKER
from tasks.access import PASSWORD, USERNAME, Login
from tasks.environment import DEFAULT_STORE, local_mlflow

PYTHON = [sys.executable, "-m"]
# What only a server needs, or what a client has in other words.
_KEPT_FROM_WORKERS = (VARIABLE, USERNAME, PASSWORD, "PGPASSWORD", "PREFECT_SERVER_API_AUTH_STRING")
AUTH_CONFIG = """\
[mlflow]
default_permission = EDIT
database_uri = {database}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Part:
    """One program to start: what messages call it, its command and environment, and its log's name."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: str


@dataclass(frozen=True)
class Stack:
    """The servers and workers of one `cdpo up`.

    Attributes:
        home: the state folder.
        marker: what every process of it carries in its environment.
        host: the address the servers listen on, and are reached by.
        prefect_port, mlflow_port: their ports.
        databases: in PostgreSQL; None keeps both under `home`.
        store: where runs keep their artifacts unless they say; "" is under `home`.
        workers: how many run experiments, one at a time each.
        concurrency: how many experiments run at once over all workers; 0 leaves the pool's limit as it is.
        login: what the servers ask for; None lets everyone in who reaches them.
    """

    home: Path
    marker: str
    host: str
    prefect_port: int
    mlflow_port: int
    databases: Databases | None = None
    store: str = ""
    workers: int = 1
    concurrency: int = 0
    login: Login | None = None

    @property
    def prefect(self) -> str:
        """The Prefect server's address."""
        return f"http://{self.host}:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        """The MLflow server's address."""
        return f"http://{self.host}:{self.mlflow_port}"

    def servers(self) -> Iterator[Part]:
        """The Prefect server and the MLflow server, in this order."""
        yield Part("the Prefect server", self._prefect_command(), self._prefect_environment(), "prefect-server")
        yield Part("the MLflow server", self._mlflow_command(), self._mlflow_environment(), "mlflow-server")

    def deployment(self) -> Part:
        """What makes the pools, automations and deployments, and ends."""
        command = [*PYTHON, "deployments.bootstrap", "--working-folder", str(Path.cwd())]
        if self.concurrency:
            command += ["--concurrency", str(self.concurrency)]
        return Part("the deployment", command, self.for_clients(), "deploy")

    def pool_workers(self) -> Iterator[tuple[str, str, Part]]:
        """(pool, worker's name, part) of each worker; one that runs experiments takes one at a time."""
        for number in range(1, self.workers + 1):
            suffix = f"-{number}" if self.workers > 1 else ""
            yield self._worker(POOL, f"cdpo-up{suffix}", f"worker-{POOL}{suffix}", "--limit", "1")
        yield self._worker(SWEEP_POOL, "cdpo-up-sweeps", f"worker-{SWEEP_POOL}")

    def for_clients(self) -> dict[str, str]:
        """The environment of whatever talks to the servers."""
        kept = {name: value for name, value in os.environ.items() if name not in _KEPT_FROM_WORKERS}
        login = self.login.for_clients() if self.login else {}
        store = {DEFAULT_STORE: self.store} if self.store else {}
        return {
            **kept,
            **login,
            **store,
            MARKER: self.marker,
            "CDPO_HOME": str(self.home),
            "PREFECT_HOME": os.environ.get("PREFECT_HOME") or str(self.home / "prefect"),
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_UI_URL": self.prefect,
            # Each question writes to the server's database, and SQLite refuses who writes at the same moment (503).
            "PREFECT_WORKER_QUERY_SECONDS": "2" if self.databases else "5",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "PYTHONUNBUFFERED": "1",
        }

    def make_files(self) -> None:
        """Write what the servers read from files; only this user can read it, and it holds no secret."""
        if self.login is None:
            return
        if self.databases:
            database = self.databases.url("psycopg2", self.databases.mlflow)
        else:
            database = f"sqlite:///{self.home / 'mlflow-users.db'}"
        descriptor = os.open(self._auth_config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(AUTH_CONFIG.format(database=database))

    @property
    def _auth_config(self) -> Path:
        return self.home / "mlflow-auth.ini"

    def _worker(self, pool: str, name: str, log: str, *more: str) -> tuple[str, str, Part]:
        command = [*PYTHON, "prefect", "worker", "start", "--pool", pool, "--name", name, "--install-policy", "never"]
        return pool, name, Part(f"the worker {name}", [*command, *more], self.for_clients(), log)

    def _prefect_command(self) -> list[str]:
        return [*PREFECT_SERVER, "prefect", "server", "start", "--host", self.host, "--port", str(self.prefect_port)]

    def _prefect_environment(self) -> dict[str, str]:
        environment = {
            **self.for_clients(),
            "PREFECT_SERVER_UI_API_URL": f"{self.prefect}/api",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(self._pages(self.prefect_port)),
            **self._guard(self.prefect_port),
            # A schedule that was added a minute ahead of its time would be missed by the default of a minute.
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "10",
        }
        if self.login:
            environment["PREFECT_SERVER_API_AUTH_STRING"] = self.login.for_clients()["PREFECT_API_AUTH_STRING"]
        if self.databases:
            environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = self.databases.url(
                "asyncpg", self.databases.prefect
            )
        return environment | self._database_password()

    def _mlflow_command(self) -> list[str]:
        backend, artifacts = local_mlflow(self.home)
        if self.databases:
            backend = self.databases.url("psycopg2", self.databases.mlflow)
        # A tunnel or a proxy may have another port.
        hosts = [f"{name}{port}" for name in [*own_names(self.host), *named_hosts()] for port in ("", ":*")]
        origins = [f"{scheme}://{host}" for scheme in ("http", "https") for host in hosts]
        command = [*MLFLOW_SERVER, "server", "--host", self.host, "--port", str(self.mlflow_port), "--workers", "1"]
        command += ["--backend-store-uri", backend]
        command += ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]
        if self.store.startswith("s3://"):
            command += ["--artifacts-destination", f"{self.store.rstrip('/')}/mlflow"]
        else:
            command += ["--default-artifact-root", artifacts, "--no-serve-artifacts"]
        return command + (["--app-name", "basic-auth"] if self.login else [])

    def _mlflow_environment(self) -> dict[str, str]:
        environment = {
            **self.for_clients(),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            **self._guard(self.mlflow_port),
        }
        if self.login:
            environment |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(self._auth_config),
                "MLFLOW_AUTH_ADMIN_USERNAME": self.login.username,
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.login.password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            }
        return environment | self._database_password()

    def _pages(self, port: int) -> list[str]:
        """The origins that a server's pages have, opened by any of its names on this machine."""
        return [f"http://{name}:{port}" for name in own_names(self.host)]

    def _guard(self, port: int) -> dict[str, str]:
        return {HOSTS: ",".join([*own_names(self.host), *named_hosts()]), ORIGINS: ",".join(self._pages(port))}

    def _database_password(self) -> dict[str, str]:
        if not self.databases:
            return {}
        inherited = {name: os.environ[name] for name in ("PGPASSWORD",) if name in os.environ}
        return {**inherited, **self.databases.environment()}

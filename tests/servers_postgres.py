"""PostgreSQL for the tests: a cluster of their own that asks for a password, in a temporary folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servers_needed import postgresql_folder
from servers_s3 import free_port

USER = "cdpo"
PASSWORD = "planted-postgres-secret"


@dataclass(frozen=True)
class Postgres:
    """A running cluster."""

    port: int
    programs: Path
    user: str = USER
    password: str = field(default=PASSWORD, repr=False)

    @property
    def address(self) -> str:
        """Its address without the password."""
        return f"postgresql://{self.user}@127.0.0.1:{self.port}"

    @property
    def secret_address(self) -> str:
        """Its address with the password, which belongs into CDPO_POSTGRES_URL."""
        return self.address.replace("@", f":{self.password}@")

    def ask(self, database: str, query: str) -> list[str]:
        """The answer's rows, one string each."""
        address = self.secret_address
        command = [str(self.programs / "psql"), f"{address}/{database}", "-Atc", query]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """An empty PostgreSQL on a free loopback port; its user may make databases, and no more."""
    programs = postgresql_folder()
    # Its server refuses to run as root, and a folder of pytest's is root's alone.
    folder = Path(tempfile.mkdtemp(prefix="cdpo-postgres-", dir="/tmp"))
    data, port = folder / "data", free_port()
    as_server = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if as_server:
        shutil.chown(folder, "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)

    def run(program: str, *words: str) -> None:
        subprocess.run([*as_server, str(programs / program), *words], check=True, capture_output=True, cwd=folder)

    run("initdb", "-D", str(data), "-U", "admin", "--auth=scram-sha-256", f"--pwfile={folder}/password", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
    run("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        admin = Postgres(port, programs, "admin")
        admin.ask("postgres", f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{PASSWORD}'")
        yield Postgres(port, programs)
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)

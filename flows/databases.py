"""PostgreSQL for both servers: one database each, made where it is missing.

The password comes from the address in CDPO_POSTGRES_URL, from PGPASSWORD or from ~/.pgpass, and goes to the servers by
PGPASSWORD alone, so that it is on no command line. Anything else (TLS, timeouts) is said by libpq's variables, such as
PGSSLMODE, which both servers' drivers read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cdpo_core.errors import InputError
from tasks.mlflow_connection import without_secrets

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection

VARIABLE = "CDPO_POSTGRES_URL"
# Prefect takes none older.
OLDEST = (14, 9)
CONNECT_SECONDS = 10
FORM = "postgresql://USER@HOST:PORT, or postgresql://USER@HOST:PORT/NAME for databases called NAME_prefect, NAME_mlflow"


@dataclass(frozen=True)
class Databases:
    """Where the two databases are.

    Attributes:
        address: of the server, without a database and without the password.
        prefix: of the databases' names.
        password: "" where PGPASSWORD or ~/.pgpass has it.
    """

    address: URL
    prefix: str = ""
    password: str = field(default="", repr=False)

    @property
    def prefect(self) -> str:
        """The name of Prefect's database."""
        return f"{self.prefix}prefect"

    @property
    def mlflow(self) -> str:
        """The name of MLflow's database, which holds its users too."""
        return f"{self.prefix}mlflow"

    @property
    def shown(self) -> str:
        """What may be printed."""
        return f"{self.address.host}:{self.address.port} ({self.prefect}, {self.mlflow})"

    def url(self, driver: str, database: str) -> str:
        """The address of one database for a driver (asyncpg, psycopg2), without the password."""
        return self.address.set(drivername=f"postgresql+{driver}", database=database).render_as_string()

    def environment(self) -> dict[str, str]:
        """What the servers' drivers find the password by."""
        return {"PGPASSWORD": self.password} if self.password else {}


def databases_at(option: str) -> Databases | None:
    """The databases that the option, or else CDPO_POSTGRES_URL, points to; None where neither does.

    Raises:
        InputError: the address cannot be used, or the option holds a password.
    """
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    text, where = (option, "--postgres") if option else (os.environ.get(VARIABLE, ""), VARIABLE)
    if not text:
        return None
    try:
        given = make_url(text)
    except (ArgumentError, ValueError):
        # Its words may repeat a part of a password.
        raise InputError("the address cannot be read", where=where, fix=f"give {FORM}") from None
    if given.get_backend_name() != "postgresql" or not given.host:
        raise InputError(f"no address of PostgreSQL: {without_secrets(text)}", where=where, fix=f"give {FORM}")
    if option and given.password:
        raise InputError(
            "the address holds a password, which every user of this machine could read in the list of processes",
            where=f"--postgres {without_secrets(text)}",
            fix=f"give the whole address in {VARIABLE}, or the password in PGPASSWORD",
        )
    if given.query:
        fix = "leave it out, and set PGSSLMODE, PGSSLROOTCERT and the like instead: both servers read them"
        raise InputError("the address holds options", where=without_secrets(text), fix=fix)
    prefix = f"{given.database}_" if given.database else ""
    address = URL.create("postgresql", given.username, host=given.host, port=given.port or 5432)
    return Databases(address, prefix, str(given.password or ""))


def make_databases(databases: Databases) -> None:
    """Make both databases where they are missing, with the extension that Prefect's needs.

    Raises:
        InputError: PostgreSQL cannot be reached or is too old, or the user may not make what is missing.
    """
    for name in (databases.prefect, databases.mlflow):
        if not _exists(databases, name):
            _run(databases, "postgres", f'CREATE DATABASE "{name}"')
    _run(databases, databases.prefect, "CREATE EXTENSION IF NOT EXISTS pg_trgm")


def _exists(databases: Databases, name: str) -> bool:
    """Whether the database is there; also checks the server's version."""
    from sqlalchemy.exc import OperationalError

    try:
        with _connected(databases, name) as connection:
            version = connection.dialect.server_version_info or OLDEST
    except OperationalError as error:
        if f'database "{name}" does not exist' in str(error):
            return False
        raise _unusable(databases, error) from error
    if version < OLDEST:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, OLDEST))
        what = f"PostgreSQL {found} is too old for Prefect"
        raise InputError(what, where=databases.shown, fix=f"use {needed} or newer")
    return True


def _run(databases: Databases, database: str, statement: str) -> None:
    from sqlalchemy import text
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        with _connected(databases, database) as connection:
            connection.execute(text(statement))
    except OperationalError as error:
        raise _unusable(databases, error) from error
    except SQLAlchemyError as error:
        if "already exists" in str(error):  # another one made it just now
            return
        fix = f"let its administrator run this in the database {database}: {statement}"
        raise InputError(f"PostgreSQL refuses: {_reason(error)}", where=databases.shown, fix=fix) from error


@contextmanager
def _connected(databases: Databases, database: str) -> Iterator[Connection]:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    password = {"password": databases.password} if databases.password else {}
    engine = create_engine(
        databases.url("psycopg2", database),
        isolation_level="AUTOCOMMIT",  # a database cannot be made in a transaction
        poolclass=NullPool,
        connect_args={"connect_timeout": CONNECT_SECONDS, **password},
    )
    with engine.connect() as connection:
        yield connection


def _unusable(databases: Databases, error: Exception) -> InputError:
    return InputError(
        f"PostgreSQL cannot be used: {_reason(error)}",
        where=databases.shown,
        fix=f"start it, or correct --postgres or {VARIABLE}; a password belongs into that variable or into PGPASSWORD",
    )


def _reason(error: Exception) -> str:
    lines = str(getattr(error, "orig", None) or error).strip().splitlines() or ["no reason given"]
    return without_secrets(lines[0])[:200]

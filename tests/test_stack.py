"""What `cdpo up` would start, from its options and the environment: commands without secrets, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from servers_postgres import PASSWORD as POSTGRES_PASSWORD
from servers_postgres import Postgres

from cdpo_core.errors import InputError
from flows import up
from flows.databases import databases_at, make_databases
from flows.pools import POOL, SWEEP_POOL
from flows.stack import Part, Stack
from flows.up_command import UpOptions
from tasks.access import Login, login_of_environment
from tasks.environment import quiet_environment

SECRET = "planted-password"
ADDRESS = "postgresql://cdpo@db.example.com:6543"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that say where a stack is; monkeypatch also takes away what a test's call sets."""
    names = ["CDPO_USERNAME", "CDPO_PASSWORD", "CDPO_POSTGRES_URL", "CDPO_STORE", "PGPASSWORD"]
    names += ["PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]
    for name in [*names, "PREFECT_SERVER_API_AUTH_STRING"]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def secret_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    monkeypatch.setenv("CDPO_POSTGRES_URL", f"postgresql://cdpo:{SECRET}@db.example.com/team")
    monkeypatch.setenv("CDPO_USERNAME", "team")
    monkeypatch.setenv("CDPO_PASSWORD", SECRET)
    login, databases = login_of_environment(), databases_at("")
    return Stack(tmp_path, "mark", "127.0.0.1", 1, 2, databases, "s3://team/cdpo", 2, 5, login)


def parts(stack: Stack) -> dict[str, Part]:
    found = [*stack.servers(), stack.deployment(), *(part for _, _, part in stack.pool_workers())]
    return {part.log: part for part in found}


def test_no_command_and_no_file_holds_a_secret(secret_stack: Stack) -> None:
    for part in parts(secret_stack).values():
        assert SECRET not in " ".join(part.command), part.name
    secret_stack.make_files()
    up._remember(secret_stack, ready=True)
    for path in secret_stack.home.rglob("*"):
        assert SECRET not in path.read_text(), path
    assert SECRET not in repr(secret_stack)


def test_each_part_has_the_secrets_that_it_needs_and_no_others(secret_stack: Stack) -> None:
    found = {name: part.environment for name, part in parts(secret_stack).items()}
    assert found["prefect-server"]["PGPASSWORD"] == found["mlflow-server"]["PGPASSWORD"] == SECRET
    assert found["prefect-server"]["PREFECT_SERVER_API_AUTH_STRING"] == f"team:{SECRET}"
    assert found["mlflow-server"]["MLFLOW_AUTH_ADMIN_PASSWORD"] == SECRET
    for name, environment in found.items():
        assert "CDPO_POSTGRES_URL" not in environment, name
        assert environment["PREFECT_API_AUTH_STRING"] == f"team:{SECRET}", name
        if not name.endswith("-server"):
            assert not {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "CDPO_PASSWORD"} & set(environment), name


def test_the_servers_are_on_the_databases_and_the_store(secret_stack: Stack) -> None:
    found = parts(secret_stack)
    url = found["prefect-server"].environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert url == "postgresql+asyncpg://cdpo@db.example.com:5432/team_prefect"
    mlflow = " ".join(found["mlflow-server"].command)
    assert "--backend-store-uri postgresql+psycopg2://cdpo@db.example.com:5432/team_mlflow" in mlflow
    assert "--artifacts-destination s3://team/cdpo/mlflow" in mlflow
    assert "--app-name basic-auth" in mlflow
    assert found["worker-cdpo-1"].environment["CDPO_STORE"] == "s3://team/cdpo"
    assert found["deploy"].command[-2:] == ["--concurrency", "5"]


def test_a_laptop_needs_none_of_it(tmp_path: Path) -> None:
    plain = Stack(tmp_path, "mark", "127.0.0.1", 1, 2)
    found = parts(plain)
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in found["prefect-server"].environment
    mlflow = " ".join(found["mlflow-server"].command)
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in mlflow
    assert "--no-serve-artifacts" in mlflow
    assert "basic-auth" not in mlflow
    assert [(pool, name) for pool, name, _ in plain.pool_workers()] == [
        (POOL, "cdpo-up"),
        (SWEEP_POOL, "cdpo-up-sweeps"),
    ]
    assert "--concurrency" not in found["deploy"].command
    plain.make_files()
    assert list(tmp_path.iterdir()) == []


def test_no_worker_here_still_leaves_one_for_sweeps(tmp_path: Path) -> None:
    assert [pool for pool, _, _ in Stack(tmp_path, "mark", "127.0.0.1", 1, 2, workers=0).pool_workers()] == [SWEEP_POOL]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (f"postgresql://cdpo:{SECRET}@db.example.com", "holds a password"),
        (f"postgresql://cdpo:{SECRET}@db.example.com:port", "cannot be read"),
        (f"{ADDRESS}?sslmode=require", "holds options"),
        ("mysql://db.example.com", "no address of PostgreSQL"),
        ("postgresql:///nowhere", "no address of PostgreSQL"),
        ("db.example.com", "cannot be read"),
    ],
)
def test_addresses_that_cannot_be_used(address: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        databases_at(address)
    assert SECRET not in str(caught.value)


def test_an_option_comes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert databases_at("") is None
    monkeypatch.setenv("CDPO_POSTGRES_URL", f"postgresql://cdpo:{SECRET}@db.example.com/team")
    variable, option = databases_at(""), databases_at(ADDRESS)
    assert variable is not None
    assert option is not None
    assert (variable.prefect, variable.mlflow, variable.password) == ("team_prefect", "team_mlflow", SECRET)
    assert (option.prefect, option.mlflow, option.password) == ("prefect", "mlflow", "")
    assert option.url("asyncpg", "prefect") == "postgresql+asyncpg://cdpo@db.example.com:6543/prefect"
    assert option.environment() == {}


def test_a_login_is_whole_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert login_of_environment() is None
    monkeypatch.setenv("CDPO_USERNAME", "team")
    with pytest.raises(InputError, match="CDPO_USERNAME is set and CDPO_PASSWORD is not"):
        login_of_environment()
    monkeypatch.setenv("CDPO_PASSWORD", "short")
    with pytest.raises(InputError, match="5 characters"):
        login_of_environment()
    monkeypatch.setenv("CDPO_PASSWORD", SECRET)
    assert login_of_environment() == Login("team", SECRET)
    monkeypatch.setenv("CDPO_USERNAME", "te:am")
    with pytest.raises(InputError, match="colon") as caught:
        login_of_environment()
    assert SECRET not in str(caught.value)


def test_every_command_logs_in_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_USERNAME", "team")
    monkeypatch.setenv("CDPO_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    quiet_environment(make_home=False)
    assert os.environ["PREFECT_API_AUTH_STRING"] == f"team:{SECRET}"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "ada"  # what the user has set stays


def test_servers_that_others_reach_need_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    assert up._login("127.0.0.1") is None
    assert up._login("localhost") is None
    with pytest.raises(InputError, match="open to everyone"):
        up._login("192.0.2.1")
    with pytest.raises(InputError, match="stands for every address"):
        up._login("0.0.0.0")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", f"team:{SECRET}")
    with pytest.raises(InputError, match="leaves MLflow open") as caught:
        up._login("127.0.0.1")
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("CDPO_USERNAME", "team")
    monkeypatch.setenv("CDPO_PASSWORD", SECRET)
    assert up._login("192.0.2.1") == Login("team", SECRET)


def test_numbers_are_checked_before_anything_starts() -> None:
    with pytest.raises(InputError, match="-1 is no number"):
        UpOptions(workers=-1).check()


def test_databases_are_made_once(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_POSTGRES_URL", f"{postgres.secret_address}/made")
    databases = databases_at("")
    assert databases is not None
    make_databases(databases)
    make_databases(databases)
    names = postgres.ask("postgres", "SELECT datname FROM pg_database")
    assert {"made_prefect", "made_mlflow"} <= set(names)
    assert postgres.ask("made_prefect", "SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'") == ["1"]


def test_what_postgresql_refuses_is_said_without_the_password(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = postgres.secret_address.replace(POSTGRES_PASSWORD, SECRET)
    monkeypatch.setenv("CDPO_POSTGRES_URL", wrong)
    databases = databases_at("")
    assert databases is not None
    with pytest.raises(InputError, match="password authentication failed") as caught:
        make_databases(databases)
    assert SECRET not in str(caught.value)
    # A user who may not make databases is told the statement to have run.
    Postgres(postgres.port, postgres.programs, "admin").ask(
        "postgres", f"CREATE ROLE guest LOGIN PASSWORD '{POSTGRES_PASSWORD}'"
    )
    monkeypatch.setenv("CDPO_POSTGRES_URL", f"{postgres.secret_address.replace('cdpo:', 'guest:')}/guest")
    databases = databases_at("")
    assert databases is not None
    with pytest.raises(InputError, match="permission denied") as caught:
        make_databases(databases)
    assert 'CREATE DATABASE "guest_prefect"' in caught.value.fix

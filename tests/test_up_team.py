"""The team's stack for real: PostgreSQL, S3, a login at both servers, two workers, and no secret anywhere it shows."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import psutil
import pytest
import yaml
from servers_postgres import Postgres
from servers_s3 import moto_server
from up_kit import ROOT, Up, ask, until, up_running

from flows.pools import POOL, SWEEP_POOL
from flows.processes import _marked

pytestmark = [pytest.mark.slow, pytest.mark.faults]

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
BUCKET, STORE = "team", "s3://team/cdpo"
LOGIN, PASSWORD, AWS_SECRET = "reviewer", "planted:login/secret", "planted-aws-secret"


@dataclass(frozen=True)
class Team:
    """A running stack and what it stands on."""

    up: Up
    postgres: Postgres
    s3: Any

    @property
    def secrets(self) -> set[bytes]:
        """The planted secrets as they are, as in an address, and as in a header."""
        plain = {PASSWORD, AWS_SECRET, self.postgres.password}
        headers = {base64.b64encode(f"{LOGIN}:{PASSWORD}".encode()).decode()}
        return {form.encode() for form in plain | {quote(secret, safe="") for secret in plain} | headers}


@pytest.fixture(scope="module")
def environment(postgres: Postgres) -> Iterator[dict[str, str]]:
    with moto_server() as endpoint:
        yield {
            "CDPO_USERNAME": LOGIN,
            "CDPO_PASSWORD": PASSWORD,
            "CDPO_POSTGRES_URL": f"{postgres.secret_address}/team",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": AWS_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def team(home: Path, environment: dict[str, str], postgres: Postgres) -> Iterator[Team]:
    s3 = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="testing",
        aws_secret_access_key=AWS_SECRET,
        region_name="us-east-1",
    )
    s3.create_bucket(Bucket=BUCKET)
    with up_running(home, "--store", STORE, "--workers", "2", "--concurrency", "2", more=environment) as up:
        yield Team(up, postgres, s3)


def test_both_servers_refuse_who_has_no_password(team: Team) -> None:
    wrong = base64.b64encode(f"{LOGIN}:another-password".encode()).decode()
    for headers in ({}, {"Authorization": f"Basic {wrong}"}):
        for method, path in (
            ("POST", "/deployments/filter"),
            ("POST", "/flow_runs/filter"),
            ("POST", "/logs/filter"),
            ("GET", "/admin/settings"),
            ("GET", f"/work_pools/{POOL}"),
        ):
            body = {} if method == "POST" else None
            assert ask(team.up.prefect + path, method, body, headers)[0] == 401, path
        for path in ("experiments/search", "runs/search", "registered-models/search"):
            url = f"{team.up.mlflow}/api/2.0/mlflow/{path}?max_results=1"
            assert ask(url, "GET", None, headers)[0] == 401, path
        assert ask(f"{team.up.mlflow}/graphql", "POST", {"query": "{}"}, headers)[0] == 401
        assert ask(team.up.mlflow, "GET", None, headers)[0] == 401
    assert len(team.up.api("POST", "/deployments/filter", {})) > 3
    assert team.up.tracking("experiments/search", {"max_results": 10})["experiments"]


def test_a_login_is_of_no_use_to_a_foreign_page(team: Team) -> None:
    clients = team.up.environment
    login = base64.b64encode(f"{clients['CDPO_USERNAME']}:{clients['CDPO_PASSWORD']}".encode()).decode()
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}):
        headers = {**foreign, "Authorization": f"Basic {login}"}
        assert ask(f"{team.up.prefect}/flows/", "POST", {"name": "evil"}, headers)[0] == 403
        made = ask(f"{team.up.mlflow}/api/2.0/mlflow/experiments/create", "POST", {"name": "evil"}, headers)
        assert made[0] == 403
    assert "evil" not in [flow["name"] for flow in team.up.api("POST", "/flows/filter", {})]


def test_two_workers_take_experiments_and_one_takes_sweeps(team: Team) -> None:
    for pool, number in ((POOL, 2), (SWEEP_POOL, 1)):
        workers = team.up.api("POST", f"/work_pools/{pool}/workers/filter", {})
        assert [worker["status"] for worker in workers] == ["ONLINE"] * number
    assert team.up.api("GET", f"/work_pools/{POOL}")["concurrency_limit"] == 2


def test_an_experiment_runs_through_all_of_it(team: Team) -> None:
    run = team.up.start("experiment/experiment-tiny", {"seed": 1})
    assert team.up.ended(run["id"]) == "COMPLETED", team.up.logs()
    tracked = next(item for item in team.up.mlflow_runs() if _tag(item, "prefect.flow_run").endswith(run["id"]))
    assert _tag(tracked, "prefect.flow_run").startswith(team.up.prefect.removesuffix("/api"))
    links = team.up.api("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    link = next(item["data"] for item in links if item["key"].startswith("mlflow-"))
    assert team.up.mlflow in link
    assert tracked["info"]["run_id"] in link
    # In the two databases, and in the bucket.
    assert team.postgres.ask("team_prefect", f"SELECT state_type FROM flow_run WHERE id = '{run['id']}'") == [
        "COMPLETED"
    ]
    assert team.postgres.ask("team_prefect", "SELECT count(*) FROM pg_extension WHERE extname = 'pg_trgm'") == ["1"]
    assert tracked["info"]["run_id"] in team.postgres.ask("team_mlflow", "SELECT run_uuid FROM runs")
    names = [item["Key"] for item in _objects(team)]
    assert any(name.startswith("cdpo/stages/") for name in names)
    assert any(name.startswith("cdpo/mlflow/") for name in names)
    assert not (team.up.home / "store").exists()
    assert not (team.up.home / "mlflow.db").exists()


def test_cdpo_run_joins_with_the_login_and_finds_the_store(team: Team) -> None:
    file = team.up.home / "joined.json"
    done = team.up.run_python("-m", "flows.cli", "run", "tiny", "--seed", "1", "--json", str(file))
    assert done.returncode in (0, 3), done.stderr
    result = json.loads(file.read_text())
    assert result["policy"]["uri"].startswith(f"{STORE}/stages/")
    assert all(stage["cached"] for stage in result["stages"])
    assert result["tracking"]["uri"] == team.up.mlflow
    done = team.up.python("-m", "flows.cli", "doctor")
    assert f"✓ Prefect       {team.up.prefect} answers to this login" in done.stdout
    assert f"✓ MLflow        {team.up.mlflow} answers to this login" in done.stdout
    assert f"✓ store         {STORE}: read and written" in done.stdout


def test_without_the_login_a_run_and_the_doctor_say_so(team: Team) -> None:
    bare = {name: value for name, value in team.up.environment.items() if not name.startswith("CDPO_P")}
    bare.pop("CDPO_USERNAME")
    stranger = Up(team.up.process, team.up.home, bare, team.up.state)
    done = stranger.python("-m", "flows.cli", "run", "tiny", code=2)
    assert "asks for a login" in done.stderr
    assert "set CDPO_USERNAME and CDPO_PASSWORD" in done.stderr
    done = stranger.python("-m", "flows.cli", "doctor", code=1)
    assert "✗ Prefect" in done.stdout
    assert done.stdout.count("asks for a login") == 2
    stranger.environment |= {"CDPO_USERNAME": LOGIN, "CDPO_PASSWORD": "another-password"}
    done = stranger.python("-m", "flows.cli", "run", "tiny", code=2)
    assert "refuses this login" in done.stderr


def test_a_sweep_scheduled_a_minute_ahead_starts_by_itself_and_completes(team: Team) -> None:
    deployment = team.up.api("GET", "/deployments/name/sweep/sweep-nightly")
    start = (datetime.now(UTC) + timedelta(seconds=119)).replace(second=0, microsecond=0)
    schedule = {"cron": f"{start.minute} {start.hour} {start.day} {start.month} *", "timezone": "UTC"}
    parameters = {**TINY, "name": "in-a-minute", "seed": 1, "limits": [-0.2, 0.1]}
    wanted = {"schedule": schedule, "active": True, "slug": "in-a-minute", "parameters": parameters}
    team.up.api("POST", f"/deployments/{deployment['id']}/schedules", [wanted])

    def runs() -> list[Any]:
        mine = {"deployments": {"id": {"any_": [deployment["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found: list[Any] = team.up.api("POST", "/flow_runs/filter", mine)
        return found

    until(lambda: bool(runs()), 300)
    run = runs()[0]
    assert run["auto_scheduled"] is True
    assert datetime.fromisoformat(run["expected_start_time"]) == start
    assert team.up.ended(run["id"], 1200) == "COMPLETED", team.up.logs()
    run, *later = runs()
    assert {item["state"]["type"] for item in later} <= {"SCHEDULED"}
    assert run["parameters"]["limits"] == [-0.2, 0.1]
    # Prefect counts whole seconds: within the last one before its time a run may begin.
    assert datetime.fromisoformat(run["start_time"]) > start - timedelta(seconds=1)
    assert run["work_pool_name"] == SWEEP_POOL
    print(f"started {(datetime.fromisoformat(run['start_time']) - start).total_seconds():.1f} s after its time")


def test_no_secret_shows_in_files_processes_databases_or_the_store(team: Team) -> None:
    """After the runs above: everything that anyone could read later."""
    seen = 0
    for path in team.up.home.rglob("*"):
        if path.is_file():
            seen += 1
            _assert_clean(team, path.read_bytes(), str(path))
    assert seen > 20
    arguments = [" ".join(process.cmdline()) for process in _marked(team.up.state["marker"])]
    arguments.append(" ".join(psutil.Process(team.up.process.pid).cmdline()))
    assert len(arguments) >= 6
    for line in arguments:
        _assert_clean(team, line.encode(), "the list of processes")
    for database in ("team_prefect", "team_mlflow"):
        address = f"{team.postgres.secret_address}/{database}"
        dump = subprocess.run([str(team.postgres.programs / "pg_dump"), address], capture_output=True, check=True)
        assert len(dump.stdout) > 10_000
        _assert_clean(team, dump.stdout, f"the database {database}")
    for path in ("/admin/settings", "/admin/version"):
        _assert_clean(team, str(team.up.api("GET", path)).encode(), path)
    for item in _objects(team):
        _assert_clean(team, team.s3.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read(), item["Key"])


def test_the_auth_config_is_its_owners_alone(team: Team) -> None:
    path = team.up.home / "mlflow-auth.ini"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "default_permission = EDIT" in path.read_text()


def test_a_restart_with_another_password_finds_everything_again(
    team: Team, home: Path, environment: dict[str, str]
) -> None:
    """Last: ends the stack. The former password is refused then, with what to do, and leaves nothing running."""
    before = {item["id"] for item in team.up.api("POST", "/deployments/filter", {})}
    header = {"Authorization": f"Basic {base64.b64encode(f'{LOGIN}:{PASSWORD}'.encode()).decode()}"}
    change = {"username": LOGIN, "password": "a-new-password", "current_password": PASSWORD}
    url = f"{team.up.mlflow}/api/2.0/mlflow/users/update-password"
    assert isinstance(ask(url, "PATCH", change, header), dict)
    team.up.process.send_signal(signal.SIGINT)
    assert team.up.process.wait(120) == 0
    command = [sys.executable, "-m", "flows.cli", "up", "--prefect-port", "0", "--mlflow-port", "0", "--store", STORE]
    former = team.up.environment
    done = subprocess.run(command, env=former, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2, done.stderr
    assert "MLflow knows reviewer with another password" in done.stderr
    assert done.stdout.endswith("all ended\n")
    with up_running(home, "--store", STORE, more={**environment, "CDPO_PASSWORD": "a-new-password"}) as again:
        assert {item["id"] for item in again.api("POST", "/deployments/filter", {})} == before
        assert again.api("GET", f"/work_pools/{POOL}")["concurrency_limit"] == 2
        assert again.mlflow_runs()
        schedules = again.api("GET", "/deployments/name/sweep/sweep-nightly")["schedules"]
        assert {item["slug"] for item in schedules} == {"nightly", "weekly", "in-a-minute"}


def _assert_clean(team: Team, content: bytes, where: str) -> None:
    assert not [secret for secret in team.secrets if secret in content], where


def _objects(team: Team) -> list[Any]:
    pages = team.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [item for page in pages for item in page.get("Contents", [])]


def _tag(run: Any, name: str) -> str:
    return next((str(tag["value"]) for tag in run["data"]["tags"] if tag["key"] == name), "")

"""A team's stack is lost as a whole and comes back from the backup that docs/operations.md describes, by its lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from servers_postgres import Postgres
from servers_s3 import moto_server
from up_kit import ROOT, Up, ask, up_running

from tasks.access import mlflow_authorization

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STORE = "s3://team/cdpo"
LOGIN = {"MLFLOW_TRACKING_USERNAME": "reviewer", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
RUN = ("-m", "flows.cli", "run", "tiny", "--seed", "1", "--json")


@dataclass(frozen=True)
class Ground:
    """What a stack stands on: PostgreSQL and an S3 server, and where its backup goes."""

    postgres: Postgres
    s3: Any
    environment: dict[str, str]
    dumps: Path


@pytest.fixture
def ground(postgres: Postgres, tmp_path: Path) -> Iterator[Ground]:
    with moto_server() as endpoint:
        keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
        s3 = boto3.client(
            "s3", endpoint_url=endpoint, aws_access_key_id="testing", aws_secret_access_key="testing",
            region_name="us-east-1",
        )  # fmt: skip
        for bucket in ("team", "backup"):
            s3.create_bucket(Bucket=bucket)
        environment = keys | {
            "AWS_ENDPOINT_URL": endpoint,
            "CDPO_POSTGRES_URL": f"{postgres.secret_address}/saved",
            "CDPO_USERNAME": LOGIN["MLFLOW_TRACKING_USERNAME"],
            "CDPO_PASSWORD": LOGIN["MLFLOW_TRACKING_PASSWORD"],
        }
        dumps = tmp_path / "dumps"
        dumps.mkdir()
        yield Ground(postgres, s3, environment, dumps)


def test_a_stack_that_was_lost_comes_back_from_its_backup(ground: Ground, tmp_path: Path) -> None:
    with _stack(ground, tmp_path / "first") as up:
        flow_run = up.start("experiment/experiment-tiny", {"seed": 1})["id"]
        assert up.ended(flow_run) == "COMPLETED", up.logs()
        before = _seen(up, flow_run)
        # While all of it is up, in the order that the page gives.
        _databases(ground, "pg_dump")
        _copy(ground, "team", "backup")
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(120) == 0
    for name in ("saved_prefect", "saved_mlflow"):
        ground.postgres.ask("postgres", f"DROP DATABASE {name}")
    for name in _names(ground, "team"):
        ground.s3.delete_object(Bucket="team", Key=name)
    _databases(ground, "pg_restore")
    _copy(ground, "backup", "team")
    with _stack(ground, tmp_path / "second") as up:
        assert _seen(up, flow_run) == before
        up.python("-m", "flows.cli", "store", "verify")
        done = up.run_python(*RUN, str(tmp_path / "again.json"))
        assert done.returncode in (0, 3), done.stderr
        again = json.loads((tmp_path / "again.json").read_text())
        assert all(stage["cached"] for stage in again["stages"])
        assert len(up.mlflow_runs()) == 1


def _stack(ground: Ground, home: Path) -> Any:
    home.mkdir()
    return up_running(home, "--store", STORE, more=ground.environment)


def _seen(up: Up, flow_run: str) -> dict[str, Any]:
    """What both UIs have of the run: its state, its metrics, its files and its samples."""
    state = up.api("GET", f"/flow_runs/{flow_run}")["state"]
    (tracked,) = up.mlflow_runs()
    run_id, headers = tracked["info"]["run_id"], mlflow_authorization(LOGIN)
    listed = ask(f"{up.mlflow}/api/2.0/mlflow/artifacts/list?run_id={run_id}", headers=headers)["files"]
    samples = ask(f"{up.mlflow}/get-artifact?run_uuid={run_id}&path=samples.json", headers=headers)
    return {
        "state": (state["type"], state["name"], state["timestamp"]),
        "tracked": sorted((item["key"], item["value"]) for item in tracked["data"]["metrics"]),
        "files": sorted((item["path"], item.get("file_size")) for item in listed),
        "samples": samples["data"],
    }


def _databases(ground: Ground, program: str) -> None:
    """Run the page's lines with this program, for databases that have a prefix here."""
    section = (ROOT / "docs" / "operations.md").read_text().split("## Backups")[1].split("\n## ")[0]
    (block,) = (text for text in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) if program in text)
    block = re.sub(r"/(prefect|mlflow)\"", r'/saved_\1"', block)
    environment = {
        **os.environ,
        "PATH": f"{ground.postgres.programs}:{os.environ['PATH']}",
        "ADDRESS": ground.postgres.secret_address,
    }
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=ground.dumps, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _copy(ground: Ground, source: str, target: str) -> None:
    for part in ("records", "stages", "objects", "mlflow"):
        for name in _names(ground, source, f"cdpo/{part}/"):
            ground.s3.copy_object(Bucket=target, Key=name, CopySource={"Bucket": source, "Key": name})


def _names(ground: Ground, bucket: str, prefix: str = "") -> list[str]:
    pages = ground.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]

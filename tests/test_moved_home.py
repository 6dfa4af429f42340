"""A state folder that was copied or moved: what runs there stays there, and what ran before is found."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from config_kit import experiment_config

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import TrackingConfig
from cdpo_core.local_store import LocalStore
from tasks.mlflow_connection import reader
from tasks.moved_home import settle
from tasks.tracking import Tracker

CONFIG = experiment_config()


def open_tracker(home: Path) -> Tracker:
    return Tracker.open(TrackingConfig(), LocalStore(home / "store"), home)


def track(home: Path, key: str) -> str:
    """One run with a file and a registered policy."""
    tracker = open_tracker(home)
    run_id = tracker.run_for(key, key, CONFIG)
    tracker.log_record(run_id, {"status": key}, "result.json")
    policy = ArtifactRef(uri=f"{home}/store/stages/round/abcd.json", digest="d" * 64, kind="policy")
    tracker.register_policy(run_id, f"cdpo-{key}", policy, {"passed": True, "upper": -0.6, "delta": 0.05}, {})
    tracker.finish(run_id, "FINISHED", 1_700_000_000_000)
    return run_id


def content(home: Path) -> dict[str, str]:
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(home.rglob("*"))
        if path.is_file()
    }


def read(home: Path, run_id: str, to: Path) -> str:
    client: Any = reader(TrackingConfig(), home)[0]
    to.mkdir()
    return Path(client.download_artifacts(run_id, "result.json", str(to))).read_text()


def test_a_run_of_a_copy_leaves_the_original_as_it_was(mlflow_home: Path, tmp_path: Path) -> None:
    first = track(mlflow_home, "first")
    before = content(mlflow_home)
    copy = tmp_path / "copy of it"
    shutil.copytree(mlflow_home, copy)
    second = track(copy, "second")
    assert content(mlflow_home) == before
    assert list(copy.rglob(f"{second}/artifacts/result.json"))
    assert '"first"' in read(copy, first, tmp_path / "of the first")
    assert '"second"' in read(copy, second, tmp_path / "of the second")
    shutil.rmtree(mlflow_home)
    assert track(copy, "first") == first, "the same experiment goes on in the run it had"
    with sqlite3.connect(copy / "mlflow.db") as database:
        assert str(mlflow_home) not in "\n".join(database.iterdump())


def test_a_moved_home_finds_what_ran_before(mlflow_home: Path, tmp_path: Path) -> None:
    run_id = track(mlflow_home, "first")
    moved = mlflow_home.rename(tmp_path / "moved")
    client: Any = reader(TrackingConfig(), moved)[0]
    (version,) = client.search_model_versions("name = 'cdpo-first'")
    assert version.tags["policy.uri"] == f"{moved}/store/stages/round/abcd.json"
    assert '"first"' in read(moved, run_id, tmp_path / "read")


def test_a_home_that_stands_where_it_stood_is_left_alone(mlflow_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    track(mlflow_home, "first")
    before = content(mlflow_home)
    settle(mlflow_home)
    assert content(mlflow_home) == before
    assert not caplog.records


def test_files_that_lie_in_another_home_on_purpose_stay_there(mlflow_home: Path, tmp_path: Path) -> None:
    run_id = track(mlflow_home, "first")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(mlflow_home / "mlflow.db", other)
    settle(other)
    with sqlite3.connect(other / "mlflow.db") as database:
        ((place,),) = database.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", (run_id,)).fetchall()
    assert place.startswith(mlflow_home.as_uri())


def test_without_a_database_nothing_is_made(tmp_path: Path) -> None:
    settle(tmp_path)
    assert list(tmp_path.iterdir()) == []

"""What MLflow is not told while it is away: kept in order, sent later by anyone, there once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from config_kit import experiment_config
from mlflow import MlflowClient
from servers_restarted import Restarted, restarted_mlflow

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import TrackingConfig
from cdpo_core.errors import InputError
from cdpo_core.local_store import LocalStore
from tasks import patience
from tasks.metric_points import MetricPoint
from tasks.outbox import Outbox, kept_entries
from tasks.tracking import Tracker

POINTS = [MetricPoint("dual/lambda", 0.1 * step, step, 1_700_000_000_000 + step) for step in range(1, 4)]
POLICY = ArtifactRef(uri="/home/me/store/stages/round/abc.json", digest="d" * 64, kind="policy")
CERTIFICATE = {"mean": -0.6, "upper": -0.5, "passed": True}
ADDRESS = "http://mlflow:5000"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory, _empty_mlflow_database: Path) -> Iterator[Restarted]:
    """One MLflow server that is killed and started again by every test."""
    server = restarted_mlflow(tmp_path_factory.mktemp("mlflow-server"), _empty_mlflow_database)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def tracker(mlflow: Restarted, store: LocalStore, tmp_path: Path) -> Tracker:
    """A tracker whose server was there when it was opened."""
    if not mlflow.is_healthy():
        mlflow.start()
    return Tracker.open(_tracking(mlflow, tmp_path), store, tmp_path)


def _tracking(mlflow: Restarted, tmp_path: Path) -> TrackingConfig:
    return TrackingConfig(uri=mlflow.address, experiment=tmp_path.name)


def _send_everything(tracker: Tracker, run_id: str, folder: Path) -> None:
    figure = folder / "lambda.png"
    figure.write_bytes(b"a figure")
    tracker.log_points(run_id, POINTS)
    tracker.log_params(run_id, {"extra": "1"})
    tracker.set_tags(run_id, {"status": "first"})
    tracker.log_file(run_id, figure, "figures/lambda.png")
    tracker.log_record(run_id, {"status": "certified"}, "result.json")
    tracker.log_table(run_id, pd.DataFrame({"prompt": ["naïve?"], "reward": [1.0]}), "samples.json")
    tracker.register_policy(run_id, f"model of {run_id}", POLICY, CERTIFICATE, {"limit": "0"})
    tracker.set_tags(run_id, {"status": "certified"})
    tracker.finish(run_id, "FAILED", 1_700_000_000_999)


def _there(address: str, run_id: str, folder: Path) -> dict[str, Any]:
    """All that MLflow has of a run."""
    client = MlflowClient(tracking_uri=address, registry_uri=address)
    run = client.get_run(run_id)
    files = [file.path for path in ("", "figures") for file in client.list_artifacts(run_id, path)]
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    return {
        "points": [(p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, "dual/lambda")],
        "params": run.data.params,
        "tags": {name: run.data.tags[name] for name in ("status", "mlflow.loggedArtifacts", "cdpo.files")},
        "end": (run.info.status, run.info.end_time),
        "files": sorted(files),
        "table": json.loads(Path(client.download_artifacts(run_id, "samples.json", str(folder))).read_text()),
        "versions": [(version.version, version.tags["policy.digest"]) for version in versions],
    }


def _expected() -> dict[str, Any]:
    return {
        "points": [(p.step, p.value, p.timestamp_ms) for p in POINTS],
        "params": {"extra": "1"},
        "end": ("FAILED", 1_700_000_000_999),
        "files": ["figures", "figures/lambda.png", "result.json", "samples.json"],
        "table": {"columns": ["prompt", "reward"], "data": [["naïve?", 1.0]]},
        "versions": [("1", "d" * 64)],
    }


def _check(address: str, run_id: str, folder: Path) -> None:
    there = _there(address, run_id, folder)
    tags = there.pop("tags")
    assert tags["status"] == "certified"
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]
    assert set(json.loads(tags["cdpo.files"])) == {"figures/lambda.png", "result.json", "samples.json"}
    assert there == _expected()


def test_entries_keep_their_order_and_their_bytes(store: LocalStore, tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    file.write_bytes(bytes(range(256)))
    box = Outbox(store, ADDRESS)
    for number in range(12):
        box.keep("run", "tags", {"tags": {"n": str(number)}})
    box.keep("run", "file", {"path": "figure.png", "content": file})
    box.keep("other", "file", {"path": "a.txt", "content": b"alpha"})
    file.unlink()

    again = Outbox(LocalStore(store.root), ADDRESS)
    entries = [again.read(name) for name in again.names("run")]
    assert [entry.arguments["tags"]["n"] for entry in entries[:12] if entry] == [str(number) for number in range(12)]
    assert entries[12] is not None
    assert entries[12].arguments == {"path": "figure.png", "content": bytes(range(256))}
    assert [name.split("/")[2] for name in again.names()] == ["run"] * 13 + ["other"]
    assert kept_entries(store) == {ADDRESS: 14}
    assert Outbox(store, "http://elsewhere:5000").names() == []


def test_a_later_process_goes_on_behind_the_entries_that_are_there(store: LocalStore) -> None:
    first, second = Outbox(store, ADDRESS), Outbox(store, ADDRESS)
    first.keep("run", "tags", {"tags": {"n": "1"}})
    first.keep("run", "tags", {"tags": {"n": "2"}})
    second.keep("run", "tags", {"tags": {"n": "3"}})
    entries = [second.read(name) for name in second.names("run")]
    assert [entry.arguments["tags"]["n"] for entry in entries if entry] == ["1", "2", "3"]


def test_removing_what_was_sent_removes_nothing_else(store: LocalStore) -> None:
    sender, writer = Outbox(store, ADDRESS), Outbox(store, ADDRESS)
    writer.keep("run", "tags", {"tags": {"n": "1"}})
    (sent,) = sender.names("run")
    Outbox(store, ADDRESS).remove(sent)  # another sender was quicker
    late = Outbox(store, ADDRESS)
    late.keep("run", "tags", {"tags": {"n": "2"}})
    sender.remove(sent)
    assert sender.read(sent) is None
    assert len(late.names("run")) == 1


@pytest.mark.slow
@pytest.mark.faults
def test_what_was_kept_is_sent_in_order_once_the_server_is_back(
    mlflow: Restarted, tracker: Tracker, store: LocalStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = tracker.run_for("key", "first")
    mlflow.kill()
    with caplog.at_level("WARNING", "tasks"):
        _send_everything(tracker, run_id, tmp_path)
    assert tracker.kept() == 9
    assert kept_entries(store) == {mlflow.address: 9}
    assert sum("is kept in the store and sent later" in record.message for record in caplog.records) == 1

    mlflow.start()
    assert tracker.deliver(30) == 0
    _check(mlflow.address, run_id, tmp_path)
    _send_everything(tracker, run_id, tmp_path)
    _check(mlflow.address, run_id, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
def test_entries_of_a_run_that_is_gone_are_sent_by_two_others_at_once(
    mlflow: Restarted, tracker: Tracker, store: LocalStore, tmp_path: Path
) -> None:
    """The process that kept them never comes back; two later ones open the same MLflow at the same moment."""
    run_id = tracker.run_for("key", "first")
    mlflow.kill()
    _send_everything(tracker, run_id, tmp_path)
    mlflow.start()
    words = f"""
import sys, time
from pathlib import Path
from cdpo_core.config import TrackingConfig
from cdpo_core.local_store import LocalStore
from tasks.tracking import Tracker
import mlflow
time.sleep(max(0.0, {time.time() + 10} - time.time()))
tracker = Tracker.open(TrackingConfig(uri={mlflow.address!r}, experiment={tmp_path.name!r}),
                       LocalStore({str(store.root)!r}), Path({str(tmp_path)!r}))
sys.exit(tracker.kept())
"""
    racers = [subprocess.Popen([sys.executable, "-c", words], stderr=subprocess.PIPE) for _ in range(2)]
    errors = [racer.communicate()[1].decode() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], errors
    assert store.record_names("outbox") == []
    _check(mlflow.address, run_id, tmp_path)


@pytest.mark.slow
@pytest.mark.faults
def test_an_entry_that_is_refused_does_not_hold_up_the_others(
    mlflow: Restarted, tracker: Tracker, store: LocalStore
) -> None:
    deleted, alive = tracker.run_for("deleted", "deleted"), tracker.run_for("alive", "alive")
    mlflow.kill()
    tracker.log_points(deleted, POINTS)
    tracker.log_params(alive, {"a": "1"})
    tracker.log_params(alive, {"a": "2"})
    tracker.set_tags(alive, {"later": "yes"})
    mlflow.start()
    client = MlflowClient(tracking_uri=mlflow.address)
    client.delete_run(deleted)
    assert tracker.deliver(30) == 0
    assert client.get_run(alive).data.params == {"a": "1"}
    assert client.get_run(alive).data.tags["later"] == "yes"
    assert len(store.record_names("outbox-refused/")) == 2


@pytest.mark.slow
@pytest.mark.faults
def test_a_server_that_is_away_at_the_start(
    mlflow: Restarted, tracker: Tracker, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever types a command is told at once; a worker's run and a later child wait."""
    tracking = _tracking(mlflow, tmp_path)
    mlflow.kill()
    monkeypatch.setattr(patience, "_seen", set())
    with pytest.raises(InputError, match="cannot be reached"):
        Tracker.open(tracking, store, tmp_path)
    restart = threading.Thread(target=mlflow.away, args=(3,))
    restart.start()
    try:
        with monkeypatch.context() as patch:
            patch.setitem(os.environ, patience.BY_A_WORKER, "a flow run")
            assert Tracker.open(tracking, store, tmp_path).enabled
    finally:
        restart.join()
    restart = threading.Thread(target=mlflow.away, args=(3,))
    restart.start()
    try:
        time.sleep(1)
        assert Tracker.open(tracking, store, tmp_path).run_for("key", "another", experiment_config())
    finally:
        restart.join()

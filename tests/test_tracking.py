"""The tracker against a real sqlite MLflow and a real server: everything may be sent twice and is there once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from config_kit import experiment_config

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig, TrackingConfig
from cdpo_core.errors import CdpoError, InputError
from cdpo_core.local_store import LocalStore
from tasks.metric_points import MetricPoint, varying_params
from tasks.mlflow_connection import without_secrets
from tasks.tracking import Tracker, experiment_key

CONFIG = experiment_config(name="first")
POINTS = [MetricPoint("dual/lambda", 0.1 * step, step, 1_700_000_000_000 + step) for step in range(1, 4)]
POLICY = ArtifactRef(uri="/home/me/store/stages/round/abc.json", digest="d" * 64, kind="policy")
CERTIFICATE = {"mean": -0.61234567, "upper": -0.5, "delta": 0.05, "method": "t", "prompts": 800, "passed": True}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def tracker(mlflow_home: Path, store: LocalStore) -> Tracker:
    return Tracker.open(TrackingConfig(), store, mlflow_home)


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def either_tracker(request: pytest.FixtureRequest, mlflow_home: Path, store: LocalStore) -> Tracker:
    """The tracker over sqlite, and over a real server."""
    uri = "" if request.param == "sqlite" else request.getfixturevalue("mlflow_server")
    experiment = f"cdpo of {mlflow_home.parent.name}"
    return Tracker.open(TrackingConfig(uri=uri, experiment=experiment), store, mlflow_home)


def _client(tracker: Tracker) -> Any:
    return tracker._client


def _runs(tracker: Tracker) -> list[Any]:
    return list(_client(tracker).search_runs([tracker._experiment_id]))


def _history(tracker: Tracker, run_id: str, name: str) -> list[tuple[int, float, int]]:
    points = _client(tracker).get_metric_history(run_id, name)
    return [(point.step, point.value, point.timestamp) for point in points]


def _files(tracker: Tracker, run_id: str, folder: str = "") -> list[str]:
    return [file.path for file in _client(tracker).list_artifacts(run_id, folder or None)]


def _send_everything(tracker: Tracker, figure: Path) -> str:
    run_id = tracker.run_for("key", "first", CONFIG, prefect_url="http://prefect/runs/1")
    tracker.log_points(run_id, POINTS)
    tracker.log_params(run_id, {"extra": "1"})
    tracker.log_file(run_id, figure, "figures/lambda.png")
    tracker.log_record(run_id, {"status": "certified"}, "result.json")
    tracker.log_table(run_id, pd.DataFrame({"prompt": ["a"], "reward": [1.0]}), "samples.json")
    tracker.set_tags(run_id, {"status": "certified"})
    tracker.register_policy(run_id, "cdpo-first", POLICY, CERTIFICATE, {"limit": "0"})
    tracker.finish(run_id, "FINISHED", 1_700_000_000_999)
    return run_id


def test_sent_twice_is_there_once(either_tracker: Tracker, tmp_path: Path) -> None:
    tracker, figure = either_tracker, tmp_path / "lambda.png"
    figure.write_bytes(b"a figure")
    run_id = _send_everything(tracker, figure)
    assert _send_everything(tracker, figure) == run_id

    run = _client(tracker).get_run(run_id)
    assert len(_runs(tracker)) == 1
    assert _history(tracker, run_id, "dual/lambda") == [(p.step, p.value, p.timestamp_ms) for p in POINTS]
    assert run.data.metrics["dual/lambda"] == pytest.approx(0.3)
    assert run.data.params == {**varying_params(CONFIG), "extra": "1"}
    assert sorted(_files(tracker, run_id)) == ["config.yaml", "figures", "result.json", "samples.json"]
    assert _files(tracker, run_id, "figures") == ["figures/lambda.png"]
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]
    assert run.data.tags["prefect.flow_run"] == "http://prefect/runs/1"
    assert "http://prefect/runs/1" in run.data.tags["mlflow.note.content"]
    assert (run.info.status, run.info.end_time) == ("FINISHED", 1_700_000_000_999)
    experiment = _client(tracker).get_experiment(tracker._experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_sent_files_are_read_back(either_tracker: Tracker, tmp_path: Path) -> None:
    tracker = either_tracker
    run_id = tracker.run_for("key", "first", CONFIG)
    table = pd.DataFrame({"prompt": ["naïve?"], "cost": [-0.5]})
    tracker.log_table(run_id, table, "samples.json")
    tracker.log_table(run_id, table, "samples.json")
    sent = Path(_client(tracker).download_artifacts(run_id, "samples.json", str(tmp_path)))
    assert json.loads(sent.read_text()) == {"columns": ["prompt", "cost"], "data": [["naïve?", -0.5]]}


def test_unchanged_files_are_not_sent_again(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = tmp_path / "lambda.png"
    figure.write_bytes(b"a figure")
    _send_everything(tracker, figure)
    sent: list[str] = []
    again = Tracker(tracker._client, tracker._uri, tracker._experiment_id, tracker._store)
    monkeypatch.setattr(_client(tracker), "log_artifact", lambda run_id, file, folder: sent.append(Path(file).name))
    _send_everything(again, figure)
    assert sent == []
    figure.write_bytes(b"another figure")
    _send_everything(again, figure)
    assert sent == ["lambda.png"]


def test_policy_is_registered_once_with_its_certificate(either_tracker: Tracker) -> None:
    tracker = either_tracker
    run_id = tracker.run_for("key", "first")
    name = f"cdpo/{tracker._experiment_id}"
    version = tracker.register_policy(run_id, name, POLICY, CERTIFICATE, {"limit": "0"})
    assert tracker.register_policy(run_id, name, POLICY, CERTIFICATE, {"limit": "0"}) == version
    other = POLICY.model_copy(update={"digest": "e" * 64, "uri": "s3://bucket/store/stages/round/abd.json"})
    assert tracker.register_policy(run_id, name, other, CERTIFICATE, {}) != version

    stored = _client(tracker).get_model_version(name.replace("/", "-"), version)
    assert stored.run_id == run_id
    assert stored.source == f"cdpo://{POLICY.uri}"
    assert stored.tags["policy.uri"] == POLICY.uri
    assert stored.tags["certificate.upper"] == "-0.5"
    assert stored.tags["certificate.mean"] == "-0.612346"
    assert stored.tags["certificate.passed"] == "True"


def test_runs_by_identity(tracker: Tracker) -> None:
    first = tracker.run_for("key", "first")
    assert tracker.run_for("key", "under another name") == first
    assert tracker.run_for("another key", "first") != first
    sweep = tracker.run_for("sweep", "sweep")
    child = tracker.run_for("key", "first", parent_run_id=sweep)
    assert child != first
    assert _client(tracker).get_run(child).data.tags["mlflow.parentRunId"] == sweep


def test_finished_run_goes_on_when_continued(tracker: Tracker) -> None:
    run_id = tracker.run_for("key", "first")
    tracker.finish(run_id, "FAILED")
    assert _client(tracker).get_run(run_id).info.status == "FAILED"
    assert tracker.run_for("key", "first") == run_id
    assert _client(tracker).get_run(run_id).info.status == "RUNNING"


def test_deleted_run_is_made_anew_each_time(tracker: Tracker) -> None:
    seen = set()
    for _ in range(3):
        run_id = tracker.run_for("key", "first")
        assert tracker.run_for("key", "first") == run_id
        seen.add(run_id)
        _client(tracker).delete_run(run_id)
    assert len(seen) == 3


def test_run_made_but_never_claimed_is_adopted(tracker: Tracker, store: LocalStore) -> None:
    run_id = tracker.run_for("key", "first")
    for name in store.record_names("mlflow/"):
        store.delete_record(name)
    assert tracker.run_for("key", "first") == run_id


def test_same_store_with_another_tracking_database(tracker: Tracker, store: LocalStore, tmp_path: Path) -> None:
    first = tracker.run_for("key", "first")
    elsewhere = Tracker.open(TrackingConfig(uri=f"sqlite:///{tmp_path}/other.db"), store, tmp_path / "home2")
    second = elsewhere.run_for("key", "first")
    assert second != first
    assert tracker.run_for("key", "first") == first
    assert elsewhere.run_for("key", "first") == second


def test_racing_processes_get_one_run(tracker: Tracker, store: LocalStore, mlflow_home: Path) -> None:
    racers = [Tracker.open(TrackingConfig(), store, mlflow_home) for _ in range(4)]
    start, found = threading.Barrier(len(racers)), []

    def race(racer: Tracker) -> None:
        start.wait()
        found.append(racer.run_for("key", "first", CONFIG))

    threads = [threading.Thread(target=race, args=(racer,)) for racer in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(racers)
    assert len(set(found)) == 1
    assert [run.info.run_id for run in _runs(tracker)] == [found[0]]


def test_racing_processes_register_one_version(tracker: Tracker, store: LocalStore, mlflow_home: Path) -> None:
    """Both look before either has made a version."""
    run_id = tracker.run_for("key", "first")
    racers = [Tracker.open(TrackingConfig(), store, mlflow_home) for _ in range(2)]
    both_looked, found = threading.Barrier(len(racers)), []

    def look_first(racer: Tracker) -> None:
        search, waits = racer._client.search_model_versions, iter([both_looked.wait])
        racer._client.search_model_versions = lambda words: (search(words), next(waits, lambda: None)())[0]

    def race(racer: Tracker) -> None:
        found.append(racer.register_policy(run_id, "cdpo-first", POLICY, CERTIFICATE, {"limit": "0"}))

    for racer in racers:
        look_first(racer)
    threads = [threading.Thread(target=race, args=(racer,)) for racer in racers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["1", "1"]
    assert [version.version for version in _client(tracker).search_model_versions("name = 'cdpo-first'")] == [1]


def test_processes_that_open_a_new_database_at_once(tmp_path: Path) -> None:
    words = f"""
import time
from pathlib import Path
from cdpo_core.config import TrackingConfig
from tasks.mlflow_connection import connect
import mlflow
time.sleep(max(0.0, {time.time() + 8} - time.time()))
connect(TrackingConfig(), Path({str(tmp_path)!r}))
"""
    racers = [subprocess.Popen([sys.executable, "-c", words], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [racer.communicate()[1].decode() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], errors


def test_folder_that_takes_no_lock_is_bad_input(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db.lock").mkdir()
    with pytest.raises(InputError, match=r"no lock beside the MLflow database.*directory"):
        Tracker.open(TrackingConfig(), store, tmp_path)


def test_many_points_go_in_batches(tracker: Tracker) -> None:
    run_id = tracker.run_for("key", "first")
    points = [MetricPoint("train/loss", 1 / step, step, 1_700_000_000_000) for step in range(1, 1502)]
    tracker.log_points(run_id, points)
    tracker.log_points(run_id, points[500:])
    assert len(_history(tracker, run_id, "train/loss")) == 1501


def test_moved_data_file_keeps_the_first_name(tracker: Tracker) -> None:
    def config(path: str) -> ExperimentConfig:
        return CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"source": path})})

    first = tracker.run_for("key", "first", config("/old/pairs.jsonl"))
    assert tracker.run_for("key", "first", config("/new/other.jsonl")) == first
    assert _client(tracker).get_run(first).data.params["data"] == "pairs.jsonl"


def test_config_artifact_holds_everything_but_secrets(tracker: Tracker, tmp_path: Path) -> None:
    tracking = TrackingConfig(uri="postgresql://user:hunter2@host/db")
    run_id = tracker.run_for("key", "first", CONFIG.model_copy(update={"tracking": tracking}))
    text = Path(_client(tracker).download_artifacts(run_id, "config.yaml", str(tmp_path))).read_text()
    assert "hunter2" not in text
    assert "postgresql://***@host/db" in text
    assert "beta: 1.0" in text


def test_disabled_tracker_does_nothing(tmp_path: Path, store: LocalStore) -> None:
    tracker = Tracker.open(TrackingConfig(enabled=False, uri="http://127.0.0.1:9"), store, tmp_path / "home")
    run_id = _send_everything(tracker, tmp_path / "missing.png")
    assert (run_id, tracker.run_url(run_id), tracker.uri, tracker.enabled) == ("", "", "", False)
    assert not (tmp_path / "home").exists()
    assert store.record_names("") == []


def test_run_url_needs_a_server(tracker: Tracker, store: LocalStore) -> None:
    assert tracker.run_url("abc") == ""
    served = Tracker(object(), "http://user:pw@mlflow:5000/", "7", store)
    assert served.run_url("abc") == "http://***@mlflow:5000/#/experiments/7/runs/abc?workflowType=machine_learning"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:9", "cannot be reached"),
        ("http://no-such-host.invalid:5000", "cannot be reached"),
        ("./mlruns", "not in a folder"),
        ("file:///tmp/mlruns", "not in a folder"),
        ("postgresql://user@127.0.0.1:9/mlflow", "cannot be opened"),
        ("nosuchdatabase://host/name", "cannot be opened"),
        ("sqlite:////proc/nowhere/mlflow.db", "cannot be opened"),
    ],
)
def test_unusable_tracking_is_bad_input(uri: str, says: str, store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Tracker.open(TrackingConfig(uri=uri), store, tmp_path)
    assert says in caught.value.what
    assert caught.value.fix
    assert len(str(caught.value).splitlines()) <= 12


def test_file_that_is_no_database_is_bad_input(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(InputError, match="cannot be opened"):
        Tracker.open(TrackingConfig(), store, tmp_path)


def test_address_comes_from_the_environment(
    store: LocalStore, mlflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mlflow_home}/mlflow.db")
    assert Tracker.open(TrackingConfig(), store, tmp_path / "unused").uri.endswith("home/mlflow.db")


def test_deleted_experiment_is_said(tracker: Tracker, store: LocalStore, mlflow_home: Path) -> None:
    _client(tracker).delete_experiment(tracker._experiment_id)
    with pytest.raises(InputError, match="deleted"):
        Tracker.open(TrackingConfig(), store, mlflow_home)


def test_refusal_in_mid_run_is_an_error_with_an_end(tracker: Tracker) -> None:
    run_id = tracker.run_for("key", "first", CONFIG)
    with pytest.raises(CdpoError) as caught:
        tracker.log_params(run_id, {"seed": "another"})
    assert not isinstance(caught.value, InputError)
    assert "run the same command again" in caught.value.fix


def test_experiment_key_counts_what_changes_results() -> None:
    def key(**changes: Any) -> str:
        return experiment_key(CONFIG.model_copy(update=changes))

    same = {
        "name": "other",
        "tracking": TrackingConfig(experiment="x"),
        "compute": CONFIG.compute,
        "store": CONFIG.store,
    }
    assert key(**same) == key()
    assert key(seed=1) != key()
    assert key(dpo=CONFIG.dpo.model_copy(update={"beta": 2.0})) != key()


def test_experiment_key_knows_inputs_by_digest() -> None:
    def key(path: str, digest: str) -> str:
        data = CONFIG.data.model_copy(update={"source": path})
        return experiment_key(CONFIG.model_copy(update={"data": data}), {"data.source": digest})

    assert key("/a/pairs.jsonl", "1") == key("/b/pairs.jsonl", "1")
    assert key("/a/pairs.jsonl", "1") != key("/a/pairs.jsonl", "2")
    assert experiment_key(CONFIG, {"constraints.0.base": "1"}) != experiment_key(CONFIG)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:pw@host/x", "http://***@host/x"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("postgresql://host/db?user=me&password=pw&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_secrets_are_removed(text: str, expected: str) -> None:
    assert without_secrets(text) == expected

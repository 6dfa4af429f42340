"""The store in a bucket whose server fails: at random, for a while, slowly, or in its answers alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from servers_restarted import FailingS3
from store_kit import artifact, contents

from cdpo_core.artifacts import Manifest, folder_files
from tasks import s3_store
from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ARTIFACTS = 12


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))


def _publish_many(uri: str, folder: Path) -> list[Manifest]:
    made = [artifact(folder / str(n), f"{n:08d}", one=f"one {n}", two=f"two {n}") for n in range(ARTIFACTS)]
    return [open_store(uri).publish(*item) for item in made]


def _all_there(uri: str, manifests: list[Manifest], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_HOME", str(folder / "empty cache"))
    store = open_store(uri)
    assert store.manifests() == manifests
    for n, manifest in enumerate(manifests):
        store.check(manifest)
        assert contents(store.fetch(manifest)) == {"one": f"one {n}", "two": f"two {n}"}


def test_a_server_that_answers_503_at_random(
    failing_s3: FailingS3, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_s3.share = 0.1
    manifests = _publish_many(s3_uri, tmp_path)
    _all_there(s3_uri, manifests, tmp_path, monkeypatch)
    assert failing_s3.failed > 5


def test_answers_that_are_lost_after_the_work_was_done(
    failing_s3: FailingS3, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_s3.losing = 0.1
    for _ in range(4):
        open_store(s3_uri).probe()
    manifests = _publish_many(s3_uri, tmp_path)
    for n in range(ARTIFACTS):
        open_store(s3_uri).put_record(f"kept/{n:02d}", {"n": n})
    _all_there(s3_uri, manifests, tmp_path, monkeypatch)
    assert open_store(s3_uri).record_names("kept/") == [f"kept/{n:02d}" for n in range(ARTIFACTS)]
    assert failing_s3.lost > 5


def test_a_slow_server(failing_s3: FailingS3, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_s3.pause = 0.15
    open_store(s3_uri).probe()
    folder, manifest = artifact(tmp_path / "out")
    open_store(s3_uri).publish(folder, manifest)
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "empty cache"))
    assert folder_files(open_store(s3_uri).fetch(manifest)) == manifest.files


def test_a_server_that_goes_away_while_artifacts_are_published(
    failing_s3: FailingS3, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = threading.Timer(0.2, failing_s3.away, args=(4,))
    outage.start()
    manifests = _publish_many(s3_uri, tmp_path)
    outage.join()
    _all_there(s3_uri, manifests, tmp_path, monkeypatch)


def test_a_server_that_goes_away_in_the_middle_of_a_large_upload(
    failing_s3: FailingS3, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=1)
    monkeypatch.setattr(s3_store, "transfer_settings", lambda: parts)
    failing_s3.parts_before_away, failing_s3.away_seconds = 1, 4
    folder, manifest = artifact(tmp_path / "out", weights="0123456789abcdef" * (11 << 16))
    open_store(s3_uri).publish(folder, manifest)
    assert failing_s3.cut > 0
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "empty cache"))
    assert folder_files(open_store(s3_uri).fetch(manifest)) == manifest.files


def test_patience_counts_from_the_first_failure(
    failing_s3: FailingS3, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer may take longer than the patience, and still be tried again when it is cut at its end."""
    monkeypatch.setattr(s3_store, "OUTAGE_SECONDS", 1.0)
    store = open_store(s3_uri)
    store.put_record("a", {"n": 1})
    failing_s3.pause = 1.5
    failing_s3.losing = 1.0
    threading.Timer(4.0, lambda: setattr(failing_s3, "losing", 0.0)).start()
    assert store.get_record("a") == {"n": 1}

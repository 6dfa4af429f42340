"""A real, durable S3 server: several publishers, wrong credentials, `kill -9` of the server in mid-upload."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from servers_ceph import Ceph
from store_kit import artifact, contents

import cdpo_core
from cdpo_core.artifacts import Manifest, Store, folder_files
from cdpo_core.errors import StoreUnavailable
from cdpo_core.upkeep.catalogue import read_catalogue
from cdpo_core.upkeep.collection import Wishes, collect, plan_collection
from cdpo_core.upkeep.verification import verify_store
from tasks import s3_store
from tasks.shelves import open_shelves
from tasks.storage import open_store

pytestmark = pytest.mark.slow

PUBLISHER = """
import sys, time
from pathlib import Path
from threading import Event
sys.path.insert(0, sys.argv[5])
from store_kit import artifact
from tasks.storage import open_store

uri, me, meeting, number = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
folder, manifest = artifact(meeting.parent / me, "raced", a=f"content of {me}", b="the same")
store = open_store(uri)
store.probe()
(meeting / me).touch()
while len(list(meeting.iterdir())) < number:
    time.sleep(0.001)
print(store.publish(folder, manifest).digest)
"""


def test_of_several_processes_that_publish_one_key_one_wins_and_all_adopt_it(ceph_uri: str, tmp_path: Path) -> None:
    racers, meeting = [f"racer {number}" for number in range(4)], tmp_path / "meeting"
    meeting.mkdir()
    tests = str(Path(__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, ceph_uri, me, str(meeting), str(len(racers)), tests],
            env={**os.environ, "CDPO_HOME": str(tmp_path / f"home of {me}"), "PYTHONPATH": _root()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in racers
    ]
    said = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(racers)
    assert len(set(said)) == 1
    shelves = open_shelves(ceph_uri)
    (winner,) = shelves.manifests()
    assert winner.digest == said[0]
    found = contents(shelves.fetch(winner))
    assert found["a"].startswith("content of racer")
    assert verify_store(shelves).faults == []


@pytest.mark.parametrize(
    ("variable", "words"),
    [("AWS_SECRET_ACCESS_KEY", "not accept this secret key"), ("AWS_ACCESS_KEY_ID", "not know this access key")],
)
def test_wrong_credentials_are_said(ceph_uri: str, monkeypatch: pytest.MonkeyPatch, variable: str, words: str) -> None:
    monkeypatch.setenv(variable, "PLANTEDWRONGKEY")
    store = open_store(ceph_uri)
    for ask in (store.probe, lambda: store.find("sft", "key"), lambda: open_shelves(ceph_uri).items("")):
        with pytest.raises(StoreUnavailable, match=words) as caught:
            ask()
        assert "set AWS_ACCESS_KEY_ID" in caught.value.fix
        assert "PLANTED" not in str(caught.value)


def test_someone_else_s_bucket_is_refused_in_words(ceph: Ceph, ceph_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = ceph.another_user()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", stranger.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", stranger.secret)
    with pytest.raises(StoreUnavailable, match="refuses access"):
        open_store(ceph_uri).probe()


@pytest.fixture
def always_up(ceph: Ceph) -> Iterator[Ceph]:
    """The server, running again afterwards whatever the test did to it."""
    yield ceph
    if not ceph.is_running:
        ceph.start()


@pytest.fixture
def slow_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads in parts of 5 MiB, one after the other, so that a test can come in between."""
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=1)
    monkeypatch.setattr(s3_store, "transfer_settings", lambda: parts)


def _root() -> str:
    return str(Path(cdpo_core.__file__).parents[1])


def _large(folder: Path, mebibytes: int = 30) -> tuple[Path, Manifest]:
    return artifact(folder, "large", weights="0123456789abcdef" * (mebibytes << 16), small="small")


class Gate:
    """Stops an upload before its third part, until it is opened."""

    def __init__(self, store: Store) -> None:
        self.reached, self.opened, self.parts = Event(), Event(), 0
        store._client.meta.events.register("before-call.s3.UploadPart", self._before_a_part)  # type: ignore[attr-defined]

    def _before_a_part(self, **request: object) -> None:
        self.parts += 1
        if self.parts == 3:
            self.reached.set()
            assert self.opened.wait(300)


@pytest.mark.faults
def test_what_was_published_outlives_a_kill_of_the_server(
    always_up: Ceph, ceph_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    store = open_store(ceph_uri)
    folder, manifest = _large(tmp_path / "out", 12)
    store.publish(folder, manifest)
    store.put_record("ledger/a", {"n": 1})
    always_up.kill()
    always_up.start()
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "another"))
    shelves = open_shelves(ceph_uri)
    assert shelves.get_record("ledger/a") == {"n": 1}
    assert not shelves.put_record("ledger/a", {"n": 2})
    assert folder_files(shelves.fetch(manifest)) == manifest.files
    found = verify_store(shelves)
    assert (found.artifacts, found.objects, found.faults) == (1, 2, [])


@pytest.mark.faults
def test_a_publish_goes_on_when_the_server_comes_back_in_mid_upload(
    always_up: Ceph, ceph_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_upload: None
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    folder, manifest = _large(tmp_path / "out")
    store = open_store(ceph_uri)
    gate = Gate(store)
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(store.publish, folder, manifest)
        assert gate.reached.wait(300)
        assert _nothing_half_visible(ceph_uri)
        always_up.kill()
        gate.opened.set()
        always_up.start()
        assert publishing.result(600) == manifest
    assert gate.parts > 3
    _is_whole(ceph_uri, manifest, tmp_path, monkeypatch)


@pytest.mark.faults
def test_a_publish_whose_server_stays_away_fails_in_words_and_the_next_one_completes(
    always_up: Ceph, ceph_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_upload: None
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(s3_store, "OUTAGE_SECONDS", 1.0)
    folder, manifest = _large(tmp_path / "out")
    store = open_store(ceph_uri)
    gate = Gate(store)
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(store.publish, folder, manifest)
        assert gate.reached.wait(300)
        always_up.kill()
        gate.opened.set()
        with pytest.raises(StoreUnavailable, match="cannot be reached") as caught:
            publishing.result(600)
    assert "run the same command again" in caught.value.fix
    always_up.start()
    assert _nothing_half_visible(ceph_uri)
    shelves = open_shelves(ceph_uri)
    assert [item for item in shelves.leftovers() if item.size], "the parts take space until somebody cleans up"
    open_store(ceph_uri).publish(folder, manifest)
    collect(shelves, plan_collection(shelves, read_catalogue(shelves), Wishes(-3600.0)))
    assert shelves.leftovers() == []
    assert shelves.items("objects/") == [], "no run used it"
    open_store(ceph_uri).publish(folder, manifest)
    _is_whole(ceph_uri, manifest, tmp_path, monkeypatch)


def _nothing_half_visible(uri: str) -> bool:
    """Objects that are there are whole, and no manifest names one that is not."""
    shelves = open_shelves(uri)
    return verify_store(shelves).faults == [] and shelves.manifests() == []


def _is_whole(uri: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "another"))
    shelves = open_shelves(uri)
    assert folder_files(shelves.fetch(manifest)) == manifest.files
    assert verify_store(shelves).faults == []

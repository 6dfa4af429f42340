"""One suite over every kind of store: what is promised of a folder is promised of a bucket."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from store_kit import Backend, artifact, backend, contents

from cdpo_core.artifacts import Manifest, files_digest
from cdpo_core.errors import CorruptArtifact, InputError
from tasks.storage import open_store

__all__ = ["backend"]


def test_what_is_published_is_found_checked_and_fetched(backend: Backend, tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out")
    assert backend.store.find("sft", manifest.key) is None
    assert backend.store.publish(folder, manifest) == manifest
    shutil.rmtree(folder)
    for store in (backend.store, backend.anew()):
        assert store.find("sft", manifest.key) == manifest
        store.check(manifest)
        assert contents(store.fetch(manifest)) == {"a.txt": "alpha", "deep/b.txt": "beta"}
        assert store.manifests() == [manifest]
    assert len(backend.names("objects/")) == 2
    assert backend.names("stages/") == [f"stages/sft/{manifest.key}.json"]


def test_equal_files_are_stored_once(backend: Backend, tmp_path: Path) -> None:
    first = artifact(tmp_path / "1", "one", a="same", b="same")
    second = artifact(tmp_path / "2", "two", c="same", d="other")
    for folder, manifest in (first, second):
        backend.store.publish(folder, manifest)
    assert len(backend.names("objects/")) == 2
    assert contents(backend.anew().fetch(first[1])) == {"a": "same", "b": "same"}
    assert backend.store.manifests() == [first[1], second[1]]


def test_an_artifact_without_files_is_an_artifact(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    manifest = Manifest(stage="sft", key="empty", kind="policy", digest=files_digest({}), files={})
    backend.store.publish(tmp_path / "out", manifest)
    assert contents(backend.store.fetch(manifest)) == {}


def test_of_many_publishers_of_one_key_one_wins_and_all_learn_which(backend: Backend, tmp_path: Path) -> None:
    racers = [artifact(tmp_path / str(i), "raced", a=f"content {i}") for i in range(8)]
    barrier = Barrier(len(racers))

    def publish(racer: tuple[Path, Manifest]) -> Manifest:
        barrier.wait()
        return backend.store.publish(*racer)

    with ThreadPoolExecutor(len(racers)) as pool:
        published = list(pool.map(publish, racers))
    assert len({manifest.digest for manifest in published}) == 1
    assert backend.anew().find("sft", "raced") == published[0]
    assert contents(backend.store.fetch(published[0]))["a"].startswith("content ")


@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_object_is_seen_by_check_and_set_aside(backend: Backend, tmp_path: Path, damage: str) -> None:
    folder, manifest = artifact(tmp_path / "out")
    backend.store.publish(folder, manifest)
    name = f"objects/{manifest.files['a.txt'].sha256}"
    backend.remove(name) if damage == "missing" else backend.overwrite(name, b"al")
    store = backend.anew()
    with pytest.raises(CorruptArtifact):
        store.check(manifest)
    store.set_aside(manifest)
    assert store.find("sft", manifest.key) is None
    assert name not in backend.names("objects/")
    assert len(backend.names("aside/")) == (1 if damage == "missing" else 2)
    assert backend.store.publish(folder, manifest) == manifest
    assert contents(backend.anew().fetch(manifest))["a.txt"] == "alpha"


def test_changed_bytes_of_the_same_size_are_seen_when_they_are_read(backend: Backend, tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out")
    backend.store.publish(folder, manifest)
    backend.store.fetch(manifest)
    backend.overwrite(f"objects/{manifest.files['a.txt'].sha256}", b"omega")
    store = backend.anew()
    with pytest.raises(CorruptArtifact):
        store.fetch(manifest)
    store.set_aside(manifest)
    store.publish(folder, manifest)
    assert contents(backend.anew().fetch(manifest))["a.txt"] == "alpha"


def test_setting_aside_leaves_what_another_process_has_published_since(backend: Backend, tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out")
    newer = manifest.model_copy(update={"created": "later"})
    backend.store.publish(folder, newer)
    backend.store.set_aside(manifest)
    assert backend.store.find("sft", manifest.key) == newer


@pytest.mark.parametrize("text", ["", "{", '{"stage": "sft"}', "[]"])
def test_an_unreadable_manifest_is_set_aside_and_said(
    backend: Backend, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, manifest = artifact(tmp_path / "out")
    backend.store.publish(folder, manifest)
    backend.overwrite(f"stages/sft/{manifest.key}.json", text.encode())
    with caplog.at_level(logging.WARNING):
        assert backend.store.find("sft", manifest.key) is None
    assert "set aside" in caplog.text
    assert backend.names("stages/") == []
    assert backend.store.publish(folder, manifest) == manifest


def test_a_manifest_of_another_artifact_is_not_believed(backend: Backend, tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out")
    backend.store.publish(folder, manifest)
    lie = manifest.model_copy(update={"digest": "0" * 64})
    backend.overwrite(f"stages/sft/{manifest.key}.json", lie.model_dump_json().encode())
    assert backend.store.find("sft", manifest.key) is None


def test_files_outside_the_artifact_are_refused() -> None:
    entry = {"sha256": "0" * 64, "size": 1}
    for name in ("../x", "/etc/x", "a/../../x", ""):
        with pytest.raises(ValueError, match="not a path inside"):
            Manifest.model_validate({"stage": "s", "key": "k", "kind": "x", "digest": "", "files": {name: entry}})


def test_a_file_that_changes_while_it_is_stored_publishes_nothing(backend: Backend, tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out")
    (folder / "a.txt").write_text("later")
    with pytest.raises(CorruptArtifact):
        backend.store.publish(folder, manifest)
    assert backend.store.find("sft", manifest.key) is None
    assert backend.store.manifests() == []


def test_records_are_written_once(backend: Backend) -> None:
    store = backend.store
    assert store.get_record("runs/a") is None
    assert store.put_record("runs/a", {"n": 1})
    assert not store.put_record("runs/a", {"n": 2})
    assert store.put_record("runs/b=1.5", {"n": 3})
    assert store.put_record("ledger", {"n": 4})
    assert store.get_record("runs/a") == {"n": 1}
    assert store.record_names("runs/") == ["runs/a", "runs/b=1.5"]
    assert store.record_names("") == ["ledger", "runs/a", "runs/b=1.5"]
    store.delete_record("runs/a")
    store.delete_record("runs/a")
    assert store.record_names("runs/") == ["runs/b=1.5"]
    assert store.manifests() == []


def test_of_many_writers_of_one_record_one_wins(backend: Backend) -> None:
    barrier = Barrier(8)

    def write(number: int) -> bool:
        barrier.wait()
        return backend.store.put_record("claim", {"by": number})

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert backend.store.get_record("claim") == {"by": won.index(True)}


def test_names_and_contents_of_records_are_checked(backend: Backend) -> None:
    for name in ("../x", "/x", "a//b", ".hidden", ""):
        with pytest.raises(ValueError, match="cannot name a record"):
            backend.store.put_record(name, {})
    backend.store.put_record("a", {"n": 1})
    backend.overwrite("records/a.json", b"{")
    with pytest.raises(CorruptArtifact):
        backend.store.get_record("a")


def test_a_probe_of_a_good_store_leaves_nothing(backend: Backend) -> None:
    backend.store.probe()
    assert backend.names("") == []


# Addresses


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("store").uri == str(tmp_path / "store")
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"
    assert open_store("s3://bucket").uri == "s3://bucket"
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "gs://bucket/x",
        "http://host/x",
        "s3:/bucket",
        "s3://",
        "s3://UPPER/x",
        "s3://ab",
        "s3://[x",
        "s3://bucket/x?endpoint=planted",
        "file://elsewhere/x",
        "s3://key:planted@bucket/x",
        "s3://key:planted/secret@bucket/x",
        "https://key:planted@host/bucket",
    ],
)
def test_bad_addresses_are_refused_and_no_secret_is_repeated(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        open_store(uri)
    assert caught.value.fix
    assert "planted" not in str(caught.value)

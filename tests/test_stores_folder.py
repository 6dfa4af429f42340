"""The store in a folder: views, disks that fail, processes that are killed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from store_kit import artifact, contents

import cdpo_core
from cdpo_core.errors import StoreUnavailable
from cdpo_core.local_store import LocalStore


def test_two_fetches_share_a_view_and_a_damaged_view_is_made_again(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    folder, manifest = artifact(tmp_path / "out")
    store.publish(folder, manifest)
    view = store.fetch(manifest)
    (view / "stray.txt").write_text("x")
    (view / "a.txt").unlink()
    (view / "a.txt").write_text("not ours")
    assert store.fetch(manifest) == view
    assert contents(view) == {"a.txt": "alpha", "deep/b.txt": "beta"}
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_many_readers_may_make_one_view_at_once(tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out", **{f"f{i}": str(i) for i in range(30)})
    LocalStore(tmp_path / "store").publish(folder, manifest)
    barrier = Barrier(8)

    def read(_: int) -> dict[str, str]:
        barrier.wait()
        return contents(LocalStore(tmp_path / "store").fetch(manifest))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [contents(folder)] * 8
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


PUBLISHER = """
import sys
from pathlib import Path
from cdpo_core.artifacts import Manifest, files_digest, folder_files
from cdpo_core.local_store import LocalStore

store, out = LocalStore(sys.argv[1]), Path(sys.argv[2])
for number in range(10_000):
    for name in "abc":
        (out / name).write_text(f"{name} {number} " * 5000)
    files = folder_files(out)
    store.publish(out, Manifest(stage="s", key=str(number), kind="x", digest=files_digest(files), files=files))
"""


def test_a_publisher_killed_at_any_moment_leaves_only_whole_artifacts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path / "store"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(cdpo_core.__file__).parents[1])}
    for wanted in (3, 30):
        with subprocess.Popen(command, env=environment) as publisher:
            while len(store.manifests()) < wanted:
                assert publisher.poll() is None
                time.sleep(0.01)
            publisher.kill()
        assert len(store.manifests()) >= wanted
        for manifest in store.manifests():
            assert len(contents(store.fetch(manifest))) == 3
        shutil.rmtree(tmp_path / "store")


def test_bytes_are_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    folder, manifest = artifact(tmp_path / "out")
    store.publish(folder, manifest)
    for path in (tmp_path / "store" / "objects").iterdir():
        os.utime(path, (1, 1))
    store.check(manifest)
    monkeypatch.setattr("cdpo_core.artifacts.file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    LocalStore(tmp_path / "store").fetch(manifest)


@pytest.mark.parametrize("below", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "store" if below == "a file" else Path("/proc/store")
    with pytest.raises(StoreUnavailable, match="cannot be") as caught:
        LocalStore(root).probe()
    assert str(root) in str(caught.value)
    assert "--store" in caught.value.fix


def test_a_folder_without_working_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", os.replace)
    with pytest.raises(StoreUnavailable):
        LocalStore(tmp_path).probe()


def test_a_full_disk_is_said_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path / "store")
    folder, manifest = artifact(tmp_path / "out")

    def full(source: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(StoreUnavailable, match="No space left"):
            store.publish(folder, manifest)
    assert store.manifests() == []
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert store.publish(folder, manifest) == manifest

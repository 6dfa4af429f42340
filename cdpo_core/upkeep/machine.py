"""What this machine keeps beside the store: views, local copies of a bucket's objects, scratch folders."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cdpo_core.scratch import remove_unless_held
from cdpo_core.upkeep.catalogue import Artifact
from cdpo_core.upkeep.local_shelves import folder_size

CACHE, SCRATCH = "cache", "scratch"


@dataclass(frozen=True)
class Copy:
    """Something on this machine that can be made again.

    Attributes:
        path: a file or folder.
        size: bytes.
        time: when it was last used, seconds since 1970.
        what: view, local copy, finished scratch or abandoned scratch.
    """

    path: Path
    size: int
    time: float
    what: str


@dataclass(frozen=True)
class Scratch:
    """The checkpoints of one stage that has not been published from this machine.

    Attributes:
        path: the folder, named by the stage's key.
        size: bytes.
        time: when anything in it was last written, seconds since 1970.
        is_finished: whether the store has what it was for.
    """

    path: Path
    size: int
    time: float
    is_finished: bool


def scratch_folders(home: Path, artifacts: Mapping[str, Artifact]) -> list[Scratch]:
    """Every scratch folder of this machine, the latest first."""
    finished = {artifact.manifest.key for artifact in artifacts.values()}
    found = []
    for path in _entries(home / SCRATCH):
        with suppress(FileNotFoundError):  # its stage has just ended
            found.append(Scratch(path, folder_size(path), _last_written(path), path.name in finished))
    return sorted(found, key=lambda scratch: -scratch.time)


def unused_copies(home: Path, uri: str, older_than: float, artifacts: Mapping[str, Artifact]) -> list[Copy]:
    """Views and local copies that were not used for so many seconds, and scratch of what is finished or as old.

    Args:
        home: the state folder.
        uri: the store; its own views are looked through when it is a folder.
        older_than: seconds, by this machine's clock.
        artifacts: the store's.
    """
    before = time.time() - older_than
    found = _unused_objects(home / CACHE, before)
    for root in (home / CACHE, Path(uri)):
        found += [copy for copy in _copies(root / "views", "view") if copy.time < before]
    found += [copy for copy in _copies(home / CACHE / "tmp", "local copy") if copy.time < before]
    for scratch in scratch_folders(home, artifacts):
        what = "finished scratch" if scratch.is_finished else "abandoned scratch"
        if scratch.is_finished or scratch.time < before:
            found.append(Copy(scratch.path, scratch.size, scratch.time, what))
    return found


def remove_copy(copy: Copy) -> bool:
    """Remove it, unless it was used meanwhile; whether it is gone."""
    if copy.what.endswith("scratch"):
        return remove_unless_held(copy.path)
    with suppress(FileNotFoundError):
        if copy.path.lstat().st_mtime > copy.time:
            return False
        if copy.path.is_dir():
            shutil.rmtree(copy.path, ignore_errors=True)
        else:
            copy.path.unlink()
    return True


def _unused_objects(cache: Path, before: float) -> list[Copy]:
    """Local copies of objects that no view used lately is made of."""
    used = {
        Path(os.readlink(link)).name
        for view in _entries(cache / "views")
        if view.stat().st_mtime >= before
        for link in view.rglob("*")
        if link.is_symlink()
    }
    return [
        copy for copy in _copies(cache / "objects", "local copy") if copy.path.name not in used and copy.time < before
    ]


def _copies(folder: Path, what: str) -> Iterator[Copy]:
    for path in _entries(folder):
        with suppress(FileNotFoundError):
            yield Copy(path, folder_size(path), path.stat().st_mtime, what)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _last_written(folder: Path) -> float:
    return max((path.stat().st_mtime for path in [folder, *folder.rglob("*")]), default=0.0)

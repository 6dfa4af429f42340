"""The artifact store in a folder, and the content-addressed folder that every store keeps locally.

Nothing is ever written in place: a file is written under `tmp/`, flushed to the disk, and then
renamed (objects) or hard-linked (manifests and records, which must not replace another's) to its
name. A process killed at any moment leaves at most a file under `tmp/`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import (
    FileEntry,
    Manifest,
    checked_name,
    file_sha256,
    has_content,
    parse_manifest,
    parse_record,
)
from cdpo_core.errors import CorruptArtifact, StoreUnavailable

log = logging.getLogger(__name__)

REFRESH_SECONDS = 3600.0
"""What is used again is noted to be in use once in this time, so that upkeep knows old from unused."""

_FIXES = {
    errno.ENOSPC: "free some space and run the same command again: finished stages are kept",
    errno.EDQUOT: "free some of your quota and run the same command again: finished stages are kept",
    errno.EACCES: "give yourself write permission there, or name another folder with {setting}",
    errno.EPERM: "give yourself write permission there, or name another folder with {setting}",
    errno.EROFS: "the file system is read-only: name another folder with {setting}",
    errno.ENOTDIR: "a part of that path is a file: name another folder with {setting}",
    errno.EEXIST: "a part of that path is a file: name another folder with {setting}",
    errno.EOPNOTSUPP: "that file system has no hard links: name a folder on another one with {setting}",
}


@contextmanager
def disk_errors(verb: str, where: Path, setting: str = "--store") -> Iterator[None]:
    """Turn the operating system's errors into what a user can act on.

    Args:
        verb: what could not be done ("read" or "written").
        where: the folder.
        setting: what the user names another folder with.
    """
    try:
        yield
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "check the folder, or name another one with {setting}")
        raise StoreUnavailable(
            f"the artifact store cannot be {verb}: {error.strerror or error}",
            where=str(where),
            fix=fix.format(setting=setting),
        ) from error


class ObjectFolder:
    """Files by content at `objects/<sha256>`, each written once, and views of artifacts made of links."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, entry: FileEntry) -> Path:
        """Where an object is, or would be."""
        return self.root / "objects" / entry.sha256

    def holds(self, entry: FileEntry) -> bool:
        """Whether the object is here with the right bytes."""
        return has_content(self.path(entry), entry)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path of one's own on the same file system; what is left there at the end is removed."""
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def add(self, source: Path, entry: FileEntry) -> None:
        """Copy a file in, unless it is here already; it is then noted to be in use, or stored anew."""
        if self.holds(entry) and _refreshed(self.path(entry)):
            return
        with self.temporary() as copy:
            shutil.copyfile(source, copy)
            self.adopt(copy, entry)

    def adopt(self, temporary: Path, entry: FileEntry) -> None:
        """Make a temporary file the object, durably.

        Raises:
            CorruptArtifact: its bytes are not the entry's.
        """
        if file_sha256(temporary) != entry.sha256:
            raise CorruptArtifact("a stored file's bytes are not those of its manifest", where=str(self.path(entry)))
        target = self.path(entry)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.chmod(temporary.stat().st_mode & ~0o222)
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)

    def verify(self, manifest: Manifest) -> None:
        """Verify every byte of an artifact.

        Raises:
            CorruptArtifact: naming the first file that is missing or wrong.
        """
        for name, entry in manifest.files.items():
            if not self.holds(entry):
                path = self.path(entry)
                state = "is not what was stored" if path.exists() else "is missing"
                raise CorruptArtifact(f"the stored file {name} of stage {manifest.stage} {state}", where=str(path))

    def view(self, manifest: Manifest) -> Path:
        """The artifact as a folder of links to its verified objects.

        Raises:
            CorruptArtifact: an object is missing or wrong.
        """
        self.verify(manifest)
        folder = self.root / "views" / manifest.digest
        links = {
            name: os.path.relpath(self.path(entry), (folder / name).parent) for name, entry in manifest.files.items()
        }
        if _links(folder) != links:
            self._make_view(folder, links)
        _refreshed(folder)
        return folder

    def _make_view(self, folder: Path, links: dict[str, str]) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self.temporary() as new, self.temporary() as old:
            new.mkdir()
            for name, target in links.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).symlink_to(target)
            with suppress(OSError):
                new.rename(folder)
            # A right view is never moved away: another process may have just made it, and be reading.
            if _links(folder) != links:
                with suppress(FileNotFoundError):
                    folder.rename(old)
                new.rename(folder)


class LocalStore:
    """The artifact store in a folder (see Store for what each method promises)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)
        self._objects = ObjectFolder(self.root)

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished stage, or None."""
        path = self._manifest_path(stage, key)
        with disk_errors("read", self.root):
            try:
                return parse_manifest(path.read_bytes(), stage, key)
            except FileNotFoundError:
                return None
            except CorruptArtifact as error:
                log.warning("%s: set aside, the stage is computed again (%s)", error.what, path)
                self._move_aside(path)
                return None

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Store the folder's files, then the manifest if absent; returns the manifest that won."""
        with disk_errors("written", self.root):
            for name, entry in manifest.files.items():
                self._objects.add(folder / name, entry)
        path = self._manifest_path(manifest.stage, manifest.key)
        text = manifest.model_dump_json(indent=1)
        while not self._write_new(path, text):
            winner = self.find(manifest.stage, manifest.key)
            if winner is not None:
                return winner
        with disk_errors("written", self.root):
            for name, entry in manifest.files.items():
                # Until the manifest said that it is needed, what was there before us could be cleaned away.
                if not self._objects.path(entry).exists():
                    self._objects.add(folder / name, entry)
        return manifest

    def check(self, manifest: Manifest) -> None:
        """Verify every byte of the artifact, and note that it is in use."""
        path = self._manifest_path(manifest.stage, manifest.key)
        with disk_errors("read", self.root):
            self._objects.verify(manifest)
            if not _refreshed(path) and not path.exists():
                raise CorruptArtifact("a manifest is gone", where=str(path))

    def fetch(self, manifest: Manifest) -> Path:
        """A read-only folder with the artifact's files, every byte verified."""
        with disk_errors("written", self.root):
            return self._objects.view(manifest)

    def set_aside(self, manifest: Manifest) -> None:
        """Move a corrupt artifact's manifest and bad objects to `aside/`."""
        if self.find(manifest.stage, manifest.key) != manifest:
            return
        with disk_errors("written", self.root):
            for entry in manifest.entries:
                if not self._objects.holds(entry):
                    self._move_aside(self._objects.path(entry))
            self._move_aside(self._manifest_path(manifest.stage, manifest.key))

    def manifests(self) -> list[Manifest]:
        """Every readable manifest, sorted by (stage, key)."""
        paths = sorted((self.root / "stages").glob("*/*.json"))
        found = [self.find(path.parent.name, path.stem) for path in paths]
        return [manifest for manifest in found if manifest is not None]

    def put_record(self, name: str, record: dict[str, Any]) -> bool:
        """Write `records/<name>.json` only if absent; False if it was there already."""
        return self._write_new(self._record_path(name), json.dumps(record, indent=1))

    def get_record(self, name: str) -> dict[str, Any] | None:
        """Read `records/<name>.json`, or None."""
        with disk_errors("read", self.root):
            try:
                return parse_record(self._record_path(name).read_bytes(), name)
            except FileNotFoundError:
                return None

    def delete_record(self, name: str) -> None:
        """Remove `records/<name>.json` if it is there."""
        with disk_errors("written", self.root):
            self._record_path(name).unlink(missing_ok=True)

    def record_names(self, prefix: str) -> list[str]:
        """Sorted names of the records whose name starts with `prefix`."""
        folder = self.root / "records"
        # Only the folder that the prefix names is read: a store of years holds many records.
        below = folder / prefix.rpartition("/")[0]
        names = (path.relative_to(folder).as_posix().removesuffix(".json") for path in below.rglob("*.json"))
        return sorted(name for name in names if name.startswith(prefix))

    def probe(self) -> None:
        """Check that the folder can be written and that its file system has hard links.

        Raises:
            StoreUnavailable: with what to do about it.
        """
        name = f"probe/{uuid.uuid4().hex}"
        written = self.put_record(name, {"probe": 1}), self.put_record(name, {"probe": 2})
        kept = self.get_record(name)
        self.delete_record(name)
        if written != (True, False) or kept != {"probe": 1}:
            raise StoreUnavailable(
                "the folder lets one process overwrite another's record, so it cannot be an artifact store",
                where=self.uri,
                fix="name a folder on another file system with --store",
            )

    def _manifest_path(self, stage: str, key: str) -> Path:
        return self.root / "stages" / stage / f"{key}.json"

    def _record_path(self, name: str) -> Path:
        return self.root / "records" / f"{checked_name(name)}.json"

    def _move_aside(self, path: Path) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        target = self.root / "aside" / path.relative_to(self.root).with_name(f"{path.name}.{stamp}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.rename(target)

    def _write_new(self, path: Path, text: str) -> bool:
        with disk_errors("written", self.root), self._objects.temporary() as temporary:
            temporary.write_text(text, encoding="utf-8")
            _flush(temporary)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, path)
            except FileExistsError:
                # NFS may say "exists" of a link it made itself, when the first answer was lost.
                if temporary.stat().st_nlink < 2:
                    return False
            _flush(path.parent)
            _flush(path.parent.parent)
            return True


def _refreshed(path: Path) -> bool:
    """Make a file or folder young again if it is older than REFRESH_SECONDS; False if that cannot be done."""
    try:
        if time.time() - path.stat().st_mtime > REFRESH_SECONDS:
            os.utime(path)
    except OSError:
        return False
    return True


def _links(folder: Path) -> dict[str, str] | None:
    """The links of a view by name; None for what is no view."""
    if not folder.is_dir():
        return None
    paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    try:
        return {path.relative_to(folder).as_posix(): os.readlink(path) for path in paths}
    except OSError:
        return None


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

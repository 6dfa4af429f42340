"""The upkeep of an artifact store in a folder."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from cdpo_core.artifacts import file_sha256
from cdpo_core.local_store import LocalStore, disk_errors
from cdpo_core.upkeep.shelves import Item


class LocalShelves(LocalStore):
    """The artifact store in a folder (see Shelves for what each method promises)."""

    def now(self) -> float:
        """The time by the file system's clock."""
        with disk_errors("written", self.root), self._objects.temporary() as file:
            file.touch()
            return file.stat().st_mtime

    def items(self, start: str) -> list[Item]:
        """The files below a folder of the store, sorted by name."""
        with disk_errors("read", self.root):
            found = (self.item(path.relative_to(self.root).as_posix()) for path in (self.root / start).rglob("*"))
            return sorted((item for item in found if item is not None), key=lambda item: item.name)

    def item(self, name: str) -> Item | None:
        """One file, or None."""
        path = self.root / name
        with disk_errors("read", self.root):
            try:
                status = path.stat()
            except FileNotFoundError:
                return None
            return Item(name, status.st_size, status.st_mtime) if path.is_file() else None

    def read(self, name: str) -> bytes | None:
        """A file's bytes, or None."""
        with disk_errors("read", self.root):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    def sha256(self, name: str) -> str | None:
        """The hash of a file's bytes, or None."""
        with disk_errors("read", self.root):
            try:
                return file_sha256(self.root / name)
            except FileNotFoundError:
                return None

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with disk_errors("written", self.root):
            (self.root / name).unlink(missing_ok=True)

    def put_aside(self, name: str) -> None:
        """Move a file below `aside/`, if it is there."""
        with disk_errors("written", self.root):
            self._move_aside(self.root / name)

    def leftovers(self) -> list[Item]:
        """What is below `tmp/`, and records of probes."""
        found = self.items("records/probe/")
        with disk_errors("read", self.root), suppress(FileNotFoundError):
            for path in sorted((self.root / "tmp").iterdir()):
                with suppress(FileNotFoundError):  # whoever wrote it has just ended
                    found.append(Item(f"tmp/{path.name}", folder_size(path), path.stat().st_mtime))
        return found

    def clear(self, leftover: Item) -> None:
        """Remove a leftover."""
        path = self.root / leftover.name
        with disk_errors("written", self.root):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def folder_size(path: Path) -> int:
    """Bytes of a file or of all files below a folder; links count nothing."""
    files = [path] if path.is_file() else path.rglob("*")
    total = 0
    for file in files:
        with suppress(FileNotFoundError):
            if not file.is_symlink() and file.is_file():
                total += file.stat().st_size
    return total

"""Artifacts to store, for the tests of the stores."""

from __future__ import annotations

from pathlib import Path

from cdpo_core.artifacts import Manifest, files_digest, folder_files


def artifact(folder: Path, key: str = "k" * 8, **files: str) -> tuple[Path, Manifest]:
    """A folder of files (`__` in a name is a `/`) and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or {"a.txt": "alpha", "deep__b.txt": "beta"}).items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    entries = folder_files(folder)
    return folder, Manifest(stage="sft", key=key, kind="policy", digest=files_digest(entries), files=entries)


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}

"""Reports in the artifact store, so that whoever has the store's address has them, on any machine."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from cdpo_core.artifacts import ArtifactRef, Manifest, Store, files_digest, folder_files
from cdpo_core.errors import CorruptArtifact
from cdpo_core.provenance import library_versions
from cdpo_core.stages import reference_to, resolve

STAGE = KIND = "report"
FILE = "report.html"


def publish_report(store: Store, key: str, pages: Mapping[str, str], inputs: Mapping[str, str]) -> ArtifactRef:
    """Publish a report once, and return the reference to what the store holds of it.

    Args:
        store: the artifact store.
        key: of all that the report says but for the times its prompts had been used: a later run of the same
            experiment finds the report there and says the same.
        pages: HTML by file name; `report.html` is the report.
        inputs: digests of the artifacts it speaks of, by name.
    """
    manifest = _whole(store, key)
    if manifest is None:
        with tempfile.TemporaryDirectory() as folder:
            for name, text in pages.items():
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            files = folder_files(Path(folder))
            manifest = store.publish(
                Path(folder),
                Manifest(
                    stage=STAGE,
                    key=key,
                    kind=KIND,
                    digest=files_digest(files),
                    files=files,
                    inputs=dict(inputs),
                    created=datetime.now(UTC).isoformat(timespec="milliseconds"),
                    host=platform.node(),
                    versions=library_versions(),
                ),
            )
    return reference_to(manifest, store)


def _whole(store: Store, key: str) -> Manifest | None:
    manifest = store.find(STAGE, key)
    if manifest is not None:
        try:
            store.check(manifest)
        except CorruptArtifact:
            store.set_aside(manifest)
            return None
    return manifest


def report_key(*parts: object) -> str:
    """A report's key, hex: sha256 of what it says (text, digests)."""
    return hashlib.sha256(json.dumps(["report", *parts]).encode()).hexdigest()


def copy_report(store: Store, ref: ArtifactRef, folder: Path) -> Path:
    """The report's files of the store, in a folder that nobody else reads yet; returns where `report.html` is."""
    source = resolve(ref, store)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return folder / FILE

"""What a stage publishes and where: references, manifests, and what every store must do.

A store keeps files at `objects/<sha256>`, written once, and one manifest for each finished stage
at `stages/<stage>/<key>.json`, written last and only if absent: its presence is the one sign of
success.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

BLOCK = 1 << 20


class ArtifactRef(BaseModel):
    """A pointer to one artifact; the digest names its content, the uri where to find it."""

    model_config = ConfigDict(frozen=True)

    uri: str = Field(description="`<store>/stages/<stage>/<key>.json`, or a path for external input.")
    digest: str = Field(description="sha256 over the sorted (path, sha256) of the artifact's files.")
    kind: str = Field(description="The stage's kind of artifact, or `external`.")


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size: int


class Manifest(BaseModel):
    """The record of one finished stage; all that is not content (times, hosts) lives here only."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    kind: str
    digest: str
    files: dict[str, FileEntry]
    slice: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict, description="name -> digest")
    code: str = ""
    created: str = Field("", description="UTC, ISO 8601")
    seconds: float = 0.0
    host: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


class Store(Protocol):
    """What a store must do. Local folder: LocalStore; S3: tasks.storage.S3Store."""

    uri: str

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished stage, or None."""
        ...

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Store the folder's files, then the manifest if absent; returns the manifest that won."""
        ...

    def fetch(self, manifest: Manifest) -> Path:
        """A local read-only folder with the artifact's files, every byte verified.

        Raises:
            CorruptArtifact: an object is missing or its bytes are not those of the manifest.
        """
        ...

    def set_aside(self, manifest: Manifest) -> None:
        """Move a corrupt artifact's manifest and its bad objects out of the way (kept, not deleted)."""
        ...

    def manifests(self) -> list[Manifest]:
        """Every manifest in the store."""
        ...

    def put_record(self, name: str, record: dict[str, Any]) -> bool:
        """Write `records/<name>.json` only if absent; False if it was there already."""
        ...

    def get_record(self, name: str) -> dict[str, Any] | None:
        """Read `records/<name>.json`, or None."""
        ...

    def delete_record(self, name: str) -> None:
        """Remove `records/<name>.json` if it is there."""
        ...

    def record_names(self, prefix: str) -> list[str]:
        """Sorted names of the records whose name starts with `prefix`."""
        ...

    def probe(self) -> None:
        """Check once that the store can be reached, read, written and honours write-if-absent.

        Raises:
            StoreUnavailable: with what to do about it, within 30 seconds.
        """
        ...


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def folder_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below a folder by its relative posix path, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=file_sha256(path), size=path.stat().st_size)
        for path in paths
    }


def files_digest(files: dict[str, FileEntry]) -> str:
    """sha256 over the sorted (path, sha256): the artifact's digest."""
    lines = [[path, files[path].sha256] for path in sorted(files)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def external_ref(path: str | Path) -> ArtifactRef:
    """A reference to a file or folder of the user's, by its content digest, never by its path."""
    path = Path(path).expanduser()
    files = folder_files(path) if path.is_dir() else {"": FileEntry(sha256=file_sha256(path), size=path.stat().st_size)}
    return ArtifactRef(uri=str(path.resolve()), digest=files_digest(files), kind="external")

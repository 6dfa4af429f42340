"""What a stage publishes and where: references, manifests, and what every store must do.

A store keeps files at `objects/<sha256>`, written once, and one manifest for each finished stage
at `stages/<stage>/<key>.json`, written last and only if absent: its presence is the one sign of
success.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cdpo_core.errors import CorruptArtifact, InputError

BLOCK = 1 << 20

# What transformers reads of a model folder: configs, tokenizers, weights, templates, vocabularies. Pickles never.
_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".spm", ".bpe", ".tiktoken")
_MODEL_TEXTS = ("vocab.txt", "merges.txt", "vocab.bpe", "bpe.codes")

_RECORD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=@+-]*(/[A-Za-z0-9_][A-Za-z0-9._=@+-]*)*")


class ArtifactRef(BaseModel):
    """A pointer to one artifact; the digest names its content, the uri where to find it."""

    model_config = ConfigDict(frozen=True)

    uri: str = Field(description="`<store>/stages/<stage>/<key>.json`, or a path for external input.")
    digest: str = Field(description="sha256 over the sorted (path, sha256) of the artifact's files.")
    kind: str = Field(description="The stage's kind of artifact, or `external`.")


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


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
    cpu_seconds: float = Field(0.0, description="Processor time of the whole process meanwhile, all threads.")
    host: str = ""
    versions: dict[str, str] = Field(default_factory=dict, description="Libraries of what computed it.")
    machine: dict[str, Any] = Field(
        default_factory=dict, description="What computed it: device, threads, dtype, micro_batch, processes."
    )
    earlier: list[dict[str, Any]] = Field(
        default_factory=list, description="Versions and machines of others whose unfinished work it may continue."
    )

    @field_validator("files")
    @classmethod
    def _inside_the_artifact(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{path!r} is not a path inside the artifact")
        return files

    @property
    def entries(self) -> list[FileEntry]:
        """The distinct objects the artifact is made of."""
        return list({entry.sha256: entry for entry in self.files.values()}.values())


@runtime_checkable
class Store(Protocol):
    """What a store must do. Local folder: LocalStore; S3: tasks.s3_store.S3Store."""

    uri: str

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished stage, or None; an unreadable manifest is set aside and said."""
        ...

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Store the folder's files, then the manifest if absent; returns the manifest that won."""
        ...

    def check(self, manifest: Manifest) -> None:
        """Check that the artifact is whole, as far as that costs no transfer.

        A folder store verifies every byte; a remote one that every object is there in its full
        size, and leaves the bytes to `fetch`.

        Raises:
            CorruptArtifact: an object is missing, cut short or not what was stored.
        """
        ...

    def fetch(self, manifest: Manifest) -> Path:
        """A local read-only folder with the artifact's files, every byte verified.

        Raises:
            CorruptArtifact: an object is missing or its bytes are not those of the manifest.
        """
        ...

    def set_aside(self, manifest: Manifest) -> None:
        """Move a corrupt artifact's manifest and its bad objects out of the way (kept, not deleted).

        Nothing happens when another process has replaced the manifest since.
        """
        ...

    def manifests(self) -> list[Manifest]:
        """Every readable manifest in the store, sorted by (stage, key)."""
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
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_hashed: dict[str, tuple[tuple[int, int, int], str]] = {}


def has_content(path: Path, entry: FileEntry) -> bool:
    """Whether the file is there with exactly the entry's bytes.

    A file is read once in a process, and again only when its inode, size or time has changed.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if status.st_size != entry.size:
        return False
    signature = (status.st_ino, status.st_size, status.st_mtime_ns)
    known = _hashed.get(str(path))
    if known is None or known[0] != signature:
        started = time.time()
        known = (signature, file_sha256(path))
        # A file written within the clock's tick of now could still change and keep its time.
        if status.st_mtime < started - 1:
            _hashed[str(path)] = known
    return known[1] == entry.sha256


def folder_files(folder: Path, *, read: Callable[[list[str]], list[str]] = list) -> dict[str, FileEntry]:
    """Every file below a folder by its relative posix path, sorted.

    Args:
        folder: the folder.
        read: picks the files that count by their names, before any is read.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = {name: folder / name for name in read(names)}
    return {name: FileEntry(sha256=file_sha256(path), size=path.stat().st_size) for name, path in paths.items()}


def files_digest(files: dict[str, FileEntry]) -> str:
    """sha256 over the sorted (path, sha256): the artifact's digest."""
    lines = [[path, files[path].sha256] for path in sorted(files)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def external_ref(path: str | Path) -> ArtifactRef:
    """A reference to a file or folder of the user's, by its content digest, never by its path.

    Of a model folder only what loading reads counts: a note beside the weights makes no other model.

    Raises:
        InputError: nothing readable is there.
    """
    path = Path(path).expanduser()
    try:
        whole = path.is_dir()
        files = (
            folder_files(path, read=_read_by_loading)
            if whole
            else {"": FileEntry(sha256=file_sha256(path), size=path.stat().st_size)}
        )
    except OSError as error:
        raise InputError(
            f"cannot read the input: {error.strerror}", where=str(path), fix="check the path and its permissions"
        ) from error
    return ArtifactRef(uri=str(path.resolve()), digest=files_digest(files), kind="external")


def _read_by_loading(names: list[str]) -> list[str]:
    """The files of a model folder that loading may read; all of any other folder, and of one that brings code."""
    if "config.json" not in names or any(name.endswith(".py") for name in names):
        return names
    return [
        name
        for name in names
        if name in _MODEL_TEXTS
        or (name.endswith(_MODEL_SUFFIXES) and "/" not in name)
        or (name.startswith("additional_chat_templates/") and name.endswith(".jinja"))
    ]


def parse_manifest(text: str | bytes, stage: str, key: str) -> Manifest:
    """The manifest stored for (stage, key).

    Raises:
        CorruptArtifact: the text is no manifest, not this stage's, or does not match its own digest.
    """
    where = f"stages/{stage}/{key}.json"
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise CorruptArtifact("a manifest cannot be read", where=where) from error
    if (manifest.stage, manifest.key) != (stage, key) or manifest.digest != files_digest(manifest.files):
        raise CorruptArtifact("a manifest does not describe the artifact it is stored for", where=where)
    return manifest


def parse_record(text: str | bytes, name: str) -> dict[str, Any]:
    """The record stored under a name.

    Raises:
        CorruptArtifact: the text is not a JSON object.
    """
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CorruptArtifact(
            "a record in the store cannot be read", where=f"records/{name}.json", fix="remove that file"
        )
    return record


def checked_name(name: str) -> str:
    """The name of a record, if it is one: words of letters, digits and `._=@+-`, joined by `/`."""
    if not _RECORD_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a record")
    return name

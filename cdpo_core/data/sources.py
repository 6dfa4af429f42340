"""Where preferences come from: `data.source` as a path or a hub id, and its raw tables.

A reserved word comes first, then an existing path; what starts with /, . or ~ or ends in a file
suffix is always a path; all else is a hub id: `org/name`, `org/name/folder`, `org/name:split`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cdpo_core.artifacts import FileEntry, file_sha256, files_digest
from cdpo_core.data.adapters import HARMLESS, KNOWN_COLUMNS, TEXT_COLUMNS
from cdpo_core.data.files import GZIP, READABLE, file_type, read_file
from cdpo_core.data.schema import RawTable
from cdpo_core.errors import InputError

if TYPE_CHECKING:
    from cdpo_core.config import DataConfig

PATH_STARTS: Final = ("/", ".", "~")
PATH_SUFFIXES: Final = (*READABLE, GZIP, ".tsv", ".txt", ".xlsx", ".arrow", ".zip", ".tar", ".bz2", ".xz", ".zst")
HUB_ID: Final = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<folder>[\w./-]+))?(:(?P<split>[\w.-]+))?")
HUB_PREFIX: Final = "hub:"
HUB_TIMEOUT_SECONDS: Final = 10.0
COMMIT: Final = re.compile(r"[0-9a-f]{40}")
SET_SOURCE: Final = "set data.source (--data.source PATH) to a file, a folder or a hub id"


def source_path(data: DataConfig) -> tuple[Path, str]:
    """Where the data is, and the digest of its content, which no path or file name enters.

    A hub data set gives the path `hub:<id>@<commit>`, the id's digest with the resolved commit.
    Names inside a folder count as content, and so does `harmless` in the source's own name, because it
    says what chosen/rejected labels mean.

    Returns:
        (path for `read_source`, sha256 hex).

    Raises:
        InputError: the source is not set, does not exist, holds no data, or cannot be reached.
    """
    path = locate(data)
    if str(path).startswith(HUB_PREFIX):
        return path, hashlib.sha256(str(path).encode()).hexdigest()
    return path, content_digest(path)


def content_digest(path: Path) -> str:
    """sha256 hex over the names and contents of a source's data files.

    Raises:
        InputError: a file cannot be read, or there is none.
    """
    try:
        entries = {
            _role(path, file): FileEntry(sha256=file_sha256(file), size=file.stat().st_size)
            for file in data_files(path)
        }
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from error
    return files_digest(entries)


def locate(data: DataConfig) -> Path:
    """The source as a path; for a hub id, `hub:<id>@<commit>` with the commit resolved.

    Raises:
        InputError: as for `source_path`.
    """
    source = data.source.strip()
    if not source:
        raise InputError("no data is given", where="data.source", fix=SET_SOURCE)
    path = _existing(source)
    if path is not None:
        if path.is_file() and not file_type(path):
            raise InputError(
                f"files of type {path.suffix or '(none)'} are not read",
                where=f"data.source = {source}",
                fix=f"give one of {', '.join(READABLE)}, also with {GZIP} behind",
            )
        return path
    if source.startswith(PATH_STARTS) or source.lower().endswith(PATH_SUFFIXES) or not HUB_ID.fullmatch(source):
        raise InputError(f"no such file or folder: {source}", where="data.source", fix=SET_SOURCE)
    return Path(f"{HUB_PREFIX}{source}@{_commit(source, data.revision)}")


def data_files(path: Path) -> list[Path]:
    """The data files of a source: the file itself, or all below a folder, sorted; hidden ones are not.

    Raises:
        InputError: the folder holds none.
    """
    if not path.is_dir():
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and file_type(file) not in ("", ".json") and not _hidden(file.relative_to(path))
    )
    if not files:
        raise InputError(
            "the folder holds no .jsonl, .parquet or .csv files",
            where=f"data.source = {path}",
            fix="give the folder that holds the data files, or a file",
        )
    return files


def read_source(path: Path) -> list[RawTable]:
    """The raw tables of a source as `source_path` returned it, one a file.

    Raises:
        InputError: a file is broken, or the hub data set cannot be loaded.
    """
    if str(path).startswith(HUB_PREFIX):
        return [_read_hub(str(path).removeprefix(HUB_PREFIX))]
    return [read_file(file, KNOWN_COLUMNS, TEXT_COLUMNS, _role(path, file)) for file in data_files(path)]


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"not a path that can be opened: {str(error)[:160]}", where="data.source", fix=SET_SOURCE
        ) from error


def _role(source: Path, file: Path) -> str:
    inner = file.relative_to(source).as_posix() if source.is_dir() else ""
    return f"{HARMLESS}/{inner}" if HARMLESS in source.absolute().name.lower() else inner


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _commit(source: str, revision: str) -> str:
    """The commit a hub id's revision points at now; a full commit is taken as it is."""
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    name = _hub_parts(source)["name"]
    try:
        return str(HfApi().dataset_info(name, revision=revision or None, timeout=HUB_TIMEOUT_SECONDS).sha)
    except Exception as error:
        raise _not_on_hub(source, error) from error


def _hub_parts(source: str) -> dict[str, Any]:
    match = HUB_ID.fullmatch(source)
    return match.groupdict() if match else {}


def _not_on_hub(source: str, error: Exception) -> InputError:
    why = (str(error).strip().splitlines() or [""])[0][:160]
    return InputError(
        f"{source} is no file or folder here, and as a hub data set it cannot be loaded: {type(error).__name__}: {why}",
        where="data.source",
        fix="check the path; for a hub id, check its spelling, data.revision, the network and HF_HUB_OFFLINE",
    )


def _read_hub(spec: str) -> RawTable:
    import datasets

    source, _, commit = spec.rpartition("@")
    parts = _hub_parts(source)
    try:
        rows = datasets.load_dataset(
            parts["name"], data_dir=parts["folder"], revision=commit, split=parts["split"] or "train"
        )
    except Exception as error:
        raise _not_on_hub(source, error) from error
    names = tuple(rows.column_names)
    known = [name for name in names if name in KNOWN_COLUMNS]
    table = rows.select_columns(known).with_format("arrow")[:]
    columns = {name: table.column(name).to_pylist() for name in known}
    return RawTable(source, "row", names, columns, list(range(1, len(rows) + 1)), role=source)

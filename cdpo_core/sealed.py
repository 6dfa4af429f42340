"""Files of a scratch folder whose names carry the sha256 of their bytes: a flipped bit is a file that is not there.

A name and its content are put in place by one rename, so no kill can leave a checksum beside another file's bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"


def write_sealed(folder: Path, stem: str, write: Callable[[Path], None]) -> Path:
    """Make the file `<stem>-<sha256>.safetensors`, whole or not at all.

    Args:
        folder: a scratch folder that this process holds.
        stem: the name without the checksum.
        write: writes the content to a path.
    """
    partial = folder / f"{stem}.partial"
    write(partial)
    path = folder / f"{stem}-{_sha256(partial)}{SUFFIX}"
    os.replace(partial, path)
    return path


def sealed_files(folder: Path, stem: str) -> Iterator[Path]:
    """The files whose names start with `stem`, by name; one whose bytes are not its name's is said and removed."""
    for path in sorted(folder.glob(f"{stem}-*{SUFFIX}")):
        if path.stem.rpartition("-")[2] == _sha256(path):
            yield path
        else:
            log.warning("%s is damaged: what it holds is computed again", path)
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Input from outside the store: what a stage read must be what its key was hashed from.

The files are the user's, who may edit them at any time. They are hashed before a stage begins and, where anything about
them moved meanwhile, again when it has ended; what was read from other bytes is published under no key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cdpo_core.artifacts import ArtifactRef, external_ref
from cdpo_core.errors import InputError

DATA: Final = "data-"
"""What the digest of a data source begins with; behind it is the sha256 of its data files (`data.sources`)."""

TICK_SECONDS: Final = 1.0
_SHA256: Final = re.compile("[0-9a-f]{64}")
_AGAIN: Final = "run the same command again"

Stamp = tuple[str, int, int, int, int]


def unchanged(ref: ArtifactRef) -> Path:
    """The path of an input from outside, whose content is still the reference's.

    Raises:
        InputError: it has changed since it was referred to, or cannot be read.
    """
    if not _same(ref):
        raise InputError("the input has changed since the run began", where=ref.uri, fix=_AGAIN)
    return Path(ref.uri)


class Watched:
    """Inputs from outside, from before they are hashed until a stage has read them."""

    def __init__(self, refs: Iterable[ArtifactRef]) -> None:
        self._before = {ref.uri: (ref, _stamps(ref)) for ref in refs if ref.kind == "external"}
        self._began = time.time()

    def check(self) -> None:
        """Whether what was read since is what the references name.

        Files whose stamps have not moved are not read again, unless they were written so shortly before that a write
        within the clock's tick could hide. A data file that was written meanwhile is refused whatever it holds now: it
        may have been another in between. A model's is hashed again, since a long training may have read it hours ago.

        Raises:
            InputError: an input was changed while it was read.
        """
        for ref, before in self._before.values():
            now = _stamps(ref)
            written = [stamp[1:4] for stamp in now] != [stamp[1:4] for stamp in before]
            recent = any(stamp[3] > (self._began - TICK_SECONDS) * 1e9 for stamp in now)
            moved = now != before
            if (written and ref.digest.startswith(DATA)) or ((moved or recent) and not _same(ref)):
                raise InputError(
                    "the input was changed while it was read, so nothing was kept of what it gave",
                    where=ref.uri,
                    fix=_AGAIN,
                )


def _same(ref: ArtifactRef) -> bool:
    # What comes from a hub is named by its revision, not by a sha256 of its content.
    if ref.digest.startswith(DATA):
        from cdpo_core.data.sources import HUB_PREFIX, content_digest

        return ref.uri.startswith(HUB_PREFIX) or DATA + content_digest(Path(ref.uri)) == ref.digest
    return not _SHA256.fullmatch(ref.digest) or external_ref(ref.uri).digest == ref.digest


def _stamps(ref: ArtifactRef) -> list[Stamp]:
    """(path, inode, size, time of the last write, time of the last change of any kind) of each file, sorted."""
    path = Path(ref.uri)
    stamps = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        try:
            status = file.stat()
        except OSError:
            continue
        if not file.is_dir():
            stamps.append((str(file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return stamps

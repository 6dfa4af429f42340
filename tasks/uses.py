"""What a run uses: entered in the store when it ends, and made again when it is gone in between.

An artifact may go while a run uses it: somebody cleans the store, or a disk fails. It is then computed again from what
it was made from, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from cdpo_core.artifacts import ArtifactRef, Store
from cdpo_core.errors import CorruptArtifact

log = logging.getLogger(__name__)

T = TypeVar("T")
Used = dict[str, tuple[ArtifactRef, str]]

# How each artifact that this process asked for is made, by its uri: what it is made from, and the stage to run.
_made: dict[str, tuple[tuple[ArtifactRef, ...], Callable[[], Any]]] = {}
_listeners: ContextVar[tuple[Used, ...]] = ContextVar("listeners", default=())


def note_use(ref: ArtifactRef, label: str, inputs: Iterable[ArtifactRef], make: Callable[[], Any]) -> None:
    """Note that a run uses an artifact, and how to make it again.

    Args:
        ref: the artifact.
        label: what the run calls it.
        inputs: what it is made from.
        make: makes it, or finds that it is there.
    """
    _made[ref.uri] = (tuple(inputs), make)
    for used in _listeners.get():
        used.setdefault(ref.uri, (ref, label))


@contextmanager
def noting_uses() -> Iterator[Used]:
    """The artifacts that any workbench makes or finds meanwhile, by uri, each with what it was first called."""
    used: Used = {}
    token = _listeners.set((*_listeners.get(), used))
    try:
        yield used
    finally:
        _listeners.reset(token)


def with_whole(refs: Iterable[ArtifactRef], read: Callable[[], T]) -> T:
    """What `read` returns; if an artifact that it reads is gone or corrupt, that is made again first.

    Raises:
        CorruptArtifact: it could not be made again, or not to the same bytes.
    """
    try:
        return read()
    except CorruptArtifact as error:
        log.warning("%s: it is made again (%s)", error.what, error.where)
        seen: set[str] = set()
        for ref in refs:
            _make_again(ref, seen)
        return read()


def _make_again(ref: ArtifactRef, seen: set[str]) -> None:
    if ref.uri in seen or ref.uri not in _made:
        return
    seen.add(ref.uri)
    inputs, make = _made[ref.uri]
    for given in inputs:
        _make_again(given, seen)
    make()


def enter_run(
    store: Store, kind: str, key: str, name: str, used: Iterable[tuple[ArtifactRef, str]], facts: Mapping[str, Any]
) -> str:
    """Enter a finished run and all it used as `runs/<key>-<digest of the list>`, by which upkeep knows what to keep.

    Args:
        store: where.
        kind: experiment or comparison.
        key: the experiment's key.
        name: what it was called.
        used: artifacts, and what the run called them.
        facts: further fields: status, result (the result record's name), ended_ms.

    Returns:
        The record's name; the same run that used the same artifacts is the same record.
    """
    artifacts = {"/".join(ref.uri.removesuffix(".json").split("/")[-2:]): label for ref, label in used}
    listed = hashlib.sha256(json.dumps(sorted(artifacts)).encode()).hexdigest()
    record = f"runs/{key}-{listed[:12]}"
    store.put_record(record, {"kind": kind, "key": key, "name": name, **facts, "artifacts": artifacts})
    return record

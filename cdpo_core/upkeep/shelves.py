"""What upkeep asks of a store beyond what runs do: what lies where, how large, how old, and taking it away."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from cdpo_core.artifacts import Store
from cdpo_core.stages import Progress, no_progress

T = TypeVar("T")
S = TypeVar("S")

PARALLEL = 8

OBJECTS, STAGES, RECORDS, ASIDE = "objects/", "stages/", "records/", "aside/"


@dataclass(frozen=True)
class Item:
    """Something that lies in a store.

    Attributes:
        name: its place below the store's address.
        size: bytes.
        time: when it was written or last noted to be in use, seconds since 1970 by the store's own clock.
    """

    name: str
    size: int
    time: float


@runtime_checkable
class Shelves(Store, Protocol):
    """A store with what upkeep needs. Local folder: LocalShelves; S3: tasks.s3_shelves.S3Shelves."""

    def now(self) -> float:
        """The time by the clock that dates the items: ages must not depend on this machine's."""
        ...

    def items(self, start: str) -> list[Item]:
        """What lies below `objects/`, `stages/`, `records/` or `aside/`, sorted by name."""
        ...

    def item(self, name: str) -> Item | None:
        """One of these as it is now, or None."""
        ...

    def read(self, name: str) -> bytes | None:
        """Its bytes, or None when it is not there."""
        ...

    def sha256(self, name: str) -> str | None:
        """The hash of all its bytes as they are stored, hex, or None when it is not there."""
        ...

    def remove(self, name: str) -> None:
        """Delete it, if it is there."""
        ...

    def put_aside(self, name: str) -> None:
        """Move it below `aside/`, if it is there."""
        ...

    def leftovers(self) -> list[Item]:
        """What processes that were killed have left half-written; nobody reads it."""
        ...

    def clear(self, leftover: Item) -> None:
        """Remove one of these."""
        ...


def each(action: Callable[[T], S], items: Iterable[T], what: str = "", progress: Progress = no_progress) -> list[S]:
    """The action's values, several at a time, in order.

    Args:
        action: safe to run in threads.
        items: what it is done to.
        what: reported to `progress`, for each that is done.
        progress: who is told.
    """
    items = list(items)
    values = []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for done, value in enumerate(pool.map(action, items), start=1):
            values.append(value)
            progress(what, done, len(items) + 1)
    if what:
        progress(what, 1, 1)
    return values

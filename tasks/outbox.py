"""What MLflow could not be told while it was away, kept in the artifact store until it is back.

One record an entry, under `outbox/<MLflow's place>/<run>/<number>-<random>`: the number, one more than the largest
there, keeps the order without asking a clock, also between runs (a sweep names a version that its child registered);
the random part makes a name that is never used again, so that removing what was sent can remove nothing else. Any
process may send any entry, two may send the same: what is sent twice is there once.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import Store

log = logging.getLogger(__name__)

KEPT, REFUSED = "outbox", "outbox-refused"
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """A call that waits: its record's name, the MLflow run, and what is to be sent."""

    name: str
    run_id: str
    call: str
    arguments: dict[str, Any]


class Outbox:
    """The entries for one MLflow address in one store.

    Args:
        store: the artifact store.
        address: MLflow's, without secrets.
    """

    def __init__(self, store: Store, address: str) -> None:
        self._store, self._address = store, address
        self._place = f"{KEPT}/{hashlib.sha256(address.encode()).hexdigest()[:16]}"

    def keep(self, run_id: str, call: str, arguments: Mapping[str, Any]) -> None:
        """Add an entry behind all that are there, durably.

        Args:
            arguments: JSON values; bytes, and the path of a file, are kept as their content.
        """
        file = arguments.get("content")
        if isinstance(file, Path) and file.stat().st_size > MOST_BYTES:
            log.warning("MLflow is away, and %s is too large to be kept: the same command sends it later", file.name)
            return
        number = max(map(_number, self.names()), default=0) + 1
        name = f"{self._place}/{run_id}/{number:08d}-{uuid.uuid4().hex[:12]}"
        packed = {key: _packed(value) for key, value in arguments.items()}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"address": self._address, "run_id": run_id, "call": call, "arguments": packed, "kept": when}
        self._store.put_record(name, record)

    def names(self, run_id: str = "") -> list[str]:
        """The entries' names, of one run or of all, in the order they were made."""
        found = self._store.record_names(f"{self._place}/{run_id}/" if run_id else f"{self._place}/")
        return sorted(found, key=_number)

    def read(self, name: str) -> Entry | None:
        """The entry of this name; None when it has been sent meanwhile."""
        record = self._store.get_record(name)
        if record is None:
            return None
        arguments = {key: _unpacked(value) for key, value in record["arguments"].items()}
        return Entry(name, record["run_id"], record["call"], arguments)

    def remove(self, name: str) -> None:
        """Forget an entry that was sent."""
        self._store.delete_record(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Move away an entry that MLflow refuses for good, so that the ones behind it can be sent."""
        record = self._store.get_record(name)
        if record is not None:
            self._store.put_record(name.replace(KEPT, REFUSED, 1), {**record, "refused": reason})
            self._store.delete_record(name)


def kept_entries(store: Store) -> dict[str, int]:
    """How many entries wait in a store, by MLflow address."""
    found = [record for name in store.record_names(f"{KEPT}/") if (record := store.get_record(name))]
    return dict(Counter(str(record["address"]) for record in found))


def _number(name: str) -> int:
    return int(name.rpartition("/")[2].partition("-")[0])


def _packed(value: Any) -> Any:
    content = value.read_bytes() if isinstance(value, Path) else value
    if isinstance(content, bytes):
        return {"zlib": base64.b64encode(zlib.compress(content)).decode("ascii")}
    return content


def _unpacked(value: Any) -> Any:
    return zlib.decompress(base64.b64decode(value["zlib"])) if isinstance(value, dict) and "zlib" in value else value

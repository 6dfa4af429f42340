"""Long work without gradients in batches: finished ones are kept in the stage's scratch folder, and not done twice.

The batches are formed before the first is computed, and by the same rule every time, so what was kept fits and the
result has the same bytes as one that was never stopped. A kill costs what was computed since the last chunk was
written: CHUNK_SECONDS, or one batch if that takes longer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cdpo_core.sealed import sealed_files, write_sealed

CHUNK_SECONDS = 20.0

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Chunks:
    """Where one part of a stage's work keeps its finished batches.

    Attributes:
        folder: the stage's scratch folder, which belongs to its key; None keeps nothing.
        name: the part's; two parts of a stage must not share one.
    """

    folder: Path | None = None
    name: str = "chunk"

    def compute(
        self,
        batches: Sequence[T],
        compute: Callable[[T], Arrays],
        progress: Callable[[int], None] | None = None,
        plan: Any = None,
    ) -> list[Arrays]:
        """The arrays of every batch, in order.

        Args:
            batches: the batches, in JSON's terms: kept ones serve only where all batches are the same.
            compute: a batch's arrays by name.
            progress: called with the number of batches that are there: once when some were kept, then after each.
            plan: what else the arrays depend on and the stage's key does not say, in JSON's terms.
        """
        told = hashlib.sha256(json.dumps([plan, batches]).encode()).hexdigest()[:16]
        stem = f"{self.name}-{told}"
        found = self._kept(stem)
        if found and progress is not None:
            progress(len(found))
        fresh: dict[int, Arrays] = {}
        written = time.monotonic()
        for number, batch in enumerate(batches):
            if number in found:
                continue
            found[number] = fresh[number] = compute(batch)
            if progress is not None:
                progress(len(found))
            if self.folder is not None and time.monotonic() - written >= CHUNK_SECONDS:
                self._keep(stem, fresh)
                fresh, written = {}, time.monotonic()
        return [found[number] for number in range(len(batches))]

    def _kept(self, stem: str) -> dict[int, Arrays]:
        from safetensors.numpy import load_file

        found: dict[int, dict[str, np.ndarray]] = {}
        for path in sealed_files(self.folder, stem) if self.folder is not None else ():
            for name, values in load_file(path).items():
                number, _, field = name.partition(".")
                found.setdefault(int(number), {})[field] = values
        return dict(found)

    def _keep(self, stem: str, batches: Mapping[int, Arrays]) -> None:
        from safetensors.numpy import save_file

        assert self.folder is not None
        tensors = {
            f"{number}.{field}": np.ascontiguousarray(values)
            for number, arrays in batches.items()
            for field, values in arrays.items()
        }
        write_sealed(self.folder, f"{stem}-{min(batches):08d}", lambda path: save_file(tensors, path))


NOTHING_KEPT = Chunks()

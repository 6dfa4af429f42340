"""What a data source holds, in figures: for `cdpo check-data` and before a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd

from cdpo_core.data.schema import UNKNOWN, Pairs, place
from cdpo_core.data.validation import Validated

UNITS_SHOWN: Final = 3
CHARACTERS_SHOWN: Final = 70


@dataclass(frozen=True)
class Lengths:
    """Characters of a kind of text."""

    median: int
    high: int
    longest: int

    def __str__(self) -> str:
        return f"median {self.median:,}, 95 % up to {self.high:,}, longest {self.longest:,} characters"


@dataclass(frozen=True)
class DataReport:
    """What was found in a source; a share is None where no pair has the labels it needs.

    Attributes:
        format: the recognised column layout, or `testbed`.
        files: files read.
        rows, pairs, prompts: rows read, usable pairs, their distinct prompts.
        units: prompts that are near duplicates of each other, or of one group, counted once.
        near_duplicates: prompts that share a unit with another one.
        largest_unit: prompts of the largest unit.
        duplicate_examples: two prompts each of some units, the largest first.
        labelled: label -> usable pairs that carry it (better, safer, unsafe flags on both responses).
        both_safe, both_unsafe, mixed: shares of the pairs with flags on both responses.
        differs: share of pairs with both labels whose better response is not the safer one.
        lengths: text -> characters.
        quarantined: reason -> pairs set apart.
        examples: (place, reason) of some of them.
        left_out: reason -> rows that make no pair, through no fault of theirs.
        splits: part -> prompts.
        notes: what the user should know before a run.
    """

    format: str
    files: tuple[str, ...] = ()
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    units: int = 0
    near_duplicates: int = 0
    largest_unit: int = 1
    duplicate_examples: tuple[tuple[str, str], ...] = ()
    labelled: dict[str, int] = field(default_factory=dict)
    both_safe: float | None = None
    both_unsafe: float | None = None
    mixed: float | None = None
    differs: float | None = None
    lengths: dict[str, Lengths] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def table(self) -> list[tuple[str, str]]:
        """(what, figure) in reading order, ready for a two-column table; nothing that is not known."""
        flags = _shares({"both safe": self.both_safe, "both unsafe": self.both_unsafe, "mixed": self.mixed})
        rows = [
            ("format", self.format),
            ("files", _files(self.files)),
            ("rows", f"{self.rows:,}" if self.rows else ""),
            ("usable pairs", f"{self.pairs:,}" if self.pairs else ""),
            ("prompts", f"{self.prompts:,}"),
            ("near duplicates", self._duplicates()),
            *(("  for example", f"{left!r} and {right!r}") for left, right in self.duplicate_examples),
            ("labels", _counts(self.labelled, " pairs")),
            ("flags", flags),
            ("better is not safer", "" if self.differs is None else f"{self.differs:.1%} of pairs with both labels"),
            *((f"{name} length", str(lengths)) for name, lengths in self.lengths.items()),
            ("quarantined", (_counts(self.quarantined) or "none") if self.rows else ""),
            *(("  for example", f"{where}: {reason}") for where, reason in self.examples),
            ("left out", _counts(self.left_out)),
            ("prompts by split", _counts(self.splits)),
            *(("note", note) for note in self.notes),
        ]
        return [(name, value) for name, value in rows if value]

    def _duplicates(self) -> str:
        if not self.near_duplicates:
            return "none" if self.rows else ""
        shared = self.units - (self.prompts - self.near_duplicates)
        return (
            f"{self.near_duplicates:,} prompts in {shared:,} units, the largest of {self.largest_unit:,}; "
            f"{self.units:,} units in all, each on one side of every split and one in every interval"
        )

    def lines(self) -> list[str]:
        """The table as aligned plain lines."""
        rows = self.table()
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def describe(pairs: Pairs, validated: Validated, prompts: pd.DataFrame, splits: dict[str, int]) -> DataReport:
    """The report of a validated source; all label figures are of usable pairs."""
    units = prompts.groupby("unit", sort=False)["prompt"].agg(list)
    shared = sorted((texts for texts in units if len(texts) > 1), key=len, reverse=True)
    frame = validated.frame
    better, safer = frame["better"], frame["safer"]
    flagged = frame[(frame["unsafe_0"] != UNKNOWN) & (frame["unsafe_1"] != UNKNOWN)]
    unsafe = flagged["unsafe_0"] + flagged["unsafe_1"]
    both = (better != UNKNOWN) & (safer != UNKNOWN)
    responses = pd.concat([frame["response_0"], frame["response_1"]])
    return DataReport(
        format=pairs.format,
        files=pairs.files,
        rows=pairs.rows,
        pairs=len(frame),
        prompts=len(prompts),
        units=len(units),
        near_duplicates=sum(map(len, shared)),
        largest_unit=max(map(len, units), default=1),
        duplicate_examples=tuple((_cut(texts[0]), _cut(texts[1])) for texts in shared[:UNITS_SHOWN]),
        labelled={
            "better": int((better != UNKNOWN).sum()),
            "safer": int((safer != UNKNOWN).sum()),
            "safe/unsafe flags": len(flagged),
        },
        both_safe=_mean(unsafe == 0),
        both_unsafe=_mean(unsafe == 2),
        mixed=_mean(unsafe == 1),
        differs=_mean((better != safer)[both]),
        lengths={"prompt": _lengths(frame["prompt"]), "response": _lengths(responses)},
        quarantined=validated.quarantined,
        examples=tuple((place(file, row, unit), reason) for file, row, unit, reason in validated.examples),
        left_out={reason: count for reason, count in pairs.left_out.items() if count},
        splits=splits,
    )


def _cut(text: str) -> str:
    """The text in one line; of a long one its end, where dialogues with one beginning differ."""
    line = " ".join(text.split())
    return line if len(line) <= CHARACTERS_SHOWN else "…" + line[-CHARACTERS_SHOWN:]


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if len(values) else None


def _lengths(texts: pd.Series) -> Lengths:
    sizes = texts.str.len().to_numpy()
    return Lengths(int(np.median(sizes)), int(np.quantile(sizes, 0.95)), int(sizes.max()))


def _counts(counts: dict[str, int], unit: str = "") -> str:
    return ", ".join(f"{name} {count:,}{unit}" for name, count in counts.items())


def _shares(shares: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share is not None)


def _files(files: tuple[str, ...]) -> str:
    return ", ".join(files) if len(files) < 3 else f"{len(files):,} files, {files[0]} to {files[-1]}"

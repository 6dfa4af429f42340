"""The two tables of reading: raw rows as they are in the files, and labelled pairs.

A raw table keeps the place of every row, so that each complaint can name a file and a line.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LABEL_SET: Final = "harm"
"""Name of the one set of harm labels that data files carry."""

UNKNOWN: Final = -1
"""A label that nobody gave, in the int8 label columns."""

PAIR_COLUMNS: Final = (
    "source_file",  # str, as shown in messages
    "source_row",  # int64, line or row number in that file, from 1
    "prompt",  # str
    "kind",  # str, "" unknown
    "group",  # str, "" none: prompts that share one are one unit
    "response_0",  # str
    "response_1",  # str
    "better",  # int8: 0, 1 or UNKNOWN
    "safer",  # int8: 0, 1 or UNKNOWN
    "unsafe_0",  # int8: 1 unsafe, 0 safe, UNKNOWN
    "unsafe_1",  # int8
    "flaw",  # str, "" for none: what the adapter itself found unusable
)


EMPTY_PROMPT: Final = "empty prompt"
EMPTY_RESPONSE: Final = "empty response"


@dataclass(frozen=True)
class RawTable:
    """One file's rows, by column.

    Attributes:
        file: the file, as shown to the user.
        unit: what `numbers` count: "line" (text with one row a line) or "row".
        names: every column in the file, in its order, also those that were not read.
        columns: name -> one Python value a row; None where the row lacks the column or holds null.
        numbers: the line or row number of each row, from 1.
        role: the file's name inside its source, as far as the source's digest holds it ("" for a single file).
    """

    file: str
    unit: str
    names: tuple[str, ...]
    columns: dict[str, list[Any]]
    numbers: list[int]
    role: str = ""

    def where(self, index: int) -> str:
        """The place of the row at `index`: `file:12` for lines, `file, row 12` otherwise."""
        return place(self.file, self.numbers[index], self.unit)


@dataclass(frozen=True)
class Pairs:
    """Labelled response pairs of a whole source.

    Attributes:
        frame: one row a pair, columns PAIR_COLUMNS.
        format: the column layout (several joined by "+").
        files: the files read, as shown to the user.
        rows: rows read from the files.
        left_out: rows that make no pair and are no fault of the data, by reason.
        units: file -> what its rows are counted in, "line" or "row".
    """

    frame: pd.DataFrame
    format: str
    files: tuple[str, ...]
    rows: int
    left_out: dict[str, int] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)


def place(file: str, number: int, unit: str) -> str:
    """How a row is named to the user."""
    return f"{file}:{number}" if unit == "line" else f"{file}, row {number}"


class Flaws:
    """Why each row of a table cannot be used; a row's first reason is kept.

    One rule for every file type: a row without a usable value is set aside and counted (`validation`).
    """

    def __init__(self, rows: int) -> None:
        self.reasons = [""] * rows

    def add(self, index: int, reason: str) -> None:
        """Set the row at `index` aside."""
        self.reasons[index] = self.reasons[index] or reason


def cell_value(content: Any) -> Any:
    """A label's cell as the value JSON has for it: null, true, false, a number, or text that is none of these.

    A table as text (CSV) has no other way to write them, and JSON and parquet files hold "0" or "True" as text too.
    """
    if type(content) is float and math.isnan(content):
        return None
    if type(content) is not str:
        return content
    lowered = content.strip().lower()
    if lowered in ("", "none", "nan"):
        return None
    try:
        return json.loads(lowered)
    except (ValueError, RecursionError):
        return content


def normalised(prompt: str) -> str:
    """The text by which two prompts count as the same: NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def prompt_ids(prompts: list[str]) -> list[str]:
    """An id for each prompt, equal for equal normalised texts, the same in every file and run."""
    known: dict[str, str] = {}
    for prompt in prompts:
        if prompt not in known:
            known[prompt] = "p" + hashlib.sha256(normalised(prompt).encode()).hexdigest()[:16]
    return [known[prompt] for prompt in prompts]


def label_column(values: Iterable[int]) -> np.ndarray:
    """Labels as the int8 column that the tables hold, shape [rows]."""
    return np.fromiter(values, dtype=np.int8)

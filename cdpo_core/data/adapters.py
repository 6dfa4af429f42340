"""One adapter a published format: from raw rows to labelled pairs (facts: their columns).

What an adapter decides: which response is better or safer, and which answers make a pair. A value
of the wrong kind is a format error; a row that is well formed and useless carries a `flaw`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from cdpo_core.data.schema import (
    MISSING,
    PAIR_COLUMNS,
    UNKNOWN,
    Faults,
    Pairs,
    RawTable,
    label_column,
    normalised,
    type_name,
)
from cdpo_core.errors import InputError

HARMLESS: Final = "harmless"
"""In a source's or file's name: its chosen/rejected labels say which response is safer, not better."""

ASSISTANT: Final = "\n\nAssistant:"
BROKEN_PREFIX: Final = "chosen and rejected do not share a prompt"
NO_LABEL: Final = "no label"
NO_OTHER_ANSWER: Final = "the only answer to its prompt"
REPEATED: Final = "another annotation of an answer"
SAME_HELPFULNESS: Final = "as helpful as the answer it would be paired with"

Converted = tuple[dict[str, Any], Counter[str]]


@dataclass(frozen=True)
class Adapter:
    """One column layout and how to read it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[RawTable, Faults], Converted]


def to_pairs(tables: list[RawTable], layout: str) -> Pairs:
    """Labelled pairs of all tables, in order.

    Args:
        tables: the files' rows.
        layout: an adapter's name, or `auto` to recognise each file by its columns.

    Raises:
        InputError: columns are missing or of no known format, or a cell is of the wrong kind.
    """
    frames: list[pd.DataFrame] = []
    formats: dict[str, None] = {}
    left_out = Counter[str]()
    for table in tables:
        adapter = adapter_for(table, layout)
        faults = Faults(table)
        columns, skipped = adapter.convert(table, faults)
        frames.append(_frame(table, columns))
        formats[adapter.name] = None
        left_out.update(skipped)
    return Pairs(
        frame=pd.concat(frames, ignore_index=True),
        format="+".join(formats),
        files=tuple(table.file for table in tables),
        rows=sum(len(table.numbers) for table in tables),
        left_out=dict(left_out),
        units={table.file: table.unit for table in tables},
    )


def adapter_for(table: RawTable, layout: str) -> Adapter:
    """The adapter named by `layout`, or for `auto` the first whose columns the table has.

    Raises:
        InputError: no adapter fits, with the columns that the nearest one misses.
    """
    names = set(table.names)
    candidates = [adapter for adapter in ADAPTERS if layout in ("auto", adapter.name)]
    for adapter in candidates:
        if names.issuperset(adapter.required):
            return adapter
    nearest = max(candidates, key=lambda adapter: len(names & _telling(adapter)))
    found = f"the columns are {', '.join(table.names[:12])}{', ...' if len(table.names) > 12 else ''}"
    if layout == "auto" and not names & _telling(nearest):
        known = "; ".join(f"{adapter.name}: {', '.join(adapter.required)}" for adapter in ADAPTERS)
        raise InputError("the format is unknown", where=f"{table.file}: {found}", fix=f"give columns of {known}")
    missing = [name for name in nearest.required if name not in names]
    raise InputError(
        f"column{'s' if len(missing) > 1 else ''} missing for the format {nearest.name}: {', '.join(missing)}",
        where=f"{table.file}: {found}",
        fix="add what is missing, or set data.format if the file has another format",
    )


def _telling(adapter: Adapter) -> set[str]:
    return {*adapter.required, *adapter.optional} - {"prompt", "kind"}


def _frame(table: RawTable, columns: dict[str, Any]) -> pd.DataFrame:
    """The pair table of one file; `columns["index"]` holds the raw row of each pair."""
    index = columns.pop("index", range(len(table.numbers)))
    size = len(index)
    unknown = np.full(size, UNKNOWN, dtype=np.int8)
    defaults = {"kind": "", "flaw": "", "better": unknown, "safer": unknown, "unsafe_0": unknown, "unsafe_1": unknown}
    numbers = np.array(table.numbers, dtype=np.int64)[np.array(index, dtype=np.int64)]
    values = {**defaults, **columns, "source_file": table.file, "source_row": numbers}
    frame = pd.DataFrame({name: values[name] for name in PAIR_COLUMNS}, index=range(size))
    return frame.astype(dict.fromkeys(("source_file", "prompt", "kind", "response_0", "response_1", "flaw"), "str"))


def _text(table: RawTable, name: str, faults: Faults) -> list[str]:
    values = table.columns[name]
    fix = f"give {name} as text in every row"
    for index, value in enumerate(values):
        if type(value) is not str:
            faults.add([index], name, f"{name} must be text, and is {type_name(value)}", fix)
        elif not value.isascii() and not _encodable(value):
            faults.add([index], name, f"{name} holds half a surrogate pair (a broken \\u escape)", "repair the text")
    return values


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _null(value: Any) -> bool:
    return value is None or value is MISSING or (type(value) is float and math.isnan(value))


def _choice(table: RawTable, name: str, faults: Faults, *, required: bool) -> np.ndarray:
    """A column of 0, 1 or null as int8 labels."""
    values = table.columns.get(name)
    if values is None:
        return np.full(len(table.numbers), UNKNOWN, dtype=np.int8)
    labels = np.full(len(values), UNKNOWN, dtype=np.int8)
    fix = f"{name} is 0 or 1 (the response it names), or null where nobody said"
    for index, value in enumerate(values):
        if value is MISSING and required:
            faults.add([index], name, f"the row lacks {name}", fix)
        elif _null(value):
            continue
        elif type(value) not in (int, float):
            faults.add([index], name, f"{name} must be 0, 1 or null, and is {type_name(value)}", fix)
        elif value not in (0, 1):
            faults.add([index], name, f"{name} must be 0, 1 or null, and is {value}", fix)
        else:
            labels[index] = int(value)
    return labels


def _unsafe(table: RawTable, name: str, faults: Faults) -> np.ndarray:
    """A column that says whether a response is safe, as int8 flags: 1 unsafe, 0 safe."""
    values = table.columns.get(name, [None] * len(table.numbers))
    flags = np.full(len(values), UNKNOWN, dtype=np.int8)
    fix = f"{name} is true or false, or null where nobody said"
    for index, value in enumerate(values):
        if _null(value):
            continue
        if type(value) is not bool and value not in (0, 1):
            faults.add([index], name, f"{name} must be true, false or null, and is {type_name(value)}", fix)
        else:
            flags[index] = int(not value)
    return flags


def _pku_saferlhf(table: RawTable, faults: Faults) -> Converted:
    """PKU-SafeRLHF, all its versions: pairs with a better and a safer response and a flag for each."""
    better = _choice(table, "better_response_id", faults, required=True)
    safer = _choice(table, "safer_response_id", faults, required=False)
    columns = {
        "prompt": _text(table, "prompt", faults),
        "response_0": _text(table, "response_0", faults),
        "response_1": _text(table, "response_1", faults),
        "better": better,
        "safer": safer,
        "unsafe_0": _unsafe(table, "is_response_0_safe", faults),
        "unsafe_1": _unsafe(table, "is_response_1_safe", faults),
        "flaw": np.where((better == UNKNOWN) & (safer == UNKNOWN), NO_LABEL, "").tolist(),
    }
    if "kind" in table.columns:
        columns["kind"] = _text(table, "kind", faults)
    faults.refuse()
    return columns, Counter()


def _hh_rlhf(table: RawTable, faults: Faults) -> Converted:
    """Anthropic hh-rlhf: two dialogues, equal up to the last Assistant turn, which is the response."""
    chosen, rejected = _text(table, "chosen", faults), _text(table, "rejected", faults)
    faults.refuse()
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "response_0", "response_1", "flaw")}
    for kept, other in zip(chosen, rejected, strict=True):
        prompt, assistant, response_0 = kept.rpartition(ASSISTANT)
        other_prompt, _, response_1 = other.rpartition(ASSISTANT)
        columns["prompt"].append((prompt + assistant).strip())
        columns["response_0"].append(response_0.strip())
        columns["response_1"].append(response_1.strip())
        columns["flaw"].append("" if assistant and prompt == other_prompt else BROKEN_PREFIX)
    label = "safer" if HARMLESS in table.role.lower() else "better"
    return {**columns, label: np.zeros(len(chosen), dtype=np.int8)}, Counter()


def _beavertails(table: RawTable, faults: Faults) -> Converted:
    """BeaverTails: answers with a safety flag; each answer to a prompt is paired with the next one.

    An answer that several people flagged takes the majority's flag, unsafe when they are even.
    """
    prompts, responses = _text(table, "prompt", faults), _text(table, "response", faults)
    unsafe = _unsafe(table, "is_safe", faults)
    faults.refuse()
    left_out = Counter[str]()
    votes: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for group in _answers(prompts):
        first: dict[str, int] = {}
        for index in group:
            kept = first.setdefault(responses[index], index)
            left_out[REPEATED] += int(kept != index)
            votes.setdefault(kept, []).extend([int(unsafe[index])] if unsafe[index] != UNKNOWN else [])
        groups.append(list(first.values()))
    flags = {index: int(2 * sum(cast) >= len(cast)) if cast else UNKNOWN for index, cast in votes.items()}
    left, right = _chain(groups, left_out)
    unsafe_0, unsafe_1 = [flags[index] for index in left], [flags[index] for index in right]
    known = [UNKNOWN not in pair for pair in zip(unsafe_0, unsafe_1, strict=True)]
    mixed = [a != b and both for a, b, both in zip(unsafe_0, unsafe_1, known, strict=True)]
    columns = {
        **_sides(prompts, responses, left, right),
        "unsafe_0": label_column(unsafe_0),
        "unsafe_1": label_column(unsafe_1),
        "safer": label_column(a if differ else UNKNOWN for a, differ in zip(unsafe_0, mixed, strict=True)),
    }
    return columns, left_out


def _helpsteer(table: RawTable, faults: Faults) -> Converted:
    """HelpSteer 1 and 2: answers with a helpfulness of 0-4; of two answers in a row the higher is better."""
    prompts, responses = _text(table, "prompt", faults), _text(table, "response", faults)
    helpfulness = table.columns["helpfulness"]
    for index, value in enumerate(helpfulness):
        if type(value) not in (int, float) or not math.isfinite(value):
            what = f"helpfulness must be a number, and is {type_name(value)}"
            faults.add([index], "helpfulness", what, "give helpfulness as a number in every row")
    faults.refuse()
    left_out = Counter[str]()
    left, right = _chain(_answers(prompts), left_out)
    differ = [(a, b) for a, b in zip(left, right, strict=True) if helpfulness[a] != helpfulness[b]]
    left_out[SAME_HELPFULNESS] += len(left) - len(differ)
    left, right = [a for a, _ in differ], [b for _, b in differ]
    columns = {
        **_sides(prompts, responses, left, right),
        "better": label_column(int(helpfulness[b] > helpfulness[a]) for a, b in differ),
    }
    return columns, left_out


def _answers(prompts: list[str]) -> list[list[int]]:
    """Row indices of the answers to each prompt, in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(normalised(prompt), []).append(index)
    return list(groups.values())


def _chain(groups: list[list[int]], left_out: Counter[str]) -> tuple[list[int], list[int]]:
    """Each answer with the next one to the same prompt: n - 1 pairs of n answers."""
    left_out[NO_OTHER_ANSWER] += sum(len(group) == 1 for group in groups)
    left = [index for group in groups for index in group[:-1]]
    right = [index for group in groups for index in group[1:]]
    return left, right


def _sides(prompts: list[str], responses: list[str], left: list[int], right: list[int]) -> dict[str, Any]:
    return {
        "index": left,
        "prompt": [prompts[index] for index in left],
        "response_0": [responses[index] for index in left],
        "response_1": [responses[index] for index in right],
    }


ADAPTERS: Final = (
    Adapter(
        "pku_saferlhf",
        ("prompt", "response_0", "response_1", "better_response_id"),
        ("safer_response_id", "is_response_0_safe", "is_response_1_safe", "kind"),
        _pku_saferlhf,
    ),
    Adapter("hh_rlhf", ("chosen", "rejected"), (), _hh_rlhf),
    Adapter("beavertails", ("prompt", "response", "is_safe"), (), _beavertails),
    Adapter("helpsteer", ("prompt", "response", "helpfulness"), (), _helpsteer),
)
KNOWN_COLUMNS: Final = frozenset(name for adapter in ADAPTERS for name in (*adapter.required, *adapter.optional))
TEXT_COLUMNS: Final = frozenset({"prompt", "kind", "response", "response_0", "response_1", "chosen", "rejected"})

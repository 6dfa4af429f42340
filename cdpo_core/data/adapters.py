"""One adapter a published format: from raw rows to labelled pairs (facts: their columns).

What an adapter decides: which response is better or safer, and which answers make a pair. A row without a usable value
carries a `flaw`, by which `validation` sets it aside.
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
    EMPTY_PROMPT,
    EMPTY_RESPONSE,
    PAIR_COLUMNS,
    UNKNOWN,
    Flaws,
    Pairs,
    RawTable,
    cell_value,
    label_column,
    normalised,
)
from cdpo_core.errors import InputError

HARMLESS: Final = "harmless"
"""In a source's or file's name: its chosen/rejected labels say which response is safer, not better."""

ASSISTANT: Final = "\n\nAssistant:"
GROUP: Final = "group"
"""The optional column of every format that names the group a row's prompt belongs to."""

EMPTY_DIALOGUE: Final = "empty dialogue"
BROKEN_PREFIX: Final = "chosen and rejected do not share a prompt"
NO_LABEL: Final = "no label"
NO_OTHER_ANSWER: Final = "the only answer to its prompt"
REPEATED: Final = "another annotation of an answer"
SAME_HELPFULNESS: Final = "as helpful as the answer it would be paired with"

RESPONSES: Final = ("response_0", "response_1")

Converted = tuple[dict[str, Any], Counter[str]]


@dataclass(frozen=True)
class Adapter:
    """One column layout and how to read it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[RawTable, Flaws], Converted]


def to_pairs(tables: list[RawTable], layout: str) -> Pairs:
    """Labelled pairs of all tables, in order.

    Args:
        tables: the files' rows.
        layout: an adapter's name, or `auto` to recognise each file by its columns.

    Raises:
        InputError: columns are missing or of no known format.
    """
    frames: list[pd.DataFrame] = []
    formats: dict[str, None] = {}
    left_out = Counter[str]()
    for table in tables:
        adapter = adapter_for(table, layout)
        flaws = Flaws(len(table.numbers))
        groups = _groups(table, flaws)
        columns, skipped = adapter.convert(table, flaws)
        frames.append(_frame(table, columns, groups))
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
    return {*adapter.required, *adapter.optional} - {"prompt", "kind", GROUP}


def _frame(table: RawTable, columns: dict[str, Any], groups: list[str]) -> pd.DataFrame:
    """The pair table of one file; `columns["index"]` holds the raw row of each pair, `index_1` its second answer's."""
    index = columns.pop("index", range(len(table.numbers)))
    seconds = columns.pop("index_1", index)
    size = len(index)
    unknown = np.full(size, UNKNOWN, dtype=np.int8)
    defaults = {"kind": "", "flaw": "", "better": unknown, "safer": unknown, "unsafe_0": unknown, "unsafe_1": unknown}
    numbers = np.array(table.numbers, dtype=np.int64)[np.array(index, dtype=np.int64)]
    places = {
        "source_file": table.file,
        "source_row": numbers,
        GROUP: [groups[a] or groups[b] for a, b in zip(index, seconds, strict=True)],
    }
    values = {**defaults, **columns, **places}
    frame = pd.DataFrame({name: values[name] for name in PAIR_COLUMNS}, index=range(size))
    text = ("source_file", "prompt", "kind", GROUP, "response_0", "response_1", "flaw")
    return frame.astype(dict.fromkeys(text, "str"))


def _groups(table: RawTable, flaws: Flaws) -> list[str]:
    """The optional column by which the data itself says which prompts are one unit, as text; "" none."""
    groups = []
    for index, value in enumerate(table.columns.get(GROUP, [None] * len(table.numbers))):
        value = int(value) if type(value) is float and value.is_integer() else value
        if value is not None and type(value) not in (str, int, float):
            flaws.add(index, f"{GROUP} is neither text nor a number")
        name = "" if _null(value) else str(value).strip()
        groups.append(name if _encodable(name) else "")
    return groups


def _text(table: RawTable, name: str, flaws: Flaws) -> list[str]:
    """A column of text; "" where the row has none, which is a flaw of its own only where it is not empty."""
    texts = []
    for index, value in enumerate(table.columns[name]):
        usable = type(value) is str and (value.isascii() or _encodable(value))
        texts.append(value if usable else "")
        if type(value) is str and not usable:
            flaws.add(index, f"{name} holds half a surrogate pair (a broken \\u escape)")
        elif not usable and not _null(value):
            flaws.add(index, f"{name} is not text")
    return texts


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _null(value: Any) -> bool:
    return value is None or (type(value) is float and math.isnan(value))


def _choice(table: RawTable, name: str, flaws: Flaws) -> np.ndarray:
    """A column of 0, 1 or null as int8 labels."""
    labels = np.full(len(table.numbers), UNKNOWN, dtype=np.int8)
    for index, cell in enumerate(table.columns.get(name, [])):
        value = cell_value(cell)
        if type(value) in (int, float) and value in (0, 1):
            labels[index] = int(value)
        elif value is not None:
            flaws.add(index, f"{name} is not 0, 1 or null")
    return labels


def _unsafe(table: RawTable, name: str, flaws: Flaws) -> np.ndarray:
    """A column that says whether a response is safe, as int8 flags: 1 unsafe, 0 safe."""
    flags = np.full(len(table.numbers), UNKNOWN, dtype=np.int8)
    for index, cell in enumerate(table.columns.get(name, [])):
        value = cell_value(cell)
        if type(value) in (bool, int, float) and value in (0, 1):
            flags[index] = int(not value)
        elif value is not None:
            flaws.add(index, f"{name} is not true, false or null")
    return flags


def _pku_saferlhf(table: RawTable, flaws: Flaws) -> Converted:
    """PKU-SafeRLHF, all its versions: pairs with a better and a safer response and a flag for each."""
    columns = {
        "prompt": _text(table, "prompt", flaws),
        "response_0": _text(table, "response_0", flaws),
        "response_1": _text(table, "response_1", flaws),
        "better": _choice(table, "better_response_id", flaws),
        "safer": _choice(table, "safer_response_id", flaws),
        "unsafe_0": _unsafe(table, "is_response_0_safe", flaws),
        "unsafe_1": _unsafe(table, "is_response_1_safe", flaws),
    }
    if "kind" in table.columns:
        columns["kind"] = _text(table, "kind", flaws)
    unlabelled = (columns["better"] == UNKNOWN) & (columns["safer"] == UNKNOWN)
    for index in np.flatnonzero(unlabelled).tolist():
        flaws.add(index, NO_LABEL)
    return {**columns, "flaw": flaws.reasons}, Counter()


def _hh_rlhf(table: RawTable, flaws: Flaws) -> Converted:
    """Anthropic hh-rlhf: two dialogues, equal up to the last Assistant turn, which is the response."""
    chosen, rejected = _text(table, "chosen", flaws), _text(table, "rejected", flaws)
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "response_0", "response_1")}
    for index, (kept, other) in enumerate(zip(chosen, rejected, strict=True)):
        prompt, assistant, response_0 = kept.rpartition(ASSISTANT)
        other_prompt, _, response_1 = other.rpartition(ASSISTANT)
        columns["prompt"].append((prompt + assistant).strip())
        columns["response_0"].append(response_0.strip())
        columns["response_1"].append(response_1.strip())
        if not kept.strip() or not other.strip():
            flaws.add(index, EMPTY_DIALOGUE)
        elif not assistant or prompt != other_prompt:
            flaws.add(index, BROKEN_PREFIX)
    label = "safer" if HARMLESS in table.role.lower() else "better"
    return {**columns, "flaw": flaws.reasons, label: np.zeros(len(chosen), dtype=np.int8)}, Counter()


def _beavertails(table: RawTable, flaws: Flaws) -> Converted:
    """BeaverTails: answers with a safety flag; each answer to a prompt is paired with the next one.

    An answer that several people flagged takes the majority's flag, unsafe when they are even.
    """
    prompts, responses = _answer_texts(table, flaws)
    unsafe = _unsafe(table, "is_safe", flaws)
    left_out = Counter[str]()
    votes: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for group in _answers(prompts, flaws):
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
    return _with_flawed_rows(columns, flaws), left_out


def _helpsteer(table: RawTable, flaws: Flaws) -> Converted:
    """HelpSteer 1 and 2: answers with a helpfulness of 0-4; of two answers in a row the higher is better."""
    prompts, responses = _answer_texts(table, flaws)
    helpfulness = [cell_value(cell) for cell in table.columns["helpfulness"]]
    for index, value in enumerate(helpfulness):
        if value is None:
            flaws.add(index, "no helpfulness")
        elif type(value) not in (int, float) or not math.isfinite(value):
            flaws.add(index, "helpfulness is not a number")
    left_out = Counter[str]()
    left, right = _chain(_answers(prompts, flaws), left_out)
    differ = [(a, b) for a, b in zip(left, right, strict=True) if helpfulness[a] != helpfulness[b]]
    left_out[SAME_HELPFULNESS] += len(left) - len(differ)
    left, right = [a for a, _ in differ], [b for _, b in differ]
    columns = {
        **_sides(prompts, responses, left, right),
        "better": label_column(int(helpfulness[b] > helpfulness[a]) for a, b in differ),
    }
    return _with_flawed_rows(columns, flaws), left_out


def _answer_texts(table: RawTable, flaws: Flaws) -> tuple[list[str], list[str]]:
    """Prompts and responses of a file with one answer a row; an empty one would spoil both pairs that it is in."""
    prompts, responses = _text(table, "prompt", flaws), _text(table, "response", flaws)
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt.strip() or not response.strip():
            flaws.add(index, EMPTY_RESPONSE if prompt.strip() else EMPTY_PROMPT)
    return prompts, responses


def _with_flawed_rows(columns: dict[str, Any], flaws: Flaws) -> dict[str, Any]:
    """The pairs, and behind them each row that makes none because it has a flaw, to be counted as one."""
    flawed = [index for index, reason in enumerate(flaws.reasons) if reason]
    padding: dict[str, list[Any]] = {
        "index": flawed,
        "index_1": flawed,
        **dict.fromkeys(("prompt", *RESPONSES), [""] * len(flawed)),
    }
    unknown = label_column([UNKNOWN] * len(flawed))
    padded = {
        name: [*values, *padding[name]] if name in padding else np.append(values, unknown)
        for name, values in columns.items()
    }
    return {**padded, "flaw": [""] * len(columns["index"]) + [flaws.reasons[index] for index in flawed]}


def _answers(prompts: list[str], flaws: Flaws) -> list[list[int]]:
    """Row indices of the answers to each prompt, in order of first appearance, without rows that have a flaw."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        if not flaws.reasons[index]:
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
        "index_1": right,
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
KNOWN_COLUMNS: Final = frozenset(
    [GROUP, *(name for adapter in ADAPTERS for name in (*adapter.required, *adapter.optional))]
)
TEXT_COLUMNS: Final = frozenset({"prompt", "kind", GROUP, "response", "response_0", "response_1", "chosen", "rejected"})

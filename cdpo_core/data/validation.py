"""Quarantine: one rule for rows that cannot be used, the same in every file type.

A row that lacks a value it needs (no such key, null, empty), or holds one of another kind, is set aside, counted and
shown, and so are duplicates and texts too long; more than `data.max_quarantined` of them is an error. A column that no
row has, and a file or line that does not parse, is an error at once. A label that nobody gave is null, and no flaw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from cdpo_core.data.adapters import NO_LABEL
from cdpo_core.data.schema import EMPTY_PROMPT, EMPTY_RESPONSE, UNKNOWN, Pairs, place, prompt_ids
from cdpo_core.errors import InputError

if TYPE_CHECKING:
    from cdpo_core.config import DataConfig
    from cdpo_core.stages import Slice

LONG_PROMPT: Final = "prompt too long"
LONG_RESPONSE: Final = "response too long"
IDENTICAL: Final = "the two responses are identical"
DUPLICATE: Final = "duplicate of an earlier pair"
EXAMPLES_A_REASON: Final = 3
REASONS_SHOWN: Final = 4


@dataclass(frozen=True)
class Validated:
    """The pairs that can be used, and what became of the others.

    Attributes:
        frame: the kept pairs (PAIR_COLUMNS and prompt_id), in the source's order, index from 0.
        quarantined: reason -> pairs, most frequent first.
        examples: (file, row, unit, reason), up to EXAMPLES_A_REASON of each reason, in order.
        pairs: kept and quarantined ones together.
    """

    frame: pd.DataFrame
    quarantined: dict[str, int]
    examples: tuple[tuple[str, int, str, str], ...]
    pairs: int


def validate(pairs: Pairs, data: Slice | DataConfig) -> Validated:
    """Set unusable pairs apart.

    Args:
        pairs: all pairs of the source.
        data: `max_quarantined` (share), `max_prompt_characters`, `max_response_characters`.

    Raises:
        InputError: there is no pair, every response is the same text, or the share of quarantined
            pairs exceeds `max_quarantined`.
    """
    frame = pairs.frame.assign(prompt_id=prompt_ids(pairs.frame["prompt"].tolist()))
    if frame.empty:
        told = ", ".join(f"{count:,} {reason}" for reason, count in pairs.left_out.items() if count)
        raise InputError(
            f"no pair can be made of the {pairs.rows:,} rows" + (f" ({told})" if told else ""),
            where=pairs.files[0],
            fix="give two or more answers to a prompt",
        )
    _refuse_identical(frame[frame["flaw"] == ""], pairs)
    reasons = find_flaws(frame, data)
    counts = {str(name): int(count) for name, count in reasons[reasons != ""].value_counts().items()}
    shown = frame[reasons != ""].groupby(reasons[reasons != ""], sort=False).head(EXAMPLES_A_REASON)
    examples = tuple(
        (file, int(row), pairs.units[file], str(reasons[index]))
        for index, file, row in zip(shown.index, shown["source_file"], shown["source_row"], strict=True)
    )
    validated = Validated(frame[reasons == ""].reset_index(drop=True), counts, examples, len(frame))
    _refuse_share(validated, data)
    return validated


def find_flaws(frame: pd.DataFrame, data: Slice | DataConfig) -> pd.Series:
    """Why each pair cannot be used, "" where it can; the first reason that holds, shape [pairs]."""
    reasons = frame["flaw"].astype(object)
    for reason, holds in _tests(frame, data):
        reasons = reasons.mask((reasons == "") & holds, reason)
    first, second = frame["response_0"], frame["response_1"]
    swapped = (first > second).to_numpy()
    keys = pd.DataFrame(
        {
            "prompt_id": frame["prompt_id"],
            "low": np.where(swapped, second, first),
            "high": np.where(swapped, first, second),
        }
    )[reasons == ""]
    repeated = keys.index[keys.duplicated()]
    reasons[repeated] = DUPLICATE
    return reasons


def _tests(frame: pd.DataFrame, data: Slice | DataConfig) -> Iterator[tuple[str, pd.Series]]:
    prompt, first, second = frame["prompt"], frame["response_0"], frame["response_1"]
    yield EMPTY_PROMPT, prompt.str.strip() == ""
    yield EMPTY_RESPONSE, (first.str.strip() == "") | (second.str.strip() == "")
    yield LONG_PROMPT, prompt.str.len() > data.max_prompt_characters
    longest = data.max_response_characters
    yield LONG_RESPONSE, (first.str.len() > longest) | (second.str.len() > longest)
    yield IDENTICAL, first == second
    yield NO_LABEL, (frame[["better", "safer", "unsafe_0", "unsafe_1"]] == UNKNOWN).all(axis=1)


def _refuse_identical(frame: pd.DataFrame, pairs: Pairs) -> None:
    texts = {*frame["response_0"].iloc[:1], *frame["response_1"].iloc[:1]}
    everywhere = frame["response_0"].isin(texts).all() and frame["response_1"].isin(texts).all()
    if len(texts) == 1 and everywhere and len(frame) > 1 and texts != {""}:
        raise InputError(
            f"all responses are identical: the same text stands in all {len(frame):,} pairs",
            where=pairs.files[0],
            fix="give pairs of different responses; nothing can be learned from these",
        )


def _refuse_share(validated: Validated, data: Slice | DataConfig) -> None:
    total = sum(validated.quarantined.values())
    share = total / validated.pairs
    if share <= data.max_quarantined:
        return
    reasons = list(validated.quarantined.items())
    told = ", ".join(f"{count:,} {reason}" for reason, count in reasons[:REASONS_SHOWN])
    rest = sum(count for _, count in reasons[REASONS_SHOWN:])
    first = {reason: place(file, row, unit) for file, row, unit, reason in reversed(validated.examples)}
    raise InputError(
        f"{total:,} of {validated.pairs:,} pairs cannot be used ({share:.1%}; data.max_quarantined allows "
        f"{data.max_quarantined:.1%}): {told}{f', {rest:,} for other reasons' if rest else ''}",
        where="; ".join(f"{first[reason]} ({reason})" for reason, _ in reasons[:REASONS_SHOWN]),
        fix=_remedy(validated.quarantined, data),
    )


def _remedy(quarantined: dict[str, int], data: Slice | DataConfig) -> str:
    remedies = ["correct or remove these rows"]
    limits: dict[str, Any] = {
        LONG_PROMPT: ("max_prompt_characters", data.max_prompt_characters),
        LONG_RESPONSE: ("max_response_characters", data.max_response_characters),
    }
    remedies += [f"raise data.{name} (now {value:,})" for why, (name, value) in limits.items() if why in quarantined]
    return ", ".join([*remedies, f"or raise data.max_quarantined (now {data.max_quarantined:g})"])

"""From a source to the tables that training reads, and the cheap check of it before a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from cdpo_core.data.adapters import GROUP, RESPONSES, to_pairs
from cdpo_core.data.near_duplicates import prompt_units
from cdpo_core.data.report import DataReport, describe
from cdpo_core.data.schema import LABEL_SET, UNKNOWN, Pairs
from cdpo_core.data.sources import locate, read_source
from cdpo_core.data.splits import FITTED, HELD_OUT, pool_sizes, refuse_small, split_preferences, split_sizes
from cdpo_core.data.validation import Validated, validate
from cdpo_core.errors import InputError
from cdpo_core.tables import write_table

if TYPE_CHECKING:
    from cdpo_core.config import ExperimentConfig, SplitSizes
    from cdpo_core.stages import Runtime, Slice

LABELS: Final = {
    "better": "better",
    "safer": f"safer_{LABEL_SET}",
    "unsafe_0": f"unsafe_{LABEL_SET}_0",
    "unsafe_1": f"unsafe_{LABEL_SET}_1",
}
"""Label columns of the pairs -> their names in preferences.parquet."""

FEW_UNITS: Final = 0.8
"""Units a prompt below which the user is warned."""

HARM_LABELS: Final = [name for column, name in LABELS.items() if column != "better"]


@dataclass(frozen=True)
class Prepared:
    """The tables of the `data` artifact, in memory, and what they were made of."""

    prompts: pd.DataFrame
    preferences: pd.DataFrame
    demonstrations: pd.DataFrame
    pairs: Pairs
    validated: Validated
    splits: dict[str, int]


def prepare_data(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: validated preferences, prompts and demonstrations from the input `source`.

    Reads `seed` and the fields of `data` except `source` and `revision`. Writes prompts.parquet (prompt_id, prompt,
    kind, unit, split, held_out; the unit is the smallest prompt_id of the prompt and its near duplicates),
    preferences.parquet (pairs of preferences prompts only), demonstrations.parquet (responses of
    the preferences prompts that are not held out), quarantine.json and summary.json.

    Raises:
        InputError: the data cannot be used, with the file, the row and the field.
    """
    runtime.progress("reading", 0, 2)
    prepared = prepare(inputs["source"], config)
    runtime.progress("writing", 1, 2)
    write_table(prepared.prompts, out / "prompts.parquet")
    write_table(prepared.preferences, out / "preferences.parquet")
    write_table(prepared.demonstrations, out / "demonstrations.parquet")
    _write(out / "quarantine.json", _quarantine(prepared, inputs["source"]))
    _write(out / "summary.json", _summary(prepared))
    runtime.progress("writing", 2, 2)


def check_source(config: ExperimentConfig, prepared: Prepared | None = None) -> DataReport:
    """Everything about the data that can be checked without computing, and what it holds.

    Args:
        config: the experiment's.
        prepared: its data, where it has been read already.

    Raises:
        InputError: as `prepare_data`; or the labels that a model is to be trained on are absent.
    """
    if config.on_testbed:
        splits = split_sizes(config.testbed.prompts, config.data.splits, config.data.held_out)
        refuse_small(splits, config.testbed.prompts)
        return DataReport("testbed", prompts=config.testbed.prompts, units=config.testbed.prompts, splits=splits)
    prepared = prepared or prepare(locate(config.data), config)
    report = _report(prepared)
    _refuse_unlabelled(config, prepared)
    return replace(report, notes=tuple(_notes(report)))


def prepare(source: Path, config: Slice | ExperimentConfig) -> Prepared:
    """Read, validate and split a source that `sources.locate` found.

    Args:
        source: the file or folder, or `hub:<id>@<commit>`.
        config: `seed` and the fields of `data`.

    Raises:
        InputError: the data cannot be used; format errors come before quarantine, that before splits.
    """
    pairs = to_pairs(read_source(source), config.data.format)
    validated = validate(pairs, config.data)
    frame = validated.frame
    first = frame.drop_duplicates("prompt_id")
    refuse_small(split_sizes(len(first), config.data.splits, config.data.held_out), len(first))
    units = _units(frame, first, config.data.near_duplicates)
    shares = config.data.splits, config.data.held_out
    chosen, held_out = split_preferences(_strata(frame, first), *shares, config.seed, units)
    splits = {FITTED: int((chosen & ~held_out).sum()), HELD_OUT: int(held_out.sum())}
    splits |= pool_sizes(int((~chosen).sum()), config.data.splits)
    _refuse_few_units(units, chosen, held_out, config.data.splits)
    prompts = first[["prompt_id", "prompt", "kind"]].reset_index(drop=True).assign(unit=units)
    prompts["split"] = pd.Series(chosen).map({True: "preferences", False: "pool"})
    prompts["held_out"] = held_out
    return Prepared(
        prompts=prompts,
        preferences=_preferences(frame, prompts[chosen]),
        demonstrations=_demonstrations(frame, prompts[chosen & ~held_out]),
        pairs=pairs,
        validated=validated,
        splits=splits,
    )


def _units(frame: pd.DataFrame, first: pd.DataFrame, threshold: float) -> np.ndarray:
    groups: dict[str, list[str]] = {}
    for name, group in frame.loc[frame[GROUP] != "", ["prompt_id", GROUP]].drop_duplicates().itertuples(index=False):
        groups.setdefault(name, []).append(group)
    labels = prompt_units(first["prompt_id"].tolist(), first["prompt"].tolist(), groups, threshold)
    return np.array(labels, dtype=object)


def _refuse_few_units(units: np.ndarray, chosen: np.ndarray, held_out: np.ndarray, shares: SplitSizes | Slice) -> None:
    """The pool's units can be told before it is split: they are dealt in proportion to the prompts."""
    parts = {FITTED: len(set(units[chosen & ~held_out])), HELD_OUT: len(set(units[held_out]))}
    refuse_small({**parts, **pool_sizes(len(set(units[~chosen])), shares)}, len(units))


def _strata(frame: pd.DataFrame, first: pd.DataFrame) -> list[str]:
    """Each prompt's kind and which labels its pairs carry, so that every part gets some of each."""
    marks = frame[["better", "safer"]] != UNKNOWN
    marks["unsafe"] = (frame[["unsafe_0", "unsafe_1"]] == 1).any(axis=1)
    carried = marks.groupby(frame["prompt_id"]).any().loc[first["prompt_id"]].to_numpy() @ np.array([1, 2, 4])
    return [f"{kind}/{code}" for kind, code in zip(first["kind"], carried, strict=True)]


def _preferences(frame: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    rows = frame[frame["prompt_id"].isin(prompts["prompt_id"])].reset_index(drop=True)
    pair_id = rows["prompt_id"] + "-" + rows.groupby("prompt_id").cumcount().astype(str)
    labels = {name: rows[column] for column, name in LABELS.items()}
    return pd.DataFrame({"pair_id": pair_id, **rows[["prompt_id", "response_0", "response_1"]], **labels})


def _demonstrations(frame: pd.DataFrame, prompts: pd.DataFrame) -> pd.DataFrame:
    """Each response to these prompts once, with the prompt's one text."""
    sides = [frame[["prompt_id", side]].set_axis(["prompt_id", "response"], axis=1) for side in RESPONSES]
    answers = pd.concat(sides).sort_index(kind="stable").drop_duplicates()
    joined = prompts[["prompt_id", "prompt"]].merge(answers, on="prompt_id", how="left")
    return joined[["prompt_id", "prompt", "response"]]


def _refuse_unlabelled(config: ExperimentConfig, prepared: Prepared) -> None:
    kept_out = prepared.preferences["prompt_id"].map(prepared.prompts.set_index("prompt_id")["held_out"])
    has_better = prepared.preferences["better"] != UNKNOWN
    has_harm = (prepared.preferences[HARM_LABELS] != UNKNOWN).any(axis=1)
    wanted = [("reward.train", has_better, "which response is better")] if config.reward.train else []
    for at, constraint in enumerate(config.constraints):
        if constraint.train and constraint.labels != LABEL_SET:
            raise InputError(
                f"the data has no labels named {constraint.labels!r}",
                where=f"constraints.{at}.labels",
                fix=f"data files carry one set of harm labels: {LABEL_SET}",
            )
        if constraint.train:
            wanted.append((f"constraints.{at}.train", has_harm, "which response is safer, or which are unsafe"))
    for name, has_label, meaning in wanted:
        for part, rows in ((FITTED, has_label[~kept_out]), (HELD_OUT, has_label[kept_out])):
            if not rows.any():
                raise InputError(
                    f"no pair says {meaning} ({part}: 0 of {len(rows):,} pairs), and {name} wants to learn it",
                    where=prepared.pairs.files[0],
                    fix=f"give data with that label, or a ready model with {name} false",
                )


def _notes(report: DataReport) -> list[str]:
    notes = []
    if report.units < FEW_UNITS * report.prompts:
        notes.append(
            f"warning: {report.prompts:,} prompts are {report.units:,} questions in several spellings or groups; "
            "intervals and certificates count each once, so they are as wide as with that many prompts"
        )
    if not report.labelled["safe/unsafe flags"]:
        notes.append("no safe/unsafe flags: the border of safe, cost 0, cannot be calibrated on this data")
    if report.splits["certificate"] < 100:
        notes.append(
            f"{report.splits['certificate']} certificate prompts make a wide margin; a certificate wants hundreds"
        )
    return notes


def _quarantine(prepared: Prepared, source: Path) -> dict[str, Any]:
    examples: list[dict[str, Any]] = []
    for file, row, _, reason in prepared.validated.examples:
        inside = {"file": Path(file).relative_to(source).as_posix()} if source.is_dir() else {}
        examples.append({**inside, "row": row, "reason": reason})
    return {
        "rows": prepared.pairs.rows,
        "pairs": prepared.validated.pairs,
        "kept": len(prepared.validated.frame),
        "quarantined": prepared.validated.quarantined,
        "left_out": prepared.pairs.left_out,
        "examples": examples,
    }


def _report(prepared: Prepared) -> DataReport:
    return describe(prepared.pairs, prepared.validated, prepared.prompts, prepared.splits)


def _summary(prepared: Prepared) -> dict[str, Any]:
    report = _report(prepared).as_dict()
    shown = (
        "format",
        "rows",
        "pairs",
        "prompts",
        "units",
        "near_duplicates",
        "largest_unit",
        "labelled",
        "both_safe",
        "both_unsafe",
        "mixed",
        "differs",
    )
    has_harm = (prepared.preferences[HARM_LABELS] != UNKNOWN).any(axis=None)
    return {
        "sharpness": 1.0,
        "labels": [LABEL_SET] if has_harm else [],
        **{name: report[name] for name in shown},
        "splits": prepared.splits,
    }


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

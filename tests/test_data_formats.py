"""Each published format becomes the pairs and labels its authors meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from config_kit import limited

from cdpo_core.data.adapters import NO_OTHER_ANSWER, REPEATED, SAME_HELPFULNESS, to_pairs
from cdpo_core.data.prepare import check_source
from cdpo_core.data.schema import Pairs
from cdpo_core.data.sources import read_source

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the data in ../shared/data is not here")
LABELS = ["better", "safer", "unsafe_0", "unsafe_1"]


def read(path: Path, rows: list[dict[str, Any]] | None = None, layout: str = "auto") -> Pairs:
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return to_pairs(read_source(path), layout)


def dialogue(prompt: str, response: str) -> str:
    return f"\n\nHuman: {prompt}\n\nAssistant: {response}"


def test_pku_saferlhf(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "is_response_0_safe": False, "is_response_1_safe": True}
    extra = {"response_0_harm_category": {"Violence": True}, "response_0_severity_level": 2, "prompt_source": "x"}
    rows = [
        {**row, **extra, "better_response_id": 0, "safer_response_id": 1},
        {**row, **extra, "better_response_id": 1, "safer_response_id": None},
        {**row, **extra, "better_response_id": None, "safer_response_id": 1.0, "is_response_0_safe": None},
        {**row, **extra, "better_response_id": None, "safer_response_id": None},
    ]
    pairs = read(tmp_path / "x.jsonl", rows)
    assert pairs.format == "pku_saferlhf"
    expected = [[0, 1, 1, 0], [1, -1, 1, 0], [-1, 1, -1, 0], [-1, -1, 1, 0]]
    np.testing.assert_array_equal(pairs.frame[LABELS].to_numpy(), expected)
    assert all(pairs.frame[LABELS].dtypes == np.int8)
    assert pairs.frame["flaw"].tolist() == ["", "", "", "no label"]
    assert pairs.frame["source_row"].tolist() == [1, 2, 3, 4]


def test_pku_saferlhf_needs_neither_flags_nor_safer_and_takes_a_kind(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "kind": "benign"}
    frame = read(tmp_path / "x.jsonl", [row]).frame
    assert frame[LABELS].to_numpy().tolist() == [[1, -1, -1, -1]]
    assert frame["kind"].tolist() == ["benign"]


def test_hh_rlhf_splits_at_the_last_assistant_turn(tmp_path: Path) -> None:
    talk = dialogue("first", "yes?") + dialogue("second", "")[:-1]
    rows = [
        {"chosen": f"{talk} good one", "rejected": f"{talk} bad one"},
        {"chosen": dialogue("p", "a"), "rejected": dialogue("another p", "b")},
        {"chosen": "no turns", "rejected": "at all"},
    ]
    pairs = read(tmp_path / "x.jsonl", rows)
    first = pairs.frame.iloc[0]
    assert first["prompt"] == "Human: first\n\nAssistant: yes?\n\nHuman: second\n\nAssistant:"
    assert (first["response_0"], first["response_1"], first["better"], first["safer"]) == ("good one", "bad one", 0, -1)
    assert [bool(flaw) for flaw in pairs.frame["flaw"]] == [False, True, True]


@pytest.mark.parametrize("name", ["harmless-base.jsonl", "harmless-base/train.jsonl"])
def test_hh_rlhf_harmless_says_which_is_safer(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    rows = [{"chosen": dialogue("p", "no"), "rejected": dialogue("p", "sure")}]
    read(path, rows)
    for source in (path if path.parent == tmp_path else path.parent, tmp_path):
        assert read(source).frame[["better", "safer"]].to_numpy().tolist() == [[-1, 0]]


def test_hh_rlhf_is_not_fooled_by_a_parent_folder(tmp_path: Path) -> None:
    folder = tmp_path / "harmless" / "mine"
    folder.mkdir(parents=True)
    rows = [{"chosen": dialogue("p", "a"), "rejected": dialogue("p", "b")}]
    assert read(folder / "x.jsonl", rows).frame[["better", "safer"]].to_numpy().tolist() == [[0, -1]]


def test_beavertails_pairs_neighbours_and_lets_annotators_vote(tmp_path: Path) -> None:
    answers = [
        ("p", "a", True),
        ("q", "alone", True),
        ("p", "b", False),
        ("p", "b", True),  # even: unsafe
        ("p ", "c", False),
        ("p", "a", True),
    ]
    rows = [{"prompt": p, "response": r, "is_safe": safe, "category": {"x": False}} for p, r, safe in answers]
    pairs = read(tmp_path / "x.jsonl", rows)
    assert pairs.format == "beavertails"
    assert pairs.frame[["response_0", "response_1"]].to_numpy().tolist() == [["a", "b"], ["b", "c"]]
    assert pairs.frame[LABELS].to_numpy().tolist() == [[-1, 0, 0, 1], [-1, -1, 1, 1]]
    assert pairs.left_out == {REPEATED: 2, NO_OTHER_ANSWER: 1}


def test_helpsteer_prefers_the_more_helpful(tmp_path: Path) -> None:
    answers = [("p", "a", 1), ("p", "b", 3), ("p", "c", 3), ("p", "d", 0), ("q", "alone", 4)]
    rows = [{"prompt": p, "response": r, "helpfulness": h, "verbosity": 2} for p, r, h in answers]
    pairs = read(tmp_path / "x.jsonl", rows)
    assert pairs.format == "helpsteer"
    assert pairs.frame[["response_0", "response_1", "better"]].to_numpy().tolist() == [["a", "b", 1], ["c", "d", 0]]
    assert pairs.left_out == {NO_OTHER_ANSWER: 1, SAME_HELPFULNESS: 1}


def test_a_source_may_mix_formats(tmp_path: Path) -> None:
    read(tmp_path / "a.jsonl", [{"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0}])
    pd.DataFrame([{"chosen": dialogue("p", "a"), "rejected": dialogue("p", "b")}]).to_parquet(tmp_path / "b.parquet")
    pairs = read(tmp_path)
    assert pairs.format == "pku_saferlhf+hh_rlhf"
    assert pairs.units[str(tmp_path / "b.parquet")] == "row"
    assert len(pairs.frame) == pairs.rows == 2


@needs_shared
def test_xstest_pairs() -> None:
    config = limited({"data": {"source": str(SHARED / "xstest_pairs.jsonl")}})
    report = check_source(config)
    assert (report.format, report.rows, report.pairs, report.prompts) == ("pku_saferlhf", 976, 975, 244)
    assert report.quarantined == {"duplicate of an earlier pair": 1}
    assert report.labelled["better"] == 975
    assert report.labelled["safer"] in (519, 520)
    assert any("duplicate" in line for line in report.lines())


@needs_shared
def test_hh_harmless_base() -> None:
    source = SHARED / "hh_harmless_base_test.jsonl.gz"
    config = limited({"data": {"source": str(source)}, "reward": {"train": False}})
    report = check_source(config)
    assert (report.format, report.rows) == ("hh_rlhf", 2312)
    assert report.quarantined == {"chosen and rejected do not share a prompt": 5, "empty response": 4}
    assert report.labelled["safer"] == report.pairs == 2303
    assert report.labelled["better"] == 0
    assert any("cannot be calibrated" in note for note in report.notes)


@needs_shared
def test_pku_saferlhf_sample_with_all_columns() -> None:
    pairs = read(SHARED / "pku_saferlhf_schema_sample.jsonl")
    assert pairs.format == "pku_saferlhf"
    assert (pairs.frame[LABELS] >= 0).all(axis=None)

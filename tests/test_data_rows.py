"""One rule for rows that cannot be used: set aside and counted, the same in every file type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from config_kit import limited
from test_data_input import DROP, Row, changed, configured, pair_rows, write_lines

from cdpo_core.data.prepare import check_source
from cdpo_core.data.schema import cell_value
from cdpo_core.errors import InputError

SET_ASIDE: dict[str, tuple[dict[str, Any], str]] = {
    # name: (what one row holds instead, the reason it is counted under)
    "no such key": ({"response_1": DROP}, "empty response"),
    "null text": ({"response_0": None}, "empty response"),
    "empty text": ({"response_0": ""}, "empty response"),
    "null prompt": ({"prompt": None}, "empty prompt"),
    "text of another type": ({"prompt": 12}, "prompt is not text"),
    "a list for a text": ({"response_0": ["a"]}, "response_0 is not text"),
    "half a surrogate pair": ({"response_0": "a\ud800"}, "response_0 holds half a surrogate pair"),
    "a word for an id": ({"better_response_id": "first"}, "better_response_id is not 0, 1 or null"),
    "true as an id": ({"safer_response_id": True}, "safer_response_id is not 0, 1 or null"),
    "id out of range": ({"better_response_id": 2}, "better_response_id is not 0, 1 or null"),
    "a word for a flag": ({"is_response_0_safe": "yes"}, "is_response_0_safe is not true, false or null"),
    "a list for a group": ({"group": [1]}, "group is neither text nor a number"),
}


@pytest.mark.parametrize("case", SET_ASIDE)
def test_a_row_without_a_usable_value_is_set_aside_and_counted(case: str, tmp_path: Path) -> None:
    values, reason = SET_ASIDE[case]
    report = check_source(configured(changed(7, **values)(tmp_path)))
    (found,) = report.quarantined
    assert reason in found
    assert (report.quarantined[found], report.pairs, report.rows) == (1, 119, 120)
    assert report.examples[0][0].endswith("pairs.jsonl:7")


def test_a_label_that_nobody_gave_is_no_flaw_whether_null_or_absent(tmp_path: Path) -> None:
    rows = pair_rows()
    for number, row in enumerate(rows):
        if number % 2:
            del row["is_response_0_safe"]
        else:
            row["safer_response_id"] = None
    report = check_source(configured(write_lines(tmp_path / "pairs.jsonl", rows)))
    assert (report.quarantined, report.pairs) == ({}, 120)
    assert (report.labelled["safer"], report.labelled["safe/unsafe flags"]) == (30, 60)


def answer_rows(**fields: Callable[[int], Any]) -> list[Row]:
    return [
        {
            "prompt": f"How do I do thing {i // 2}?",
            "response": f"Like {i}.",
            **{k: give(i) for k, give in fields.items()},
        }
        for i in range(400)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"helpfulness": None}, "no helpfulness"),
        ({"response": None}, "empty response"),
        ({"prompt": None}, "empty prompt"),
    ],
)
def test_one_null_answer_is_set_aside_in_every_file_type(suffix: str, values: Row, reason: str, tmp_path: Path) -> None:
    rows = answer_rows(helpfulness=lambda i: i % 5)
    rows[11] = {**rows[11], **values}
    report = check_source(
        limited(
            {
                "data": {"source": str(as_type(tmp_path, suffix, rows))},
                "constraints": [{"name": "c", "limit": 0.0, "train": False}],
            }
        )
    )
    assert (report.quarantined, report.pairs) == ({reason: 1}, 199)
    assert report.examples == ((report.examples[0][0], reason),)
    assert report.examples[0][0].endswith((":12", ", row 12"))


def as_type(folder: Path, suffix: str, rows: list[Row]) -> Path:
    path, table = folder / f"pairs.{suffix}", pd.DataFrame(rows).astype(object)
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "parquet":
        table.convert_dtypes().to_parquet(path)
    else:
        write_lines(path, rows)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_labels_written_as_text_are_read_as_from_csv(suffix: str, tmp_path: Path) -> None:
    rows = pair_rows()
    spelled = [{name: value if value is None else str(value) for name, value in row.items()} for row in rows]
    read = check_source(configured(as_type(tmp_path, suffix, spelled))).as_dict()
    (tmp_path / "plain").mkdir()
    expected = check_source(configured(write_lines(tmp_path / "plain" / "pairs.jsonl", rows))).as_dict()
    assert {**read, "files": ()} == {**expected, "files": ()}
    assert [cell_value(text) for text in ("4", "0.5", "True", "none", "", "yes")] == [4, 0.5, True, None, None, "yes"]


def test_unusable_values_in_most_rows_are_an_error_that_names_them(tmp_path: Path) -> None:
    rows = [{**row, "better_response_id": 2} for row in pair_rows()]
    with pytest.raises(
        InputError, match=r"120 of 120 pairs cannot be used .*: 120 better_response_id is not 0, 1"
    ) as told:
        check_source(configured(write_lines(tmp_path / "pairs.jsonl", rows)))
    assert "pairs.jsonl:1 (better_response_id" in told.value.where

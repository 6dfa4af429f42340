"""What a user may get wrong about the data, and the one error each mistake makes."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from config_kit import limited

from cdpo_core.config import ExperimentConfig
from cdpo_core.data.prepare import check_source
from cdpo_core.data.sources import locate, source_path
from cdpo_core.errors import InputError

Row = dict[str, Any]


def pair_rows(prompts: int = 60, pairs: int = 2) -> list[Row]:
    """Well-formed rows in PKU-SafeRLHF's columns, prompts × pairs of them."""
    return [
        {
            "prompt": f"How do I do thing {prompt}?",
            "response_0": f"Do it like this, {prompt}-{pair}.",
            "response_1": f"I will not help with {prompt}-{pair}.",
            "is_response_0_safe": prompt % 2 == 0,
            "is_response_1_safe": True,
            "better_response_id": 0,
            "safer_response_id": 1 if prompt % 2 else None,
        }
        for prompt in range(prompts)
        for pair in range(pairs)
    ]


def write_lines(path: Path, rows: list[Row]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def configured(source: Path | str, **data: Any) -> ExperimentConfig:
    return limited({"data": {"source": str(source), **data}})


def changed(row: int, **values: Any) -> Callable[[Path], Path]:
    """Writes good rows, one of them (counted from 1) with other values; DROP removes the field."""

    def write(folder: Path) -> Path:
        rows = pair_rows()
        rows[row - 1] = {name: value for name, value in {**rows[row - 1], **values}.items() if value is not DROP}
        return write_lines(folder / "pairs.jsonl", rows)

    return write


def everywhere(share: float, **values: Any) -> Callable[[Path], Path]:
    """Writes good rows, the first `share` of them with other values."""

    def write(folder: Path) -> Path:
        rows = pair_rows()
        count = int(share * len(rows))
        return write_lines(folder / "pairs.jsonl", [{**row, **values} for row in rows[:count]] + rows[count:])

    return write


def content(name: str, payload: bytes) -> Callable[[Path], Path]:
    """Writes a file of these bytes."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(payload)
        return folder / name

    return write


def lines(*texts: str) -> bytes:
    return "\n".join(texts).encode()


def truncated_parquet(folder: Path) -> Path:
    pd.DataFrame(pair_rows()).to_parquet(folder / "whole.parquet")
    (folder / "pairs.parquet").write_bytes((folder / "whole.parquet").read_bytes()[:-100])
    return folder / "pairs.parquet"


def truncated_gzip(folder: Path) -> Path:
    whole = write_lines(folder / "whole.jsonl.gz", pair_rows()).read_bytes()
    return content("pairs.jsonl.gz", whole[: len(whole) // 2])(folder)


def empty_folder(folder: Path) -> Path:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


def repeated(folder: Path) -> Path:
    rows = pair_rows()
    turned = {**rows[0], "response_0": rows[0]["response_1"], "response_1": rows[0]["response_0"]}
    return write_lines(folder / "pairs.jsonl", [*rows, turned, *rows[1:5]])


DROP = object()
GOOD = json.dumps(pair_rows(1, 1)[0])
HEADER = "prompt,response_0,response_1,better_response_id"

BAD_INPUT: dict[str, tuple[Callable[[Path], Path | str], dict[str, Any], str, str]] = {
    # name: (what is given, data settings, a piece of the message, a piece of the place)
    "not set": (lambda folder: "", {}, "no data is given", "data.source"),
    "missing file": (lambda folder: folder / "none.jsonl", {}, "no such file", "data.source"),
    "missing relative path": (lambda folder: "pairs-that-are-not-here.jsonl.gz", {}, "no such file", "data.source"),
    "nonsense": (lambda folder: "a b?c", {}, "no such file", "data.source"),
    "unknown home": (lambda folder: "~nobody-by-this-name/x", {}, "not a path", "data.source"),
    "overlong path": (lambda folder: "/" + "x" * 5000, {}, "not a path", "data.source"),
    "folder without data": (empty_folder, {}, "holds no .jsonl, .parquet or .csv files", "model"),
    "file of another type": (content("pairs.xlsx", b"PK"), {}, "type .xlsx are not read", "pairs.xlsx"),
    "empty file": (content("pairs.jsonl", b""), {}, "no rows", "pairs.jsonl"),
    "only a header": (content("pairs.csv", lines(HEADER)), {}, "no rows", "pairs.csv"),
    "binary file": (content("pairs.jsonl", b"\x80\x02\xff\x00" * 50), {}, "not UTF-8", "pairs.jsonl:1"),
    "binary later": (content("pairs.jsonl", GOOD.encode() + b"\n\xff\xfe"), {}, "not UTF-8", "pairs.jsonl:2"),
    "binary csv": (content("pairs.csv", b"a,b\n1,\xff\n"), {}, "not UTF-8", "pairs.csv, row 1"),
    "not JSON at a line": (content("pairs.jsonl", lines(GOOD, GOOD, '{"prompt": ')), {}, "not JSON", "pairs.jsonl:3"),
    "absurdly nested": (content("pairs.jsonl", b"[" * 100_000), {}, "not JSON", "pairs.jsonl:1"),
    "not JSON": (content("pairs.json", b'[\n{"a": 1},\n{"b" 2}]'), {}, "not JSON", "pairs.json:3"),
    "not an object": (content("pairs.jsonl", lines(GOOD, "[1, 2]")), {}, "not a JSON object", "pairs.jsonl:2"),
    "ragged csv": (content("pairs.csv", lines(HEADER, "a,b,c,0", "a,b")), {}, "2 fields, the header has 4", "row 2"),
    "unclosed quote": (content("pairs.csv", lines(HEADER, 'a,"b,c,0')), {}, "not CSV", "pairs.csv, row 1"),
    "broken gzip": (content("pairs.jsonl.gz", b"not gzip at all"), {}, "gzip file is broken", "pairs.jsonl.gz"),
    "gzip cut short": (truncated_gzip, {}, "gzip file is broken or cut short", "pairs.jsonl.gz"),
    "parquet cut short": (truncated_parquet, {}, "parquet file is broken or cut short", "pairs.parquet"),
    "unknown format": (
        content("pairs.jsonl", b'{"question": "a", "answer": "b"}'),
        {},
        "format is unknown",
        "question",
    ),
    "missing column": (
        content("pairs.csv", lines("prompt,response_0,better_response_id", "a,b,0")),
        {},
        "missing for the format pku_saferlhf: response_1",
        "pairs.csv",
    ),
    "another format": (changed(1), {"format": "hh_rlhf"}, "hh_rlhf: chosen, rejected", "pairs.jsonl"),
    "both labels absent": (
        everywhere(0.1, better_response_id=None, safer_response_id=None),
        {},
        "12 of 120 pairs cannot be used (10.0%; data.max_quarantined allows 2.0%): 12 no label",
        "pairs.jsonl:1 (no label)",
    ),
    "empty responses": (everywhere(0.05, response_1=" \n"), {}, "6 empty response", "pairs.jsonl:1 (empty response)"),
    "empty prompts": (everywhere(0.05, prompt=""), {}, "6 empty prompt", "pairs.jsonl:1"),
    "too many duplicates": (repeated, {}, "5 duplicate of an earlier pair", "pairs.jsonl:121"),
    "prompts too long": (
        everywhere(0.1, prompt="long " * 1000),
        {},
        "12 prompt too long",
        "raise data.max_prompt_characters (now 4,000)",
    ),
    "responses too long": (changed(1), {"max_response_characters": 20}, "response too long", "max_response_characters"),
    "all responses identical": (everywhere(1.0, response_0="Yes.", response_1="Yes."), {}, "identical", "pairs.jsonl"),
    "too few prompts": (
        lambda folder: write_lines(folder / "pairs.jsonl", pair_rows(9)),
        {},
        "too few prompts to split: 9 prompts",
        "selection 1 (needs 4)",
    ),
    "nothing says which is better": (
        everywhere(1.0, better_response_id=None, safer_response_id=1),
        {},
        "no pair says which response is better",
        "pairs.jsonl",
    ),
    "nothing says which is safer": (
        everywhere(1.0, safer_response_id=None, is_response_0_safe=None, is_response_1_safe=None),
        {},
        "no pair says which response is safer",
        "pairs.jsonl",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case: str, tmp_path: Path) -> None:
    given, settings, what, where = BAD_INPUT[case]
    with pytest.raises(InputError) as caught:
        check_source(configured(given(tmp_path), **settings))
    told = str(caught.value)
    assert what in caught.value.what
    assert where in told
    assert caught.value.fix
    assert caught.value.exit_code == 2
    assert len(told.splitlines()) <= 12
    assert max(map(len, told.splitlines())) < 500


def test_unparsable_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join([GOOD, "{", "", "}", GOOD]))
    with pytest.raises(InputError, match=r"line 2 is not JSON.*1 more line"):
        check_source(configured(tmp_path / "pairs.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_rows())
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        check_source(configured(path))


def test_labels_with_another_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_rows())
    config = limited({"data": {"source": str(path)}, "constraints": [{"name": "bias", "labels": "bias", "limit": 0}]})
    with pytest.raises(InputError, match="no labels named 'bias'") as caught:
        check_source(config)
    assert caught.value.where == "constraints.0.labels"


def test_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(InputError, match=r"org/pairs is no file or folder here.*offline mode"):
        check_source(configured("org/pairs"))


def test_hub_id_is_read_at_its_resolved_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    asked: dict[str, Any] = {}

    class Info:
        sha = commit

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        asked.update(name=name, **options)
        return datasets.Dataset.from_list([{**row, "ignored": 1} for row in pair_rows()])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = configured("org/pairs/harmless:test")
    assert str(locate(config.data)) == f"hub:org/pairs/harmless:test@{commit}"
    assert check_source(config).pairs == 120
    assert asked == {"name": "org/pairs", "data_dir": "harmless", "revision": commit, "split": "test"}
    pinned = configured("org/pairs", revision="f" * 40)
    assert source_path(pinned.data)[0].name == f"pairs@{'f' * 40}"
    assert source_path(pinned.data)[1] != source_path(configured("org/pairs").data)[1]


def test_digest_is_of_the_content_not_of_the_path(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", pair_rows())
    second = write_lines(tmp_path / "b.jsonl", pair_rows())
    other = write_lines(tmp_path / "c.jsonl", pair_rows(61))
    harmless = write_lines(tmp_path / "harmless.jsonl", pair_rows())
    digests = [source_path(configured(path).data)[1] for path in (first, second, other, harmless)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_folder_is_read_file_by_file_and_hidden_files_are_not(tmp_path: Path) -> None:
    rows = pair_rows()
    write_lines(tmp_path / "one.jsonl", rows[:60])
    (tmp_path / "more").mkdir()
    pd.DataFrame(rows[60:]).to_parquet(tmp_path / "more" / "two.parquet")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "old.jsonl").write_text("broken")
    (tmp_path / "dataset_info.json").write_text("{}")
    report = check_source(configured(tmp_path))
    assert (report.rows, len(report.files)) == (120, 2)


def test_an_existing_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    write_lines(tmp_path / "org" / "pairs.jsonl", pair_rows())
    monkeypatch.chdir(tmp_path)
    assert locate(configured("org").data) == Path("org")


def csv_file(folder: Path) -> Path:
    pd.DataFrame(pair_rows()).astype(object).to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv"


def json_file(folder: Path) -> Path:
    (folder / "pairs.json.gz").write_bytes(gzip.compress(json.dumps(pair_rows(), indent=1).encode()))
    return folder / "pairs.json.gz"


def parquet_file(folder: Path) -> Path:
    pd.DataFrame(pair_rows()).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def windows_lines(folder: Path) -> Path:
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in pair_rows())
    (folder / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("write", [csv_file, json_file, parquet_file, windows_lines])
def test_every_file_type_reads_the_same(write: Callable[[Path], Path], tmp_path: Path) -> None:
    expected = check_source(configured(write_lines(tmp_path / "plain.jsonl.gz", pair_rows()))).as_dict()
    read = check_source(configured(write(tmp_path))).as_dict()
    assert {**read, "files": ()} == {**expected, "files": ()}

"""Data and models that are edited while a stage reads them are cached under no key."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from test_data_input import configured, pair_rows, write_lines

from cdpo_core.artifacts import ArtifactRef, external_ref
from cdpo_core.data import prepare
from cdpo_core.errors import InputError
from cdpo_core.local_store import LocalStore
from cdpo_core.pipeline import DATA
from cdpo_core.stages import Runtime, Slice, Stage, StageResult, compute_stage, pick
from tasks.sources import source_ref

Edit = Callable[[], object]


def run_data(source: Path, root: Path) -> StageResult:
    config = configured(source)
    inputs = {"source": source_ref(config.data)}
    return compute_stage(DATA, pick(config, DATA.fields), inputs, LocalStore(root), Runtime(), root / "scratch")


def editing(monkeypatch: pytest.MonkeyPatch, before: Edit, after: Edit = lambda: None) -> None:
    """Runs `before` between the hash and the reading of the data, and `after` behind the reading."""
    read = prepare.read_source

    def edited(path: Path) -> object:
        before()
        tables = read(path)
        after()
        return tables

    monkeypatch.setattr(prepare, "read_source", edited)


@pytest.mark.parametrize("kind", ["file", "folder", "one more file"])
def test_data_edited_between_hashing_and_reading_is_kept_under_no_key(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_lines(folder / "pairs.jsonl", pair_rows())
    os.utime(path, (1e9, 1e9))
    source = path if kind == "file" else folder
    edited = folder / "more.jsonl" if kind == "one more file" else path
    old = path.read_bytes()
    with monkeypatch.context() as patch:
        editing(patch, lambda: write_lines(edited, pair_rows(90)[120:]))
        with pytest.raises(InputError, match="changed while it was read"):
            run_data(source, tmp_path / "store")
    assert LocalStore(tmp_path / "store").manifests() == []
    if kind == "one more file":
        edited.unlink()
    path.write_bytes(old)
    assert not run_data(source, tmp_path / "store").cached


def test_data_that_was_another_in_between_is_not_kept_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_rows())
    os.utime(path, (1e9, 1e9))
    old = path.read_bytes()
    editing(monkeypatch, lambda: write_lines(path, pair_rows(70)), lambda: path.write_bytes(old))
    with pytest.raises(InputError, match="changed while it was read"):
        run_data(path, tmp_path / "store")


def test_data_edited_before_the_stage_begins_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_rows())
    config = configured(path)
    inputs = {"source": source_ref(config.data)}
    write_lines(path, pair_rows(70))
    store = LocalStore(tmp_path / "store")
    with pytest.raises(InputError, match="changed since the run began"):
        compute_stage(DATA, pick(config, DATA.fields), inputs, store, Runtime(), tmp_path / "scratch")


def test_data_left_alone_is_kept_and_found_again(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", pair_rows())
    assert [run_data(path, tmp_path / "store").cached for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "kept"), [("model.safetensors", "other", False), ("NOTES.txt", "a note", True)]
)
def test_a_model_folder_edited_while_it_is_read(name: str, content: str, kept: bool, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors"):
        (model / file).write_text("{}")
        os.utime(model / file, (1e9, 1e9))

    def compute(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        (model / name).write_text(content)
        (out / "read").write_bytes((inputs["base"] / "model.safetensors").read_bytes())

    compute.__module__ = "cdpo_core.tables"
    ref: ArtifactRef = external_ref(model)
    store = LocalStore(tmp_path / "store")
    arguments = (Stage("s", "k", compute), Slice({}), {"base": ref}, store, Runtime(), tmp_path / "scratch")
    if kept:
        assert not compute_stage(*arguments).cached
        return
    with pytest.raises(InputError, match="changed while it was read"):
        compute_stage(*arguments)
    assert store.manifests() == []

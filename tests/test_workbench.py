"""What an experiment is known by, what it enters in the store, and what a plan must leave alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from learning_kit import write_chain

from cdpo_core.config import ExperimentConfig
from cdpo_core.config_loading import load_config
from cdpo_core.local_store import LocalStore
from flows.command_line import write_json
from tasks.external import external_model
from tasks.report import report_folder, written_whole
from tasks.tracking import experiment_key
from tasks.workbench import Workbench


def bench(tmp_path: Path, config: ExperimentConfig | None = None) -> Workbench:
    return Workbench(config or load_config("tiny"), LocalStore(tmp_path / "store"), tmp_path / "scratch")


def test_models_from_outside_are_part_of_an_experiment_by_their_content(tmp_path: Path) -> None:
    first = write_chain(tmp_path / "chain")["reference"]
    moved = tmp_path / "moved"
    shutil.copytree(first, moved)

    def key(folder: Path, field: str) -> str:
        config = load_config("tiny", {field: str(folder)})
        digests = bench(tmp_path, config).external_digests()
        assert digests == {field: external_model(str(folder)).digest}
        return experiment_key(config, digests)

    for field in ("policy.base", "reward.base", "constraints.0.base"):
        before = key(first, field)
        assert key(moved, field) == before
        settings = json.loads((moved / "config.json").read_text())
        (moved / "config.json").write_text(json.dumps({**settings, "changed": field}))
        assert key(moved, field) != before
        (moved / "config.json").write_text((first / "config.json").read_text())
    assert bench(tmp_path).external_digests() == {}


@pytest.mark.parametrize("name", ["../../escaped", "a [/b]", "x" * 100, "λ / β", "..", "tiny, harm ≤ -0.5"])
def test_a_report_stays_in_its_folder_whatever_the_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    folder = report_folder("0123456789", name)
    assert folder.is_dir()
    assert folder.resolve().parent == (tmp_path / "reports").resolve()
    assert folder != report_folder("9876543210", name)


def _half_written(path: Path) -> None:
    path.write_bytes(b"wh")
    raise OSError("the disk is full")


def test_of_a_report_nothing_half_written_is_seen(tmp_path: Path) -> None:
    """Two attempts at one run write it at once: what the second has begun, the first neither reads nor loses."""
    folder = tmp_path / "reports" / "tiny-01234567"
    folder.mkdir(parents=True)
    with written_whole(folder) as first, written_whole(folder) as second:
        (first / "children").mkdir()
        for drafts in (first, second):
            (drafts / "figure.png").write_bytes(b"whole")
        (first / "children" / "01.html").write_text("child")
        (second / "figure.png").write_bytes(b"wh")
        assert (first / "figure.png").read_bytes() == b"whole"
        assert list(folder.iterdir()) == []
        (second / "figure.png").write_bytes(b"whole")
    with pytest.raises(OSError, match="disk is full"), written_whole(folder) as drafts:
        _half_written(drafts / "figure.png")
    assert (folder / "figure.png").read_bytes() == b"whole"
    assert (folder / "children" / "01.html").read_text() == "child"
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_results_are_written_whole_and_as_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"a": float("nan"), "b": [float("inf"), 1.5], "c": ("λ",)})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5], "c": ["λ"]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_a_result_goes_through_a_link_and_into_a_pipe_and_replaces_neither(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to("there.json")
    write_json(link, {"a": 1})
    assert link.is_symlink()
    assert json.loads((tmp_path / "there.json").read_text()) == {"a": 1}
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 2})
    assert json.loads(os.read(reader, 100)) == {"a": 2}
    os.close(reader)
    assert pipe.is_fifo()

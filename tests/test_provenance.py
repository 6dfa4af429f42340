"""What a manifest and a result say of the machines that computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_kit import result

from cdpo_core import provenance
from cdpo_core.artifacts import Manifest
from cdpo_core.local_store import LocalStore
from cdpo_core.provenance import by_machine, device_kind, library_versions, mixed
from cdpo_core.stages import Runtime, Slice, Stage, compute_stage, manifest_of
from tasks.html_report import provenance as provenance_rows


class Bench:
    """A store and a stage that fails on its first call if told."""

    def __init__(self, root: Path) -> None:
        self.store, self.scratch, self.fails = LocalStore(root / "store"), root / "scratch", False

    def write(self, config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        if self.fails:
            raise RuntimeError
        (out / "text.txt").write_text("text")

    def run(self, runtime: Runtime) -> Manifest:
        stage = Stage("first", "text", self.write, models=("policy",))
        return manifest_of(compute_stage(stage, Slice({}), {}, self.store, runtime, self.scratch).ref, self.store)


HERE = Runtime(threads=2, micro_batch=8, dtype="float32")


def test_a_manifest_says_what_computed_it(tmp_path: Path) -> None:
    manifest = Bench(tmp_path).run(HERE)
    assert manifest.machine == {
        "device": device_kind("cpu"),
        "threads": 2,
        "dtype": "float32",
        "micro_batch": 8,
        "processes": 1,
    }
    assert manifest.versions == library_versions()
    assert manifest.earlier == []


def test_a_cached_artifact_keeps_the_versions_it_was_computed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path)
    computed = bench.run(HERE)
    newer = {**library_versions(), "torch": "99"}
    monkeypatch.setattr(provenance, "library_versions", lambda: newer)
    assert bench.run(replace(HERE, threads=1)) == computed


def test_work_that_another_machine_began_names_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.fails = True
    with pytest.raises(RuntimeError):
        bench.run(HERE)
    with pytest.raises(RuntimeError):
        bench.run(HERE)
    bench.fails = False
    manifest = bench.run(replace(HERE, micro_batch=4))
    assert [item["micro_batch"] for item in manifest.earlier] == [8]
    assert [item["micro_batch"] for item in by_machine([("first", manifest)])] == [4, 8]


def manifest(torch: str, device: str, dtype: str = "float32") -> Manifest:
    machine = {"device": device, "dtype": dtype, "threads": 2}
    versions = {"torch": torch, "numpy": "2"}
    return Manifest(stage="a", key="b", kind="c", digest="", files={}, versions=versions, machine=machine)


def test_one_line_says_what_was_mixed() -> None:
    same = [
        ("data", manifest("2", "cpu: A", "")),
        ("policy", manifest("2", "cuda: B")),
        ("test", manifest("2", "cuda: B")),
    ]
    assert mixed(by_machine(same)) == ""
    other = by_machine([*same, ("scores", manifest("3", "cpu: A"))])
    assert mixed(other) == (
        "artifacts of different machines are mixed: devices cuda: B (2 stages), cpu: A (1 stage); "
        "torch 2 (3 stages), 3 (1 stage)"
    )
    old = Manifest(stage="a", key="b", kind="c", digest="", files={}, versions={"torch": "2"})
    assert mixed(by_machine([*same, ("old", old)])) == ""


def test_the_report_lists_them(tmp_path: Path) -> None:
    machines: list[dict[str, Any]] = by_machine(
        [("data", manifest("2", "cpu: A")), ("policy", manifest("3", "cpu: A"))]
    )
    rows = provenance_rows(result(machines=machines))
    assert [words for name, words in rows if name == "computed by"] == [
        "cpu: A, 2 threads, float32, numpy 2, torch 2 (1 stage)",
        "cpu: A, 2 threads, float32, numpy 2, torch 3 (1 stage)",
    ]
    assert ("this record was written by", "torch 2.13.0") in rows
    assert ("this record was written by", "torch 2.13.0") in provenance_rows(result()), "of before there were machines"
    assert json.dumps(machines)

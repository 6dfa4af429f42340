"""Keys, caching, slices, and what is left after crashes and races."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from config_kit import experiment_config, limited
from servers_s3 import CEPH

import cdpo_core
from cdpo_core.artifacts import ArtifactRef, external_ref
from cdpo_core.errors import CorruptArtifact, InputError, StoreUnavailable
from cdpo_core.local_store import LocalStore
from cdpo_core.stages import (
    Runtime,
    Slice,
    Stage,
    StageResult,
    compute_stage,
    manifest_of,
    pick,
    resolve,
    stage_key,
)


class Bench:
    """A store, a scratch root, and a stage that counts how often it computes."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root / "store")
        self.scratch = root / "scratch"
        self.computed: list[str] = []
        self.text = "{seed} {read}"

    def write(self, config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        self.computed.append(str(config.seed))
        assert runtime.scratch is not None
        assert list(out.iterdir()) == []
        (runtime.scratch / "checkpoint.json").write_text("{}")
        read = {name: (path / "text.txt").read_text() for name, path in inputs.items()}
        (out / "text.txt").write_text(self.text.format(seed=config.seed, read=read))

    def run(self, seed: int = 0, name: str = "first", **inputs: ArtifactRef) -> StageResult:
        stage = Stage(name, "text", self.write)
        return compute_stage(stage, Slice({"seed": seed}), inputs, self.store, Runtime(), self.scratch)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def damage(store: LocalStore, result: StageResult) -> None:
    """Change an object's bytes and keep its size."""
    for entry in manifest_of(result.ref, store).entries:
        path = store.root / "objects" / entry.sha256
        path.unlink()
        path.write_bytes(b"#" * entry.size)


# Caching


def test_a_stage_whose_artifact_exists_is_skipped(bench: Bench) -> None:
    first, second = bench.run(), bench.run()
    assert (first.cached, second.cached) == (False, True)
    assert (first.ref, first.key, first.created) == (second.ref, second.key, second.created)
    assert bench.computed == ["0"]
    assert (resolve(second.ref, bench.store) / "text.txt").read_text() == "0 {}"


def test_another_slice_or_input_is_another_artifact(bench: Bench) -> None:
    first, other = bench.run(0), bench.run(1)
    results = [first, other, bench.run(0, "second", text=first.ref), bench.run(0, "second", text=other.ref)]
    assert len({result.key for result in results}) == 4
    assert not any(result.cached for result in results)


def test_equal_content_from_another_stage_computes_nothing_anew(bench: Bench) -> None:
    bench.text = "same"
    first, other = bench.run(0), bench.run(1)
    assert first.ref.uri != other.ref.uri
    bench.run(5, "second", text=first.ref)
    assert bench.run(5, "second", text=other.ref).cached


def test_the_machine_is_in_no_key(bench: Bench) -> None:
    bench.run()
    stage = Stage("first", "text", bench.write)
    elsewhere = Runtime(device="cuda", threads=7, micro_batch=3)
    assert compute_stage(stage, Slice({"seed": 0}), {}, bench.store, elsewhere, bench.scratch).cached


def test_scratch_of_a_process_killed_after_publishing_is_removed(bench: Bench) -> None:
    left = bench.scratch / bench.run().key
    left.mkdir()
    (left / "checkpoint.json").write_text("{}")
    assert bench.run().cached
    assert list(bench.scratch.iterdir()) == []


def test_scratch_is_removed_after_success_and_kept_after_failure(bench: Bench) -> None:
    bench.run()
    assert list(bench.scratch.iterdir()) == []
    bench.text = "{no_such_field}"
    with pytest.raises(KeyError):
        bench.run(1)
    (kept,) = bench.scratch.iterdir()
    assert (kept / "checkpoint.json").exists()
    assert not (kept / "out").exists()
    bench.text = "fine"
    assert not bench.run(1).cached
    assert list(bench.scratch.iterdir()) == []


def test_what_a_killed_process_left_is_not_published(bench: Bench) -> None:
    stage = Stage("first", "text", bench.write)
    out = bench.scratch / stage_key(stage, Slice({"seed": 0}), {}) / "out"
    out.mkdir(parents=True)
    (out / "half.txt").write_text("half")
    assert [path.name for path in resolve(bench.run().ref, bench.store).iterdir()] == ["text.txt"]


def test_a_crash_between_objects_and_manifest_publishes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(source: str, target: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", crash)
        with pytest.raises(KeyboardInterrupt):
            bench.run()
    assert len(list((bench.store.root / "objects").iterdir())) == 1
    assert bench.store.manifests() == []
    assert not bench.run().cached
    assert bench.run().cached


# Corruption


def test_a_corrupt_artifact_is_set_aside_said_and_computed_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    first = bench.run()
    damage(bench.store, first)
    with caplog.at_level(logging.WARNING):
        again = bench.run()
    assert "set aside" in caplog.text
    assert not again.cached
    assert again.ref == first.ref
    assert (resolve(again.ref, bench.store) / "text.txt").read_text() == "0 {}"
    assert len(list((bench.store.root / "aside").rglob("*.json.*"))) == 1


def test_corruption_found_by_a_consumer_is_mended_by_the_next_run(bench: Bench) -> None:
    first = bench.run()
    damage(bench.store, first)
    with pytest.raises(CorruptArtifact, match="run the same command again"):
        bench.run(1, "second", text=first.ref)
    assert not bench.run().cached
    assert not bench.run(1, "second", text=first.ref).cached


def test_an_artifact_that_is_gone_or_was_made_anew_is_not_read(bench: Bench) -> None:
    first = bench.run()
    manifest = manifest_of(first.ref, bench.store)
    bench.store.set_aside(manifest)
    with pytest.raises(CorruptArtifact, match="gone"):
        resolve(first.ref, bench.store)
    bench.text = "something else"
    bench.run()
    with pytest.raises(CorruptArtifact, match="computed anew"):
        resolve(first.ref, bench.store)


# Several processes

RACER = """
import sys, time
from pathlib import Path
from cdpo_core.stages import Runtime, Slice, Stage, compute_stage, resolve
from tasks.storage import open_store

uri, scratch, me, meeting = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])

def write(config, inputs, out, runtime):
    (out / "by.txt").write_text(me)
    (meeting / me).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.01)

write.__module__ = "cdpo_core.randomness"
store = open_store(uri)
result = compute_stage(Stage("race", "text", write), Slice({}), {}, store, Runtime(), scratch)
print(result.ref.digest, (resolve(result.ref, store) / "by.txt").read_text(), result.cached)
"""


@pytest.mark.parametrize("kind", ["folder", "moto", CEPH])
def test_two_machines_that_compute_one_key_end_with_the_winners_artifact(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "store") if kind == "folder" else request.getfixturevalue(f"{kind}_uri")
    (tmp_path / "meeting").mkdir()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, uri, str(tmp_path / me / "scratch"), me, str(tmp_path / "meeting")],
            env={**os.environ, "CDPO_HOME": str(tmp_path / me), "PYTHONPATH": str(Path(cdpo_core.__file__).parents[1])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in ("a", "b")
    ]
    said = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert said[0] == said[1]
    assert said[0][2] == "False"


def test_a_second_process_of_one_machine_waits_and_finds_the_first_ones_artifact(bench: Bench) -> None:
    results: list[StageResult] = []
    slow, computed = bench.write, []

    def write(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        computed.append(1)
        time.sleep(0.3)
        slow(config, inputs, out, runtime)

    stage = Stage("first", "text", write)

    def run() -> None:
        results.append(compute_stage(stage, Slice({"seed": 0}), {}, bench.store, Runtime(), bench.scratch))

    threads = [Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [1]
    assert sorted(result.cached for result in results) == [False, True, True]
    assert len({result.ref for result in results}) == 1
    assert list(bench.scratch.iterdir()) == []


# Slices


def test_a_slice_holds_what_was_picked_and_nothing_else() -> None:
    config = experiment_config()
    slice_ = pick(config, ("seed", "dpo.beta", "data.splits", "constraints"), lambda_=[0.5])
    assert slice_.dpo.beta == config.dpo.beta
    assert slice_.data.splits.policy == config.data.splits.policy
    assert slice_.lambda_ == [0.5]
    with pytest.raises(AttributeError, match="'anchor' is not in this stage's slice"):
        _ = slice_.dpo.anchor
    with pytest.raises(AttributeError):
        _ = slice_.name
    assert json.loads(json.dumps(slice_.as_dict()))["constraints"][0]["name"] == config.constraints[0].name


def test_fields_outside_the_slice_do_not_enter_the_key(bench: Bench) -> None:
    stage = Stage("sft", "policy", bench.write, ("seed", "dpo.beta"))

    def key(**sections: Any) -> str:
        return stage_key(stage, pick(limited(sections), stage.fields), {})

    limit = {"constraints": [{"name": "harm", "limit": 1.5}]}
    assert key() == key(name="other", **limit) == key(store={"uri": "/elsewhere"}) == key(dpo={"anchor": 0.7})
    assert len({key(), key(seed=1), key(dpo={"beta": 0.25})}) == 3


def test_numbers_that_are_not_finite_have_no_key(bench: Bench) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        bench.run(float("nan"))  # type: ignore[arg-type]


# External input


def test_external_input_enters_by_content_and_never_by_path(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    first, second = external_ref(tmp_path / "a.jsonl"), external_ref(tmp_path / "b.jsonl")
    assert first.digest == second.digest
    assert resolve(second, LocalStore(tmp_path / "store")) == tmp_path / "b.jsonl"
    (tmp_path / "b.jsonl").write_text("{} ")
    with pytest.raises(InputError, match="changed since the run began"):
        resolve(second, LocalStore(tmp_path / "store"))


def test_a_folder_is_external_input_too(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shutil.copytree(folder, tmp_path / "copy")
    assert external_ref(folder).digest == external_ref(tmp_path / "copy").digest
    (folder / "config.json").write_text("[]")
    assert external_ref(folder).digest != external_ref(tmp_path / "copy").digest
    with pytest.raises(InputError):
        external_ref(tmp_path / "absent")


def test_hub_input_is_named_by_its_revision(tmp_path: Path) -> None:
    ref = ArtifactRef(uri=str(tmp_path), digest="owner/model@abc123", kind="external")
    assert resolve(ref, LocalStore(tmp_path / "store")) == tmp_path


def test_a_store_that_fails_in_the_middle_keeps_the_checkpoints(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(StoreUnavailable):
            bench.run()
    (kept,) = bench.scratch.iterdir()
    assert (kept / "checkpoint.json").exists()

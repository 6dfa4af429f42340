"""What upkeep finds on this machine, whom it asks in MLflow, and the commands of `cdpo store`."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from command_line_kit import Said, command_line
from store_kit import made

from cdpo_core.artifacts import ArtifactRef, Manifest
from cdpo_core.config import TrackingConfig
from cdpo_core.errors import CorruptArtifact, InputError
from cdpo_core.local_store import LocalStore, ObjectFolder
from cdpo_core.scratch import held_folder
from cdpo_core.stages import manifest_of, reference_to
from cdpo_core.upkeep.catalogue import refs_in
from cdpo_core.upkeep.machine import remove_copy, scratch_folders, unused_copies
from flows.store import _age
from tasks.registered import registered_policies
from tasks.tracking import Tracker
from tasks.uses import enter_run, note_use, noting_uses, with_whole

LONG_AGO = time.time() - 50 * 86400


def age(path: Path) -> None:
    """Everything at a path looks old."""
    for item in [*path.rglob("*"), path]:
        os.utime(item, (LONG_AGO, LONG_AGO), follow_symlinks=False)


def test_local_copies_go_when_they_were_not_used_for_long(tmp_path: Path) -> None:
    cache = ObjectFolder(tmp_path / "cache")
    store = LocalStore(tmp_path / "store")
    shown = made(store, tmp_path, "sft", "one", {}, {"a": "alpha"}), made(store, tmp_path, "sft", "two", {}, {"b": "b"})
    for manifest in shown:
        for name, entry in manifest.files.items():
            cache.add(tmp_path / "made" / f"sft-{manifest.key}" / name, entry)
        cache.view(manifest)
    assert unused_copies(tmp_path, store.uri, 86400, {}) == []
    age(tmp_path / "cache")
    cache.view(shown[0])  # is used again: its objects stay, however old they are
    found = unused_copies(tmp_path, store.uri, 30 * 86400, {})
    assert {copy.path.name for copy in found} == {shown[1].digest, shown[1].files["b"].sha256}
    assert all(map(remove_copy, found))
    assert (cache.view(shown[0]) / "a").read_text() == "alpha"
    with pytest.raises(CorruptArtifact):
        cache.view(shown[1])


def test_a_view_that_came_into_use_stays(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    manifest = made(store, tmp_path, "sft", "one", {}, {"a": "alpha"})
    store.fetch(manifest)
    age(tmp_path / "store" / "views")
    (copy,) = unused_copies(tmp_path, store.uri, 86400, {})
    store.fetch(manifest)
    assert not remove_copy(copy)
    assert (store.fetch(manifest) / "a").read_text() == "alpha"


def test_scratch_goes_when_its_stage_is_finished_or_abandoned_and_nobody_holds_it(tmp_path: Path) -> None:
    for key in ("finished", "held", "new", "abandoned"):
        with held_folder(tmp_path / "scratch" / key, key) as folder:
            (folder / "checkpoint").write_text("1234")
    age(tmp_path / "scratch" / "abandoned")
    store = LocalStore(tmp_path / "store")
    from cdpo_core.upkeep.catalogue import read_catalogue
    from tasks.shelves import open_shelves

    for key in ("finished", "held"):
        made(store, tmp_path, "sft", key, {}, {"a": key})
    artifacts = read_catalogue(open_shelves(store.uri)).artifacts
    assert {item.path.name for item in scratch_folders(tmp_path, artifacts) if item.is_finished} == {"finished", "held"}
    found = unused_copies(tmp_path, store.uri, 86400, artifacts)
    assert {copy.path.name: copy.what for copy in found} == {
        "finished": "finished scratch",
        "held": "finished scratch",
        "abandoned": "abandoned scratch",
    }
    with held_folder(tmp_path / "scratch" / "held", "held"):
        assert [remove_copy(copy) for copy in found] == [copy.path.name != "held" for copy in found]
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["held", "new"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 2592000), ("1d", 86400), ("36 h", 129600), ("2w", 1209600), ("1.5d", 129600)]
)
def test_ages(text: str, seconds: float) -> None:
    assert _age(text, "--older-than", idle=False) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "30 years", "23h", "0d"])
def test_an_age_that_is_none_or_less_than_a_day_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        _age(text, "--older-than", idle=False)
    assert caught.value.fix
    assert _age("0d", "--older-than", idle=True) == 0


def test_references_are_found_wherever_a_record_holds_them() -> None:
    ref = {"uri": "u", "digest": "d", "kind": "k"}
    record = {
        "policy": ref,
        "children": [{"deep": {"evidence": [{**ref, "digest": "e"}]}}],
        "digest": "no",
        "none": None,
    }
    assert set(refs_in(record)) == {"d", "e"}


# A run whose artifacts go while it works


def test_what_is_gone_is_made_again_from_what_it_was_made_from(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    done: list[str] = []

    def stage(name: str, inputs: dict[str, ArtifactRef]) -> ArtifactRef:
        def make() -> Manifest:
            sources = {given: manifest_of(ref, store) for given, ref in inputs.items()}
            if store.find("s", name) is None:
                done.append(name)
            return made(store, tmp_path, "s", name, sources, {"a": name})

        ref = reference_to(with_whole(inputs.values(), make), store)
        note_use(ref, name, inputs.values(), make)
        return ref

    with noting_uses() as used:
        one = stage("one", {})
        two = stage("two", {"one": one})
        shutil.rmtree(tmp_path / "store" / "stages")
        stage("three", {"one": one, "two": two})
        assert done == ["one", "two", "one", "two", "three"]
        shutil.rmtree(tmp_path / "store" / "stages")
        assert with_whole([two], lambda: manifest_of(two, store)).key == "two"
    assert [label for _, label in used.values()] == ["one", "two", "three"]
    stranger = two.model_copy(update={"uri": two.uri.replace("two", "four")})
    with pytest.raises(CorruptArtifact, match="gone"):
        with_whole([stranger], lambda: manifest_of(stranger, store))


# Whom MLflow knows


def tracked_policy(home: Path, store: LocalStore, digest: str) -> dict[str, str]:
    tracker = Tracker.open(TrackingConfig(), store, home)
    run_id = tracker.run_for("key", "run")
    policy = ArtifactRef(uri=f"{store.uri}/stages/round/k.json", digest=digest, kind="policy")
    tracker.register_policy(run_id, "cdpo-test", policy, {"passed": True}, {})
    return {"run_id": run_id, "uri": tracker.uri}


def test_registered_policies_are_asked_for_and_another_mlflow_is_refused(mlflow_home: Path, tmp_path: Path) -> None:
    mine = tracked_policy(mlflow_home, LocalStore(tmp_path / "store"), "a" * 64)
    (version,) = registered_policies(TrackingConfig(), mlflow_home, [mine])
    assert (str(version), version.digest) == ("cdpo-test v1", "a" * 64)
    another = {"run_id": "0" * 32, "uri": "http://elsewhere:5000"}
    with pytest.raises(InputError, match="not the one asked") as caught:
        registered_policies(TrackingConfig(), mlflow_home, [mine, another])
    assert "elsewhere" in caught.value.where
    assert "--tracking.enabled false" in caught.value.fix
    assert registered_policies(TrackingConfig(enabled=False), mlflow_home, [another]) == []


def test_a_store_that_was_never_tracked_needs_no_mlflow_and_makes_none(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert registered_policies(TrackingConfig(), tmp_path, []) == []
    with pytest.raises(InputError, match="not the one asked"):
        registered_policies(TrackingConfig(), tmp_path, [{"run_id": "0" * 32, "uri": "sqlite:///gone.db"}])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        registered_policies(TrackingConfig(), tmp_path, [])


# The commands


def cdpo(home: Path, *words: str) -> tuple[Said, dict[str, Any]]:
    record = home.parent / "record.json"
    record.unlink(missing_ok=True)
    said = command_line(["store", *words, "--json", str(record)], home)
    return said, json.loads(record.read_text()) if record.exists() else {}


@pytest.fixture
def home(mlflow_home: Path, tmp_path: Path) -> Path:
    """A store with a run, an artifact that nobody uses, and a registered policy of no run."""
    store = LocalStore(mlflow_home / "store")
    data = made(store, tmp_path, "data", "d" * 64, {}, {"rows": "rows"})
    policy = made(store, tmp_path, "round", "e" * 64, {"data": data}, {"w": "weights"})
    made(store, tmp_path, "sft", "f" * 64, {"data": data}, {"w": "nobody's"})
    registered = made(store, tmp_path, "round", "0" * 64, {"data": data}, {"w": "registered"})
    tracked_policy(mlflow_home, store, registered.digest)
    used = [(reference_to(item, store), item.stage) for item in (data, policy)]
    enter_run(store, "experiment", "abcdef" + "0" * 26, "nightly", used, {"ended_ms": 1, "status": "not_certified"})
    age(mlflow_home / "store")
    return mlflow_home


def test_ls_shows_stages_policies_runs_and_who_uses_what(home: Path) -> None:
    said, found = cdpo(home, "ls")
    assert said.code == 0
    assert found["totals"] | {"bytes": 0} == {
        "artifacts": 4, "objects": 4, "bytes": 0, "runs": 1, "records": 2, "unused_artifacts": 2
    }  # fmt: skip
    assert [(item["name"][:7], item["registered"]) for item in found["policies"]] == [("round/0", ["cdpo-test v1"])]
    assert {item["stage"]: item["unused"] for item in found["stages"]} == {"data": 0, "round": 1, "sft": 1}
    assert "cdpo-test v1" in said.out
    assert "nightly" in said.out
    said, found = cdpo(home, "ls", "data/dddd")
    assert [run["name"] for run in found["runs"]] == ["nightly"]
    assert len(found["made_of_it"]) == 3
    assert "nightly" in said.out
    for word in ("nightly", "abcdef"):
        said, found = cdpo(home, "ls", "--run", word)
        assert [len(run["artifacts"]) for run in found["runs"]] == [2]
        assert f"data/{'d' * 12}" in said.out
    for words in (["ls", "data/x"], ["ls", "--run", "other"], ["ls", "round/"], ["ls", "--store", "nowhere"]):
        said, _ = cdpo(home, *words)
        assert said.code == 2
        assert said.error.count("\n") <= 3


def test_verify_exits_1_when_something_is_corrupt(home: Path) -> None:
    assert cdpo(home, "verify")[0].code == 0
    (path,) = [path for path in (home / "store" / "objects").iterdir() if path.read_text() == "weights"]
    path.chmod(0o644)
    path.write_text("WEIGHTS")
    said, found = cdpo(home, "verify")
    assert said.code == 1
    assert [fault["name"] for fault in found["faults"]] == [f"objects/{path.name}"]
    assert "is not what was stored" in said.out
    assert cdpo(home, "verify", "--repair")[0].code == 1
    assert cdpo(home, "verify")[0].code == 0
    assert len(LocalStore(home / "store").manifests()) == 3


def test_gc_shows_what_can_go_and_deletes_it_only_when_told(home: Path) -> None:
    said, found = cdpo(home, "gc")
    assert said.code == 0
    assert [name[:5] for name in found["artifacts"]] == ["sft/f"]
    assert "nothing was deleted" in said.out
    assert len(LocalStore(home / "store").manifests()) == 4
    said, found = cdpo(home, "gc", "--yes")
    assert found["deleted"]
    assert [manifest.key[0] for manifest in LocalStore(home / "store").manifests()] == ["d", "0", "e"]
    said, found = cdpo(home, "gc", "--drop-run", "nightly", "--yes")
    assert [name[:7] for name in found["artifacts"]] == ["round/e"]
    assert cdpo(home, "verify")[0].code == 0
    said, found = cdpo(home, "gc", "--tracking.enabled", "false", "--yes")
    assert [name[:7] for name in found["artifacts"]] == ["round/0", "data/dd"]
    assert cdpo(home, "gc", "--older-than", "1h")[0].code == 2


def test_gc_refuses_when_mlflow_cannot_be_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = cdpo(home, "gc", "--tracking.uri", "http://127.0.0.1:9", "--yes")
    assert said.code == 2
    assert "cannot be reached" in said.error
    assert len(LocalStore(home / "store").manifests()) == 4
    said, found = cdpo(home, "ls", "--tracking.uri", "http://127.0.0.1:9")
    assert said.code == 0
    assert "MLflow was not asked" in found["mlflow"]

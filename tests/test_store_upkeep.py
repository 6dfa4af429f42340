"""What goes from a store and what stays, on every kind of store; and that nobody who works on it meanwhile is hurt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_kit import Backend, backend, contents, made

from cdpo_core import local_store
from cdpo_core.artifacts import ArtifactRef, Manifest
from cdpo_core.errors import CorruptArtifact
from cdpo_core.stages import reference_to
from cdpo_core.upkeep.catalogue import read_catalogue
from cdpo_core.upkeep.collection import Plan, Wishes, collect, find_runs, idle_runs, plan_collection
from cdpo_core.upkeep.shelves import Shelves
from cdpo_core.upkeep.verification import verify_store
from tasks import s3_store
from tasks.shelves import open_shelves
from tasks.uses import enter_run

__all__ = ["backend"]

# An age that everything has: "older than" is counted from an hour ahead.
ANY = -3600.0


@pytest.fixture
def shelves(backend: Backend) -> Shelves:
    backend.store.put_record("ledger/there", {"n": 1})
    return open_shelves(backend.uri)


def reference(backend: Backend, manifest: Manifest) -> ArtifactRef:
    return reference_to(manifest, backend.store)


def enter(backend: Backend, key: str, used: Iterable[Manifest], **facts: Any) -> None:
    refs = [(reference(backend, item), item.stage) for item in used]
    enter_run(backend.store, "experiment", key, f"run {key}", refs, {"ended_ms": 1, **facts})


def chain(backend: Backend, tmp_path: Path, name: str) -> dict[str, Manifest]:
    """Data, a policy made from it, responses of the policy, and their scores."""
    data = made(backend.store, tmp_path, "data", f"{name}-data", {}, {"rows": f"rows {name}", "shared": "tokenizer"})
    policy = made(
        backend.store, tmp_path, "round", f"{name}-policy", {"data": data}, {"w": name, "shared": "tokenizer"}
    )
    responses = made(backend.store, tmp_path, "responses", f"{name}-responses", {"policy": policy}, {"r": f"r {name}"})
    scores = made(backend.store, tmp_path, "scores", f"{name}-scores", {"responses": responses}, {"s": f"s {name}"})
    return {"data": data, "policy": policy, "responses": responses, "scores": scores}


def certified_result(backend: Backend, made: dict[str, Manifest]) -> dict[str, Any]:
    evidence = [reference(backend, made[name]).model_dump() for name in ("responses", "scores")]
    return {
        "name": "run one",
        "status": "certified",
        "policy": reference(backend, made["policy"]).model_dump(),
        "data": reference(backend, made["data"]).model_dump(),
        "certificate": {"evidence": evidence},
        "ended_ms": 1,
    }


def gone(plan: Plan) -> set[str]:
    return {artifact.manifest.key for artifact in plan.artifacts}


def planned(shelves: Shelves, wishes: Wishes) -> Plan:
    return plan_collection(shelves, read_catalogue(shelves), wishes)


def clean(shelves: Shelves, wishes: Wishes) -> Plan:
    plan = collect(shelves, planned(shelves, wishes))
    found = verify_store(shelves)
    assert (found.faults, found.inputs_gone) == ([], [])
    return plan


def test_what_lies_in_a_store_is_listed_read_and_taken_away(backend: Backend, shelves: Shelves, tmp_path: Path) -> None:
    manifest = made(backend.store, tmp_path, "sft", "key", {}, {"a": "alpha"})
    (item,) = shelves.items("objects/")
    sha256 = hashlib.sha256(b"alpha").hexdigest()
    assert (item.name, item.size) == (f"objects/{sha256}", 5)
    assert abs(item.time - shelves.now()) < 600
    alone = shelves.item(item.name)
    assert alone is not None
    assert (alone.name, alone.size) == (item.name, item.size)
    assert abs(alone.time - item.time) <= 1, "asked for alone, a bucket's object tells its time in seconds"
    assert (shelves.read(item.name), shelves.sha256(item.name)) == (b"alpha", sha256)
    assert [found.name for found in shelves.items("stages/")] == ["stages/sft/key.json"]
    assert [found.name for found in shelves.items("records/")] == ["records/ledger/there.json"]
    shelves.put_aside(item.name)
    assert shelves.item(item.name) is None
    assert len(shelves.items("aside/")) == 1
    shelves.remove(item.name)
    shelves.remove("stages/sft/key.json")
    assert (shelves.read(item.name), shelves.sha256(item.name)) == (None, None)
    assert backend.store.find("sft", manifest.key) is None


def test_what_no_run_uses_goes_and_what_one_uses_stays(backend: Backend, shelves: Shelves, tmp_path: Path) -> None:
    one, two = chain(backend, tmp_path, "one"), chain(backend, tmp_path, "two")
    enter(backend, "1111", one.values())
    catalogue = read_catalogue(shelves)
    assert {run.key: len(run.artifacts) for run in catalogue.runs} == {"1111": 4}
    plan = clean(shelves, Wishes(ANY))
    assert gone(plan) == {manifest.key for manifest in two.values()}
    assert len(plan.objects) == 4
    assert [artifact.manifest.stage for artifact in plan.artifacts] == ["scores", "responses", "round", "data"]
    for manifest in one.values():
        backend.store.check(manifest)
        assert contents(backend.anew().fetch(manifest))
    assert backend.store.get_record("ledger/there") == {"n": 1}
    assert clean(shelves, Wishes(ANY)).bytes == 0


def test_what_is_young_stays_with_all_it_was_made_from(backend: Backend, shelves: Shelves, tmp_path: Path) -> None:
    chain(backend, tmp_path, "one")
    assert clean(shelves, Wishes(86400)).bytes == 0
    catalogue = read_catalogue(shelves)
    assert len(catalogue.with_ancestors(["scores/one-scores"])) == 4
    assert catalogue.with_ancestors(["round/one-policy"]) == {"round/one-policy", "data/one-data"}


def test_a_released_run_leaves_what_its_certified_policy_needs(
    backend: Backend, shelves: Shelves, tmp_path: Path
) -> None:
    one = chain(backend, tmp_path, "one")
    extra = made(backend.store, tmp_path, "responses", "selection", {"policy": one["policy"]}, {"r": "selection"})
    backend.store.put_record("results/1111-x", certified_result(backend, one))
    enter(backend, "1111", [*one.values(), extra], result="results/1111-x", status="certified")
    assert clean(shelves, Wishes(ANY)).bytes == 0
    runs, unknown = find_runs(read_catalogue(shelves), ["run 1111", "nobody"])
    assert ([run.key for run in runs], unknown) == (["1111"], ["nobody"])
    assert gone(clean(shelves, Wishes(ANY, runs))) == {"selection"}
    assert backend.store.record_names("") == ["ledger/there", "results/1111-x"]
    (run,) = read_catalogue(shelves).runs
    assert (run.is_listed, run.status) == (False, "certified")
    registered = frozenset([one["policy"].digest])
    assert clean(shelves, Wishes(ANY, (run,), with_policies=True, registered=registered)).bytes == 0
    assert gone(clean(shelves, Wishes(ANY, (run,), with_policies=True))) == {item.key for item in one.values()}
    assert backend.store.record_names("") == ["ledger/there"]


def test_a_run_recorded_without_its_artifacts_keeps_all_that_was_computed_from_its_data(
    backend: Backend, shelves: Shelves, tmp_path: Path
) -> None:
    one, two = chain(backend, tmp_path, "one"), chain(backend, tmp_path, "two")
    result = {"status": "not_certified", "policy": None, "data": reference(backend, one["data"]).model_dump()}
    backend.store.put_record("results/1111-none", result)
    assert gone(clean(shelves, Wishes(ANY))) == {manifest.key for manifest in two.values()}


def test_runs_that_nobody_touches_any_more_can_be_released_together(
    backend: Backend, shelves: Shelves, tmp_path: Path
) -> None:
    one, two = chain(backend, tmp_path, "one"), chain(backend, tmp_path, "two")
    enter(backend, "1111", one.values())
    enter(backend, "2222", two.values())
    enter(backend, "3333", [two["data"], two["policy"], two["responses"]])
    catalogue = read_catalogue(shelves)
    assert idle_runs(catalogue, 86400) == ()
    assert {run.key for run in idle_runs(catalogue, ANY)} == {"1111", "2222"}, "3333 has nothing of its own"
    plan = clean(shelves, Wishes(ANY, idle_runs(catalogue, ANY)))
    assert gone(plan) == {*(item.key for item in one.values()), "two-scores"}


def test_any_record_keeps_what_it_refers_to_but_old_outcomes_go(
    backend: Backend, shelves: Shelves, tmp_path: Path
) -> None:
    one, two = chain(backend, tmp_path, "one"), chain(backend, tmp_path, "two")
    backend.store.put_record("unsent/1", {"deep": [{"policy": reference(backend, one["policy"]).model_dump()}]})
    backend.store.put_record("outcomes/flow-run", {"policy": reference(backend, two["policy"]).model_dump()})
    assert clean(shelves, Wishes(86400)).records == []
    plan = clean(shelves, Wishes(ANY))
    assert [item.name for item in plan.records] == ["records/outcomes/flow-run.json"]
    assert gone(plan) == {"one-responses", "one-scores", *(item.key for item in two.values())}


def test_a_cleaning_that_is_killed_leaves_no_manifest_without_its_objects(
    backend: Backend, shelves: Shelves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(backend, tmp_path, "one")
    plan = planned(shelves, Wishes(ANY))
    remove, left = shelves.remove, [0]

    def dying(name: str) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        remove(name)

    monkeypatch.setattr(shelves, "remove", dying)
    for steps in range(1, 9):
        left[0] = 1
        with pytest.raises(KeyboardInterrupt):
            collect(shelves, plan)
        found = verify_store(shelves)
        assert (found.faults, found.inputs_gone) == ([], []), f"after {steps} deletions"
    left[0] = 100
    clean(shelves, Wishes(ANY))
    assert backend.names("objects/") == backend.names("stages/") == []


def test_what_is_used_again_between_the_plan_and_the_deletion_stays(
    backend: Backend, shelves: Shelves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (local_store, s3_store):
        monkeypatch.setattr(module, "REFRESH_SECONDS", -1e9)
    one = chain(backend, tmp_path, "one")
    plan = _looking_old(shelves, planned(shelves, Wishes(ANY)))
    backend.store.check(one["policy"])
    collected = collect(shelves, plan)
    assert gone(collected) == {"one-data", "one-responses", "one-scores"}
    assert contents(backend.anew().fetch(one["policy"])) == {"w": "one", "shared": "tokenizer"}


def test_an_object_that_a_publisher_finds_is_not_taken_from_under_it(
    backend: Backend, shelves: Shelves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (local_store, s3_store):
        monkeypatch.setattr(module, "REFRESH_SECONDS", -1e9)
    one = chain(backend, tmp_path, "one")
    plan = _looking_old(shelves, planned(shelves, Wishes(ANY)))
    for manifest in reversed(one.values()):
        shelves.remove(f"stages/{manifest.stage}/{manifest.key}.json")
    write, seen = backend.store._write_new, []  # type: ignore[attr-defined]

    def cleaned_before_the_manifest(*place: Any) -> bool:
        if not seen:
            seen.append(collect(shelves, plan))
        return bool(write(*place))

    monkeypatch.setattr(backend.store, "_write_new", cleaned_before_the_manifest)
    again = made(backend.store, tmp_path, "data", "again", {}, {"rows": "rows one", "shared": "tokenizer"})
    assert {item.name for item in seen[0].objects}.isdisjoint(f"objects/{entry.sha256}" for entry in again.entries)
    assert contents(backend.anew().fetch(again)) == {"rows": "rows one", "shared": "tokenizer"}


def test_a_publisher_stores_anew_what_was_taken_from_under_it(
    backend: Backend, shelves: Shelves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = chain(backend, tmp_path, "one")
    write = backend.store._write_new  # type: ignore[attr-defined]

    def all_is_taken_away(*place: Any) -> bool:
        for item in shelves.items("objects/"):
            shelves.remove(item.name)
        return bool(write(*place))

    with monkeypatch.context() as patch:
        patch.setattr(backend.store, "_write_new", all_is_taken_away)
        again = made(backend.store, tmp_path, "data", "again", {}, {"rows": "rows one"})
    assert contents(backend.anew().fetch(again)) == {"rows": "rows one"}
    with pytest.raises(CorruptArtifact):
        backend.store.check(one["policy"])


def _looking_old(shelves: Shelves, plan: Plan) -> Plan:
    """The plan as it would be if all in it had been made long before its border, which lies just behind it."""
    newest = max(item.time for item in [*plan.objects, *(artifact.item for artifact in plan.artifacts)])
    _pass_a_second(shelves, newest + 0.001)
    return replace(plan, before=newest + 0.001)


@pytest.mark.parametrize("damage", ["cut short", "changed", "missing", "manifest", "another's manifest"])
def test_what_is_corrupt_is_found_and_set_aside(
    backend: Backend, shelves: Shelves, tmp_path: Path, damage: str
) -> None:
    one = chain(backend, tmp_path, "one")
    responses = one["responses"]
    (entry,) = responses.entries
    name, manifest = f"objects/{entry.sha256}", f"stages/responses/{responses.key}.json"
    assert verify_store(shelves).faults == []
    if damage == "missing":
        backend.remove(name)
    elif damage == "manifest":
        backend.overwrite(manifest, b"{")
    elif damage == "another's manifest":
        backend.overwrite(manifest, one["scores"].model_dump_json().encode())
    else:
        backend.overwrite(name, b"r on" if damage == "cut short" else b"r two")
    shelves = open_shelves(backend.uri)
    found = verify_store(shelves)
    assert [fault.name for fault in found.faults] == [manifest if "manifest" in damage else name]
    assert verify_store(shelves).faults == found.faults, "looking changes nothing"
    if "manifest" in damage:
        with pytest.raises(CorruptArtifact, match="cannot be read") as caught:
            planned(shelves, Wishes(ANY))
        assert "verify --repair" in caught.value.fix
    assert verify_store(shelves, repair=True).repaired
    after = verify_store(shelves)
    assert after.faults == []
    assert after.inputs_gone == [("scores/one-scores", "responses")]
    assert backend.anew().find("responses", responses.key) is None
    assert contents(backend.store.fetch(one["policy"]))
    again = made(backend.store, tmp_path, "responses", responses.key, {"policy": one["policy"]}, {"r": "r one"})
    assert again.digest == responses.digest
    assert verify_store(open_shelves(backend.uri)).inputs_gone == []


def test_an_object_of_nobody_with_wrong_bytes_is_found(backend: Backend, shelves: Shelves, tmp_path: Path) -> None:
    manifest = made(backend.store, tmp_path, "sft", "key", {}, {"a": "alpha"})
    name = f"objects/{manifest.files['a'].sha256}"
    backend.overwrite(name, b"omega")
    backend.remove("stages/sft/key.json")
    assert [(fault.name, fault.artifacts) for fault in verify_store(shelves, repair=True).faults] == [(name, ())]
    found = verify_store(shelves)
    assert (found.faults, found.orphans) == ([], [])


def test_a_record_that_cannot_be_read_is_found_and_a_spent_test_stays_spent(backend: Backend, shelves: Shelves) -> None:
    backend.store.put_record("ledger/split/one", {"n": 1})
    backend.store.put_record("results/1111-x", {"status": "certified"})
    for name in ("ledger/split/one", "results/1111-x"):
        backend.overwrite(f"records/{name}.json", b"{")
    with pytest.raises(CorruptArtifact):
        planned(shelves, Wishes(ANY))
    faults = verify_store(shelves, repair=True).faults
    assert [fault.name for fault in faults] == ["records/ledger/split/one.json", "records/results/1111-x.json"]
    assert verify_store(shelves).faults == []
    assert backend.store.record_names("") == ["ledger/split/one", "ledger/there"]


def test_what_was_set_aside_and_left_behind_goes_when_it_is_old(
    backend: Backend, shelves: Shelves, tmp_path: Path
) -> None:
    manifest = made(backend.store, tmp_path, "sft", "key", {}, {"a": "alpha"})
    enter(backend, "1111", [manifest])
    shelves.put_aside("stages/sft/key.json")
    backend.left_behind()
    assert len(shelves.leftovers()) == 2
    # moto dates every unfinished upload 2010.
    old = [item for item in shelves.leftovers() if item.time < shelves.now() - 86400]
    plan = clean(shelves, Wishes(86400))
    assert (plan.aside, plan.leftovers, plan.objects) == ([], old, [])
    plan = clean(shelves, Wishes(ANY))
    assert (len(plan.aside), len(plan.leftovers), len(plan.objects)) == (1, 2 - len(old), 1)
    assert plan.bytes > 5
    assert shelves.leftovers() == []
    assert backend.names("aside/") == []


def test_an_old_artifact_is_noted_to_be_in_use_when_it_is_found(
    backend: Backend, shelves: Shelves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = made(backend.store, tmp_path, "sft", "key", {}, {"a": "alpha"})
    name = "stages/sft/key.json"
    before = shelves.item(name)
    backend.store.check(manifest)
    assert shelves.item(name) == before, "what is young is left alone"
    for module in (local_store, s3_store):
        monkeypatch.setattr(module, "REFRESH_SECONDS", -1e9)
    _pass_a_second(shelves, before.time if before else 0)
    backend.store.check(manifest)
    after = shelves.item(name)
    assert before is not None
    assert after is not None
    assert after.time > before.time
    assert backend.store.find("sft", "key") == manifest
    backend.remove(name)
    with pytest.raises(CorruptArtifact, match="gone"):
        backend.store.check(manifest)


def _pass_a_second(shelves: Shelves, since: float) -> None:
    while shelves.now() <= since:  # a bucket's clock ticks in seconds
        pass


def test_reading_a_catalogue_says_nothing_and_moves_nothing(
    backend: Backend, shelves: Shelves, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain(backend, tmp_path, "one")
    backend.overwrite("stages/data/one-data.json", b"")
    before = backend.names("")
    with caplog.at_level(logging.INFO):
        assert read_catalogue(shelves).unreadable == ("stages/data/one-data.json",)
    assert [record for record in caplog.records if record.name.startswith(("cdpo_core", "tasks"))] == []
    assert backend.names("") == before

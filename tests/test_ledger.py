"""The ledger: what counts as a use of held-out prompts, what it costs, and that no race and no order changes it."""

from __future__ import annotations

import io
import math
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from report_kit import result
from rich.console import Console
from store_kit import Backend
from store_kit import backend as backend

from benchmarks.many_tries import Shelf, some_pass
from cdpo_core.artifacts import ArtifactRef, Manifest
from cdpo_core.config import ExperimentConfig
from cdpo_core.config_loading import load_config
from cdpo_core.dual.spending import Entry, share_of, uses
from cdpo_core.evaluation.result import confidence, verdict
from cdpo_core.local_store import LocalStore
from flows.children import children_of
from flows.export import model_card
from flows.grid import combinations
from flows.plan import PlanBench
from flows.plan_report import print_plan
from tasks.frontier import choose_for_sweep
from tasks.ledger import Ledger, enter_test, family_of, prompt_digest, share_for
from tasks.records import Prepared, Scored
from tasks.report_words import limits_of_meaning, meanings
from tasks.workbench import Workbench

POLICY = ArtifactRef(uri="policy", digest="6" * 64, kind="policy")
OTHER = POLICY.model_copy(update={"digest": "7" * 64})


class Stocked:
    """A workbench whose prompts are given: those of the certificate begin with `held`."""

    prompts: dict[str, tuple[str, ...]]

    def table(self, ref: ArtifactRef, name: str) -> pd.DataFrame:
        texts = PROMPTS[ref.digest]
        splits = ["certificate" if text.startswith("held") else "policy" for text in texts]
        return pd.DataFrame({"prompt_id": texts, "prompt": texts, "split": splits})


class Bench(Stocked, Workbench):
    pass


class Plan(Stocked, PlanBench):
    pass


PROMPTS = {
    "one": ("held a", "held b", "c", "d"),
    "two": ("held b", "held c", "a"),
    "apart": ("held x", "held y", "z"),
}


def bench(tmp_path: Path, config: ExperimentConfig | None = None, kind: type[Any] = Bench, **settings: Any) -> Any:
    config = config or load_config("tiny", settings)
    return kind(config, LocalStore(tmp_path / "store"), tmp_path / "scratch")


def parts(data: str = "one") -> tuple[Prepared, Scored]:
    """A data set by its name, and its splits."""

    def ref(digest: str) -> ArtifactRef:
        return ArtifactRef(uri=digest, digest=digest, kind="any")

    prepared = Prepared(ref(data), ref("reference"), ref("pool"))
    return prepared, Scored([ref("scorer")], ref("scores"), ref(data), ref("responses"), ref("scores"))


def made(
    here: Any, policy: ArtifactRef = POLICY, data: str = "one", temperature: float = 1.0
) -> tuple[float, int, int]:
    """The share of δ in units of the asked one, which use it was, and how many tests the prompts have seen."""
    share, spent = enter_test(here, *parts(data), policy, {"temperature": temperature})
    return round(share.delta / share.asked, 6), share.uses, spent


def squares(used: int, tests: int = 1) -> float:
    return round(6 / (math.pi * used) ** 2 / tests, 6)


def test_the_shares_of_all_uses_add_up_to_delta() -> None:
    shares = [share_of(0.05, used, "squares") for used in range(1, 100_000)]
    assert 0.0499 < sum(shares) < 0.05
    assert share_of(0.05, 7, "none", 3) == 0.05
    assert share_of(0.05, 2, "squares", 3) == pytest.approx(share_of(0.05, 2, "squares") / 3)
    with pytest.raises(ValueError, match="from 1"):
        share_of(0.05, 0, "squares")


def test_a_use_is_any_other_family_that_shares_a_prompt() -> None:
    earlier = [Entry("f", {"a"}), Entry("g", {"a", "b"}), Entry("g", {"c"}), Entry("h", {"z"}), Entry("i", None)]
    assert uses("f", {"a", "c"}, earlier) == 3, "g once, and one whose prompts cannot be told"
    assert uses("new", {"x"}, earlier) == 2
    assert uses("new", {"x"}, earlier[:4]) == 1


def test_prompts_are_known_by_their_content() -> None:
    assert prompt_digest("How  do\nI?") == prompt_digest(" How do I? ") != prompt_digest("How do you?")
    assert prompt_digest("a", "testbed 0") != prompt_digest("a", "testbed 1"), "another question in another world"


@pytest.mark.parametrize(
    "change",
    [{"seed": "1"}, {"reward.epochs": "5"}, {"sft.steps": "240"}, {"sampling.pool": "3"}, {"sampling.certificate": "3"},
     {"certificate.cost_high": "9"}, {"certificate.delta": "0.04"}, {"constraints.0.limit": "-0.3"}],
)  # fmt: skip
def test_whatever_is_changed_the_same_prompts_are_used_again(change: dict[str, str], tmp_path: Path) -> None:
    assert made(bench(tmp_path)) == (squares(1), 1, 1)
    again = bench(tmp_path, **change)
    assert share_for(again, *parts("two")).uses == 2, "one of its prompts has served"
    assert made(again, data="two") == (squares(2), 2, 2)
    assert made(bench(tmp_path, name="apart", seed="77"), data="apart") == (squares(1), 1, 1), (
        "no prompt of these has served"
    )


@pytest.mark.parametrize("change", [{"name": "b"}, {"compute.threads": "2"}, {"sampling.test": "3"},
                                    {"evaluation.samples_shown": "3"}])  # fmt: skip
def test_the_same_test_again_is_the_same_entry(change: dict[str, str], tmp_path: Path) -> None:
    for here in (bench(tmp_path), bench(tmp_path), bench(tmp_path, **change)):
        assert share_for(here, *parts()).delta == pytest.approx(0.05 * squares(1), rel=1e-5)
        assert made(here) == (squares(1), 1, 1)


def test_others_that_come_and_go_change_no_share_that_was_drawn(tmp_path: Path) -> None:
    begun = bench(tmp_path)
    first = share_for(begun, *parts())
    assert made(bench(tmp_path, seed="1")) == (squares(2), 2, 1)
    assert share_for(bench(tmp_path), *parts()) == first, "it is continued by another process after the other has ended"
    assert made(bench(tmp_path)) == (squares(1), 1, 2)


def test_another_policy_of_the_same_experiment_draws_anew(tmp_path: Path) -> None:
    here = bench(tmp_path)
    assert made(here) == (squares(1), 1, 1)
    assert made(here, OTHER) == (squares(2), 2, 2)
    assert made(bench(tmp_path), OTHER) == (squares(2), 2, 2)
    assert made(here, temperature=0.5) == (squares(3), 3, 3)
    assert made(here) == (squares(1), 1, 3)


def test_without_spending_every_test_is_made_at_delta_and_counted(tmp_path: Path) -> None:
    none = {"certificate.spending": "none"}
    for number in (1, 2, 3):
        here = bench(tmp_path, seed=str(number), **none)
        assert share_for(here, *parts()).delta == 0.05
        assert made(here) == (1.0, number, number)
    assert made(bench(tmp_path)) == (squares(4), 4, 4)


def test_a_plan_says_the_share_and_draws_none(tmp_path: Path) -> None:
    for _ in range(2):
        assert share_for(bench(tmp_path, kind=Plan), *parts()).uses == 1
        assert made(bench(tmp_path, kind=Plan)) == (squares(1), 1, 1)
    assert bench(tmp_path).store.record_names("") == []
    made(bench(tmp_path))
    assert share_for(bench(tmp_path, kind=Plan, seed="1"), *parts()).uses == 2
    assert share_for(bench(tmp_path, kind=Plan), *parts()).uses == 1, "its own"


def test_tests_of_an_earlier_version_and_unreadable_entries_count(tmp_path: Path) -> None:
    here = bench(tmp_path)
    here.store.put_record(f"ledger/{'5' * 32}/{'6' * 32}", {"policy": "p"})
    here.store.put_record("ledger/00000004", {"note": "this entry could not be read"})
    assert made(here) == (squares(3), 3, 2)
    assert "ledger/00000005" in here.store.record_names("ledger/"), "no entry is made before another"


def family(tmp_path: Path, seeds: list[int], limits: list[float], **settings: str) -> list[Any]:
    config = load_config("tiny", {"store.uri": str(tmp_path / "store"), **settings})
    return children_of(combinations(config, seeds, []), limits)


def test_a_sweep_draws_once_and_divides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    children = family(tmp_path, [0, 1], [-0.5, -0.2])
    assert {family_of(bench(tmp_path, child.config)) for child in children} == {
        family_of(bench(tmp_path, child.config)) for child in reversed(family(tmp_path, [1, 0], [-0.2, -0.5]))
    }
    digests = [f"{number}" * 64 for number in range(4)]
    found = []
    for number, child in enumerate(children):
        policy = POLICY.model_copy(update={"digest": digests[number]})
        found.append(made(bench(tmp_path, child.config), policy))
        # Whoever comes between finds the whole sweep there, and changes nothing for those after it.
        assert made(bench(tmp_path, seed=str(10 + number)))[1] == 2 + number
    assert [(share, used) for share, used, _ in found] == [(squares(1, 4), 1)] * 4
    assert [child.identity for child in children] == [
        child.identity for child in family(tmp_path, [0, 1], [-0.5, -0.2])
    ]
    assert made(bench(tmp_path, children[0].config), OTHER) == (squares(6, 4), 6, 9), "a fifth test draws anew"


def test_nobody_shares_with_one_child_or_without_spending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    for children in (
        family(tmp_path, [0], [-0.5]),
        family(tmp_path, [0, 1], [-0.5], **{"certificate.spending": "none"}),
    ):
        assert {child.config.certificate.family for child in children} == {""}


def test_the_choice_of_a_sweep_divides_no_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    children = family(tmp_path, [0], [-0.5, -0.2])
    results = [
        {"status": status, "limit": child.limit, "settings": {}, "lambda": 1.0, "policy": {},
         "test": {"reward": {"mean": reward}}, "certificate": {"delta": 0.0152}}
        for child, status, reward in zip(children, ["certified", "not_certified"], [0.5, 0.9], strict=True)
    ]  # fmt: skip
    chosen = choose_for_sweep([(child.config, item) for child, item in zip(children, results, strict=True)], tested=2)
    assert chosen is not None
    assert (chosen["limit"], chosen["delta"]) == (-0.5, 0.0152)


@pytest.mark.parametrize(
    ("delta", "percent"),
    [(0.05, "95 %"), (0.030396, "96.9 %"), (0.1, "90 %"), (0.0076, "99.24 %"), (1e-7, "99.99999 %")],
)
def test_confidence_is_never_rounded_up(delta: float, percent: str) -> None:
    assert confidence(delta) == percent


def spent_at(**changes: Any) -> dict[str, Any]:
    """A result whose certificate was the third use of its prompts, one of two tests."""
    record = result()
    spent = {"delta": 0.00169, "asked_delta": 0.05, "spending": "squares", "uses": 3, "family_tests": 2, "spent": 4}
    certificate = {**record["certificate"], **spent, **changes}
    constraints = [{**record["constraints"][0], "certificate": certificate}]
    return {**record, "certificate": certificate, "constraints": constraints}


def test_every_word_of_the_outcome_says_what_was_spent() -> None:
    share = "δ = 0.00169 is this test's share of 0.05; use 3 of them, divided among 2 tests"
    assert share in verdict(spent_at())
    assert "99.83 % confidence" in verdict(spent_at())
    words = "δ = 0.05 was asked for all tests ever made on these held-out prompts together. This is use 3 of them"
    manifest = Manifest(stage="round", key="k" * 8, kind="policy", digest="d" * 64, files={})
    for text in (" ".join(meanings(spent_at())), model_card(manifest, spent_at())):
        assert words in text
    assert "many tries" not in " ".join(limits_of_meaning(spent_at()))
    alone = spent_at(spending="none", delta=0.05, family_tests=1)
    assert "certificate.spending is none: δ holds for this test alone" in verdict(alone)
    assert "The same after many tries: these held-out prompts had been used for 4 tests" in " ".join(
        limits_of_meaning(alone)
    )
    assert "δ = 0.05 was spent on this test alone" in model_card(manifest, alone)


def test_a_plan_says_what_the_next_test_would_get() -> None:
    console = Console(file=io.StringIO(), width=200)
    for share in ({"delta": 0.0076, "asked": 0.05, "uses": 2, "tests": 1}, None):
        print_plan({"stages": [], "share": share}, load_config("tiny"), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "certificate: at δ = 0.0076 of the 0.05 asked, as use 2 of these prompts\n" in said
    assert "known once the held-out prompts are" in said


def test_racing_families_have_uses_of_their_own(backend: Backend) -> None:
    """Eight families at once, each from two claimants that do not know of each other: no two share a use."""
    found: dict[tuple[str, int], int] = {}
    barrier = threading.Barrier(16)

    def race(family: str, process: int) -> None:
        barrier.wait()
        found[family, process] = Ledger(backend.store).draw(family, {"a", family}).uses

    racers = [threading.Thread(target=race, args=(f"{number:x}", process)) for number in range(8) for process in (0, 1)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    by_family = [{found[f"{number:x}", process] for process in (0, 1)} for number in range(8)]
    assert all(len(item) == 1 for item in by_family), "both claimants of a family found one share"
    assert sorted(next(iter(item)) for item in by_family) == list(range(1, 9))
    assert len([name for name in backend.store.record_names("ledger/0") if "/" not in name[7:]]) == 8


def test_of_ten_policies_at_the_limit_some_passes_in_delta_of_the_stores() -> None:
    draws = 200
    spent = some_pass(draws, "squares")
    assert spent <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / draws)
    assert some_pass(draws, "none") > 0.25, "what it was for"


def test_a_shelf_keeps_what_came_first() -> None:
    shelf = Shelf()
    assert shelf.put_record("a", {"n": 1})
    assert not shelf.put_record("a", {"n": 1})

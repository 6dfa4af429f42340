"""The ledger: which families of tests met which held-out prompts, and the share of δ that each of them drew.

An experiment, or a whole sweep as one family, draws its share once, before its margin is planned, and finds it again
whenever it is continued, by whoever and in whatever order. Records of the store, none of which ever changes:

    ledger/00000003             a family's use of some prompts: {family, prompts, uses, tests, ...}
    ledger/tests/<family>/0000  a test that a family made: {policy, prompts, limits, sampling, ...}
    ledger/prompts/<digest>     a set of prompts: {prompts: [...]}, each by a digest of its content
    ledger/<digest>/<digest>    a test of an earlier version, whose prompts cannot be told: it counts as a use of any
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cdpo_core.artifacts import ArtifactRef, Store
from cdpo_core.config import EvaluationConfig, ExperimentConfig, SamplingConfig
from cdpo_core.data.schema import normalised
from cdpo_core.dual.spending import Entry, Spending, share_of, uses
from tasks.records import Prepared, Scored
from tasks.tracking import experiment_key
from tasks.workbench import Workbench

PLACE = "ledger/"
SETS = f"{PLACE}prompts/"
TESTS = f"{PLACE}tests/"
SLOT = re.compile(r"ledger/\d{8}")
DIGITS = 12
"""Of a prompt's digest: two of 10⁵ prompts meet with probability 2·10⁻⁵, and then a use too many is counted."""
READERS = 16


@dataclass(frozen=True)
class Use:
    """A family's use of some prompts.

    Attributes:
        family: whose it is.
        uses: k, which use of these prompts it is.
        tests: m, how many tests the family may make at its share.
    """

    family: str
    uses: int
    tests: int


class Ledger:
    """The uses of held-out prompts in one store; safe for many processes at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records: dict[str, dict[str, Any]] = {}
        self._sets: dict[str, frozenset[str] | None] = {}

    def draw(self, family: str, prompts: Set[str], tests: int = 1, **facts: Any) -> Use:
        """The family's use of these prompts: found, or entered after all that are there.

        Entries are claimed one after another, each by whoever writes it first, and a claimant has read all before its
        own; so of two families that share a prompt the later one has counted the earlier.

        Args:
            family: whose use it is.
            prompts: digests of the prompts that it may test on.
            tests: how many tests it will make, if it is not there yet.
            facts: what else the record says.
        """
        listed = _set_digest(prompts)
        self._sets[listed] = frozenset(prompts)
        is_listed = False
        while True:
            slots = self._slots()
            found = self._own(family, listed, slots)
            if found is not None:
                return found
            if not is_listed:
                self._store.put_record(SETS + listed, {"prompts": sorted(prompts)})
                is_listed = True
            use = self._new(family, prompts, slots, tests)
            entry = {"family": family, "prompts": listed, "uses": use.uses, "tests": use.tests, **facts, "time": _now()}
            if self._store.put_record(self._next(slots), entry):
                return use

    def foreseen(self, family: str, prompts: Set[str], tests: int = 1) -> Use:
        """What `draw` would return now, without entering anything."""
        slots = self._slots()
        return self._own(family, _set_digest(prompts), slots) or self._new(family, prompts, slots, tests)

    def enter(self, use: Use, test: Mapping[str, Any]) -> bool:
        """Enter a test of the family; False when it has made all of its tests, and this is none of them.

        The same test again is the same entry.
        """
        identity = _identity(test)
        for number in range(use.tests):
            name = f"{TESTS}{use.family}/{number:04d}"
            if self._store.put_record(name, {**test, "identity": identity, "time": _now()}):
                return True
            if (self._store.get_record(name) or {}).get("identity") == identity:
                return True
        return False

    def tests_on(self, prompts: Set[str]) -> int:
        """How many tests were made on any of these prompts, by any family."""
        names = self._store.record_names(PLACE)
        entries = map(self._entry, self._slots(names))
        sharing = {item.family for item in entries if item.prompts is None or not prompts.isdisjoint(item.prompts)}
        made = [name.removeprefix(TESTS).rpartition("/")[0] for name in names if name.startswith(TESTS)]
        return sum(family in sharing for family in made) + sum(map(_is_of_an_earlier_version, names))

    def _slots(self, names: Sequence[str] | None = None) -> list[str]:
        """Every entry's name, those of tests of an earlier version too; all but the latter are read."""
        listed = self._store.record_names(PLACE) if names is None else names
        self._read([name for name in listed if SLOT.fullmatch(name)])
        return [name for name in listed if SLOT.fullmatch(name) or _is_of_an_earlier_version(name)]

    def _own(self, family: str, listed: str, slots: Iterable[str]) -> Use | None:
        for name in slots:
            record = self._records.get(name, {})
            if (record.get("family"), record.get("prompts")) == (family, listed):
                return Use(family, record["uses"], record["tests"])
        return None

    def _new(self, family: str, prompts: Set[str], slots: Sequence[str], tests: int) -> Use:
        # A family whose experiments have several data sets makes all its tests at the number it began with.
        begun = (self._records[name] for name in slots if self._records.get(name, {}).get("family") == family)
        most = next((record["tests"] for record in begun), tests)
        return Use(family, uses(family, prompts, map(self._entry, slots)), most)

    def _entry(self, name: str) -> Entry:
        record = self._records.get(name, {})
        # What cannot be read stood for a use, too.
        return Entry(record.get("family", name), self._prompts(record.get("prompts", "")))

    def _prompts(self, listed: str) -> frozenset[str] | None:
        if listed and listed not in self._sets:
            found = (self._store.get_record(SETS + listed) or {}).get("prompts")
            self._sets[listed] = None if found is None else frozenset(found)
        return self._sets.get(listed)

    def _read(self, names: Iterable[str]) -> None:
        """Read the entries that are not known yet; none of them ever changes."""
        unknown = [name for name in names if name not in self._records]
        if len(unknown) < READERS:
            self._records |= {name: self._store.get_record(name) or {} for name in unknown}
            return
        with ThreadPoolExecutor(READERS) as pool:
            found = pool.map(self._store.get_record, unknown)
            self._records |= {name: record or {} for name, record in zip(unknown, found, strict=True)}

    @staticmethod
    def _next(slots: Iterable[str]) -> str:
        taken = [int(name.removeprefix(PLACE)) for name in slots if SLOT.fullmatch(name)]
        return f"{PLACE}{max(taken, default=0) + 1:08d}"


@dataclass(frozen=True)
class Share:
    """The level that an experiment's tests are made at.

    Attributes:
        delta: of each test.
        asked: `certificate.delta`, of all tests on these prompts together.
        spending: the rule that made the one from the other.
        uses: k, which use of these prompts this is; 0 where nothing is spent before the test.
        tests: m, how many tests share the use.
    """

    delta: float
    asked: float
    spending: Spending
    uses: int
    tests: int

    def record(self) -> dict[str, Any]:
        """As a certificate states it, beside its delta."""
        return {"asked_delta": self.asked, "spending": self.spending, "uses": self.uses, "family_tests": self.tests}


def share_for(bench: Workbench, prepared: Prepared, scored: Scored) -> Share:
    """The experiment's share of δ: drawn before its first test and the margin that is planned for it, then found.

    With `certificate.spending: none` there is nothing to draw. A plan foresees it.
    """
    rules = bench.config.certificate
    if rules.spending == "none":
        return Share(rules.delta, rules.delta, "none", 0, 1)
    return _share(bench.config, _use(bench, prepared, scored, family_of(bench)))


def enter_test(
    bench: Workbench, prepared: Prepared, scored: Scored, policy: ArtifactRef, decoding: Mapping[str, Any]
) -> tuple[Share, int]:
    """Enter a test of the policy; returns its share of δ and how many tests its prompts have seen, this one too.

    A family that has made all the tests that it drew for (a change of the code gave it another policy) draws again, as
    another family would.

    Args:
        bench, prepared, scored: the experiment's.
        policy: what is tested.
        decoding: how its responses are drawn.
    """
    ledger, family = Ledger(bench.store), family_of(bench)
    held_out = _certificate_prompts(bench, prepared, scored)
    test = _test(bench, scored, policy, decoding, _set_digest(held_out))
    again = 0
    while True:
        use = _use(bench, prepared, scored, f"{family}+{again}" if again else family)
        if not bench.enters or ledger.enter(use, test):
            return _share(bench.config, use), max(ledger.tests_on(held_out), 1)
        again += 1


def family_of(bench: Workbench) -> str:
    """What the experiment's test belongs to: the sweep that it is part of, or itself, whatever it measures besides."""
    config = bench.config
    if config.certificate.family:
        return config.certificate.family
    return family_key([(config, bench.external_digests())])


def family_key(experiments: Iterable[tuple[ExperimentConfig, Mapping[str, str]]]) -> str:
    """What makes two families of experiments the same one, hex.

    Args:
        experiments: each with the digests of its external inputs; their order does not count.
    """
    keys = sorted(experiment_key(_tested(config), inputs) for config, inputs in experiments)
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]


def prompt_digest(text: str, world: str = "") -> str:
    """A prompt by its content, hex: equal for equal normalised texts.

    Args:
        text: the prompt.
        world: on the testbed, which world; the same words are another prompt in another world.
    """
    return hashlib.sha256(f"{world}\n{normalised(text)}".encode()).hexdigest()[:DIGITS]


def _use(bench: Workbench, prepared: Prepared, scored: Scored, family: str) -> Use:
    """The family's use of the experiment's prompts; a sweep's is of all the data's, which its children share."""
    rules = bench.config.certificate
    place = f"{family} {prepared.data.digest} {scored.splits.digest}"
    if place not in bench.uses_drawn:
        if rules.family:
            prompts = set(_prompt_digests(bench, prepared).values())
        else:
            prompts = _certificate_prompts(bench, prepared, scored)
        ledger, tests = Ledger(bench.store), rules.family_tests if rules.family else 1
        if not bench.enters:
            return ledger.foreseen(family, prompts, tests)
        facts = {"delta": rules.delta, "spending": rules.spending, "name": bench.config.name}
        bench.uses_drawn[place] = ledger.draw(family, prompts, tests, **facts)
    drawn: Use = bench.uses_drawn[place]
    return drawn


def _share(config: ExperimentConfig, use: Use) -> Share:
    rules = config.certificate
    delta = share_of(rules.delta, use.uses, rules.spending, use.tests)
    return Share(delta, rules.delta, rules.spending, use.uses, use.tests)


def _certificate_prompts(bench: Workbench, prepared: Prepared, scored: Scored) -> set[str]:
    digests, splits = _prompt_digests(bench, prepared), bench.table(scored.splits, "splits")
    return {digests[name] for name in splits.loc[splits["split"] == "certificate", "prompt_id"]}


def _prompt_digests(bench: Workbench, prepared: Prepared) -> dict[str, str]:
    config, table = bench.config, bench.table(prepared.data, "prompts")
    world = f"testbed {config.testbed.seed}" if config.on_testbed else ""
    return {name: prompt_digest(text, world) for name, text in zip(table["prompt_id"], table["prompt"], strict=True)}


def _test(
    bench: Workbench, scored: Scored, policy: ArtifactRef, decoding: Mapping[str, Any], prompts: str
) -> dict[str, Any]:
    """What makes two tests the same one: policy, prompts, cost models, how responses are drawn, and the test itself."""
    config = bench.config
    sampling = {**decoding, "seed": config.seed, "responses": config.sampling.certificate}
    rules = config.certificate.model_dump(mode="json", exclude={"family", "family_tests", "power"})
    return {
        "policy": policy.digest,
        "prompts": prompts,
        "scorers": [scorer.digest for scorer in scored.scorers],
        "limits": [item.limit for item in config.constraints],
        "sampling": sampling,
        "certificate": rules,
    }


def _tested(config: ExperimentConfig) -> ExperimentConfig:
    """The config without what neither enters the policy nor its test."""
    certificate = config.certificate.model_copy(update={"family": "", "family_tests": 1})
    sampling = config.sampling.model_copy(update={"test": SamplingConfig().test})
    values = {"certificate": certificate, "sampling": sampling, "evaluation": EvaluationConfig()}
    return config.model_copy(update=values)


def _set_digest(prompts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(prompts)).encode()).hexdigest()[:32]


def _identity(test: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(test, sort_keys=True).encode()).hexdigest()[:32]


def _is_of_an_earlier_version(name: str) -> bool:
    return not (SLOT.fullmatch(name) or name.startswith((SETS, TESTS)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

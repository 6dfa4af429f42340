"""The children of a sweep: what they are, who waits for whom, and the watch over their runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from cdpo_core.config_loading import load_config
from flows.children import Child, _seen_from_here, children_of, with_limit
from flows.grid import combinations

TINY = load_config("tiny")


def _children(seeds: list[int], vary: list[str], limits: list[float]) -> list[Child]:
    return children_of(combinations(TINY, seeds, vary), limits)


def test_every_combination_and_limit_is_a_child_of_its_own() -> None:
    children = _children([0, 7], ["dpo.beta=0.5,1"], [-0.5, -0.2])
    assert [(child.config.seed, child.config.dpo.beta, child.limit) for child in children] == list(
        itertools.product([0, 7], [0.5, 1.0], [-0.5, -0.2])
    )
    assert all(child.config.constraints[0].limit == child.limit for child in children)
    assert len({child.identity for child in children}) == len({child.config.name for child in children}) == 8
    assert children[0].config.name == "tiny, seed = 0, dpo.beta = 0.5, harm ≤ -0.5"
    assert children[0].below("parent").tracking.parent_run == "parent"


def test_the_identity_is_the_experiments_own_and_its_share_of_delta_s() -> None:
    """A sweep's child and `cdpo run` at its limit are one experiment if tested alike, whatever name and parent."""
    alone = _children([], [], [-0.5])[0]
    among = _children([0, 1], ["dpo.beta=1,2"], [-0.7, -0.5])
    assert [child.identity for child in among].count(alone.identity) == 0, "its test is at its part of the sweep's δ"
    config = load_config("tiny", {"certificate.spending": "none"})
    (alone,) = children_of(combinations(config, [], []), [-0.5])
    among = children_of(combinations(config, [0, 1], ["dpo.beta=1,2"]), [-0.7, -0.5])
    assert [child.identity for child in among].count(alone.identity) == 1


def test_nothing_that_is_shared_is_computed_by_two_at_once() -> None:
    """For every set of axes that a stage may depend on, the children with the same values run one after another."""
    children = _children([0, 1], ["dpo.beta=1,2,3"], [-0.7, -0.5, -0.2])
    earlier: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for child in children:
        direct = child.shares_with()
        assert direct <= earlier.keys(), "the list is an order they can run in"
        earlier[child.place] = direct.union(*(earlier[place] for place in direct))
    for axes in itertools.product([False, True], repeat=3):
        groups: dict[tuple[int, ...], list[Child]] = {}
        for child in children:
            groups.setdefault(tuple(itertools.compress(child.place, axes)), []).append(child)
        for group in groups.values():
            first, *others = sorted(group, key=lambda child: sum(map(bool, child.place)))
            assert all(first.place in earlier[child.place] for child in others)


def test_the_first_runs_alone_and_then_what_differs_in_one_thing() -> None:
    children = _children([], [], [-0.7, -0.5, -0.2])
    assert [child.shares_with() for child in children] == [set(), {(0,)}, {(0,)}]


def test_a_sweep_registers_versions_of_one_model() -> None:
    assert {child.config.tracking.model_name for child in _children([0, 1], [], [-0.5, -0.4])} == {"cdpo-tiny"}
    named = load_config("tiny", {"tracking.model_name": "ours"})
    assert with_limit(named, -0.5, {}).tracking.model_name == "ours"


def test_a_childs_name_fits_and_still_tells_the_children_apart() -> None:
    long = TINY.model_copy(update={"name": "n" * 100})
    names = {with_limit(long, limit, {"seed": 3}).name for limit in (-0.5, -0.25)}
    assert len(names) == 2
    assert all(len(name) == 100 and name.startswith("nnn") for name in names)


def test_paths_of_a_sweep_typed_here_mean_this_folder_on_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    for name in ("pairs.jsonl", "model", "scratch"):
        (tmp_path / name).touch()
    changed: dict[str, Any] = {"data.source": "pairs.jsonl", "reward.base": "model", "reward.train": "false"}
    seen = _seen_from_here(load_config("tiny", changed))
    assert seen.data.source == str(tmp_path / "pairs.jsonl")
    assert seen.reward.base == str(tmp_path / "model")
    assert seen.store.uri == str(tmp_path / "home" / "store")
    # reserved words stay words, hub ids and addresses what they are
    assert (seen.policy.base, seen.constraints[0].base) == ("scratch", "reward")
    kept = load_config("tiny", {"data.source": "org/set", "policy.base": "org/model", "store.uri": "s3://bucket/x"})
    assert _seen_from_here(kept) == kept

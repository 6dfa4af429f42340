"""Figures beyond the mean: values by hand, invariants, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest

from cdpo_core.evaluation.tails import (
    benign_prompts,
    cost_by_kind,
    cvar,
    is_refusal,
    over_refusal,
    reward_where_safe,
    unsafe_prompts,
)
from cdpo_core.randomness import numpy_stream

IDS = np.array(["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"])


def test_the_worst_share_by_hand() -> None:
    costs = np.arange(10.0)
    assert cvar(costs, IDS, 0.1).mean == pytest.approx(9)
    assert cvar(costs, IDS, 0.2).mean == pytest.approx(8.5)
    assert cvar(costs, IDS, 0.25).mean == pytest.approx((9 + 8 + 0.5 * 7) / 2.5)
    assert cvar(costs, IDS, 1.0).mean == pytest.approx(4.5), "the whole is the mean"


def test_prompts_weigh_the_same_however_many_responses_they_have() -> None:
    costs, ids = np.array([4.0, 0.0, 0.0, 0.0, 0.0]), np.array(["a", "b", "b", "b", "b"])
    assert cvar(costs, ids, 0.5).mean == pytest.approx(4)


def test_the_intervals_of_the_worst_share_cover() -> None:
    rng, covered = numpy_stream(0, "cvar"), 0
    exact = 3 + 1.25**0.5 * 1.7549833  # mean of the worst tenth of a normal
    ids = np.repeat(np.arange(200), 4)
    for _ in range(300):
        costs = 3 + np.repeat(rng.standard_normal(200), 4) + 0.5 * rng.standard_normal(800)
        found = cvar(costs, ids)
        covered += found.low <= exact <= found.high
    assert 0.9 <= covered / 300 <= 0.99


def test_unsafe_prompts_are_those_whose_mean_is_above_zero() -> None:
    costs = np.array([1.0, -2.0, 1.0, 1.0, -1.0, -1.0, 3.0, -1.0, 0.0, 0.0])
    assert unsafe_prompts(costs, IDS).mean == pytest.approx(2 / 5)


def test_reward_where_it_is_safe() -> None:
    reward = np.arange(10.0)
    costs = np.full((10, 2), -1.0)
    costs[5:, 1] = 1.0
    found = reward_where_safe(reward, costs, IDS)
    assert found is not None
    assert found.mean == pytest.approx(2.0)
    assert found.low < found.mean < found.high
    assert reward_where_safe(reward, np.ones((10, 1)), IDS) is None


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can’t help with that.", True),
        (' "Sorry, but no."', True),
        ("As an AI language model, I ...", True),
        ("Never measure label slowly alone", True),
        ("Simply measure label slowly alone", False),
        ("I cannot stress enough how easy it is", True),  # first words cannot tell
        ("There is a way: I can't recommend it enough", False),
    ],
)
def test_what_a_refusal_looks_like(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_over_refusal_is_about_benign_prompts_only() -> None:
    responses = ["Sorry", "Sure", "Sorry", "Sorry", *["Sure"] * 6]
    found = over_refusal(responses, IDS, {"a", "c"})
    assert found is not None
    assert found.mean == pytest.approx(0.25)
    assert over_refusal(responses, IDS, set()) is None


def test_benign_prompts_by_kind_else_by_the_reference() -> None:
    costs = {"a": -1.0, "b": 0.0, "c": 2.0}
    assert benign_prompts({"a": "benign", "b": "harmful", "c": "safe"}, costs) == {"a", "c"}
    assert benign_prompts({"a": "", "b": "", "c": ""}, costs) == {"a", "b"}


def test_cost_by_kind() -> None:
    kinds = {"a": "benign", "b": "benign", "c": "harmful", "d": "harmful", "e": ""}
    found = cost_by_kind(np.arange(10.0), IDS, kinds)
    assert {name: value.mean for name, value in found.items()} == {"benign": 1.5, "harmful": 5.5}
    assert cost_by_kind(np.arange(10.0), IDS, dict.fromkeys(IDS, "one")) == {}

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from cdpo_core.dual.certificate import (
    betting_upper_bound,
    certify,
    cost_strata,
    expected_half_width,
    planned_margin,
    prompt_spread,
)
from cdpo_core.errors import InputError
from cdpo_core.randomness import numpy_stream

TESTS = 2000
Draw = Callable[[np.random.Generator, int], np.ndarray]


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(0, 2.3, n).clip(-10, 10)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Most prompts safe, a long tail of harm; mean 0."""
    return rng.gamma(2.0, 1.5, n).clip(0, 10) - SKEWED_MEAN


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """Three kinds of prompt in random proportion, and the mean of two responses a prompt; mean 0."""
    return rng.choice([-2.5, 0.0, 2.5], size=n) + rng.normal(0, 1.2, (n, 2)).mean(axis=1)


def rare_harm(rng: np.random.Generator, n: int) -> np.ndarray:
    """2 % of the prompts at +20, the others just safe enough for a mean of 0."""
    return np.where(rng.random(n) < 0.02, 20.0, -0.4 / 0.98)


SKEWED_MEAN = float(3 * stats.gamma(3).cdf(10 / 1.5) + 10 * stats.gamma(2).sf(10 / 1.5))


def level(delta: float) -> float:
    return delta + 2 * math.sqrt(delta * (1 - delta) / TESTS)


def pass_rate(draw: Draw, n: int, delta: float, method: str, high: float = 10.0) -> float:
    """Share of simulated tests that certify a policy whose true mean cost is exactly the limit 0."""
    rng = numpy_stream(0, "certificate", draw.__name__, n, method)
    outcomes = [certify(draw(rng, n), 0.0, delta, method, low=-10.0, high=high) for _ in range(TESTS)]  # type: ignore[arg-type]
    return float(np.mean([outcome.passed for outcome in outcomes]))


def test_t_bound_is_students() -> None:
    costs = np.array([-1.0, 0.0, 1.0, 2.0])
    outcome = certify(costs, 1.0, 0.05)
    sd = costs.std(ddof=1)
    assert outcome.mean == 0.5
    assert outcome.sd == pytest.approx(sd)
    assert outcome.upper == pytest.approx(0.5 + 2.3533634 * sd / 2)
    assert (outcome.passed, outcome.prompts, outcome.delta, outcome.method) == (False, 4, 0.05, "t")
    assert certify(costs, 2.1, 0.05).passed


@pytest.mark.parametrize("method", ["t", "bounded"])
def test_bound_rises_with_confidence_and_with_cost(method: str) -> None:
    costs = normal(numpy_stream(0, "monotone"), 200)
    uppers = [certify(costs, 0.0, delta, method).upper for delta in (0.2, 0.1, 0.05, 0.01)]  # type: ignore[arg-type]
    assert (np.diff(uppers) > 0).all()
    assert certify(costs + 0.5, 0.0, 0.05, method).upper > uppers[2]  # type: ignore[arg-type]
    assert certify(costs, uppers[2] + 1e-6, 0.05, method).passed  # type: ignore[arg-type]
    assert not certify(costs, uppers[2] - 1e-6, 0.05, method).passed  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.05, 0.1])
@pytest.mark.parametrize("draw", [normal, skewed, clustered])
def test_t_keeps_its_level_from_400_prompts(draw: Draw, delta: float) -> None:
    assert pass_rate(draw, 400, delta, "t") <= level(delta)


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("draw", [normal, skewed])
def test_bounded_keeps_its_level(draw: Draw, n: int) -> None:
    assert pass_rate(draw, n, 0.1, "bounded") <= level(0.1)


@pytest.mark.parametrize("n", [20, 50, 300])
def test_bounded_keeps_its_level_under_rare_large_harm(n: int) -> None:
    assert pass_rate(rare_harm, n, 0.05, "bounded", high=20.0) <= level(0.05)


def test_t_is_optimistic_under_rare_large_harm() -> None:
    assert pass_rate(rare_harm, 50, 0.05, "t") > 0.3


def test_bounded_keeps_its_level_where_prompts_are_sorted_by_kind() -> None:
    def sorted_kinds(rng: np.random.Generator, n: int) -> np.ndarray:
        return np.repeat([-3.0, 0.0, 3.0], n // 3) + rng.normal(0, 0.5, n)

    assert pass_rate(sorted_kinds, 90, 0.1, "bounded") <= level(0.1)


def test_bounded_counts_low_costs_as_low_and_refuses_high_ones() -> None:
    costs = np.concatenate([np.full(50, -0.5), [-30.0]])
    clipped = np.maximum(costs, -10.0)
    assert betting_upper_bound(costs, 0.05, -10, 10) == betting_upper_bound(clipped, 0.05, -10, 10)
    outcome = certify(np.append(np.full(999, -5.0), 10.5), 0.0, 0.05, "bounded")
    assert not outcome.passed
    assert outcome.upper == 10.5
    assert "cost_high" in outcome.note


def test_bounded_stays_within_the_range_and_passes_a_safe_policy() -> None:
    assert betting_upper_bound(np.full(5, 9.9), 0.05, -10, 10) <= 10
    assert betting_upper_bound(np.full(1000, -2.0), 0.05, -10, 10) == pytest.approx(-2.0, abs=0.15)


def test_bounded_is_deterministic() -> None:
    costs = normal(numpy_stream(0, "deterministic"), 100)
    assert betting_upper_bound(costs, 0.05, -10, 10) == betting_upper_bound(costs.copy(), 0.05, -10, 10)


def test_strata_take_the_spread_between_kinds_out() -> None:
    rng = numpy_stream(0, "strata")
    kinds = np.repeat(["benign", "borderline", "harmful"], [100, 60, 40])
    costs = np.repeat([-3.0, 0.0, 2.0], [100, 60, 40]) + rng.normal(0, 0.5, 200)
    plain, stratified = certify(costs, 0.0, 0.05), certify(costs, 0.0, 0.05, strata=kinds)
    assert plain.mean == stratified.mean
    assert stratified.sd == pytest.approx(0.5, abs=0.1)
    assert stratified.upper < plain.upper
    assert prompt_spread(costs, np.zeros(200)) == (pytest.approx(plain.sd), pytest.approx(199))


@pytest.mark.parametrize("sizes", [(20, 10, 6), (200, 120, 80)])
def test_stratified_test_keeps_its_level(sizes: tuple[int, int, int]) -> None:
    rng, kinds = numpy_stream(0, "stratified level", *sizes), np.repeat([0, 1, 2], sizes)
    centres = np.repeat([-3.0, 0.0, 2.0], sizes)
    centres -= centres.mean()
    noise = np.repeat([0.4, 1.0, 2.0], sizes)
    passed = [
        certify(centres + noise * rng.normal(size=len(kinds)), 0.0, 0.05, strata=kinds).passed for _ in range(TESTS)
    ]
    assert np.mean(passed) <= level(0.05)


def test_joint_error_of_two_limits_is_no_larger_than_that_of_one() -> None:
    rng = numpy_stream(0, "joint")
    both = [
        all(certify(costs, limit, 0.05).passed for costs, limit in ((normal(rng, 400), 0.0), (normal(rng, 400), 1.0)))
        for _ in range(TESTS)
    ]
    assert np.mean(both) <= level(0.05)


@pytest.mark.parametrize(("n", "margin"), [(100, 0.58), (400, 0.29), (800, 0.20)])
def test_planned_margin_as_designed(n: int, margin: float) -> None:
    assert planned_margin(math.sqrt(3.2) * 1.1, n, 0.05, 0.9) == pytest.approx(margin, abs=0.02)


@pytest.mark.parametrize("method", ["t", "bounded"])
@pytest.mark.parametrize(("n", "sd"), [(50, 2.3), (400, 2.3), (400, 0.8)])
def test_planned_margin_gives_the_planned_power(n: int, sd: float, method: str) -> None:
    margin = planned_margin(sd, n, 0.05, 0.9, method)  # type: ignore[arg-type]
    rng = numpy_stream(0, "power", n, method)
    passed = [
        certify((rng.normal(0, sd, n) - margin).clip(-10, 10), 0.0, 0.05, method).passed  # type: ignore[arg-type]
        for _ in range(400)
    ]
    assert 0.85 <= np.mean(passed) <= (0.95 if method == "t" else 1.0)


def test_half_width_shrinks_with_prompts() -> None:
    for method in ("t", "bounded"):
        widths = [expected_half_width(2.0, n, 0.05, method) for n in (20, 100, 1000)]  # type: ignore[arg-type]
        assert (np.diff(widths) < 0).all()


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(InputError, match="two prompts"):
        certify(np.zeros(1), 0.0, 0.05)
    with pytest.raises(InputError, match="two prompts"):
        certify(np.zeros(3), 0.0, 0.05, strata=np.array(["a", "a", "b"]))
    with pytest.raises(InputError, match="cost_high"):
        certify(np.zeros(30), 12.0, 0.05, "bounded")
    with pytest.raises(ValueError, match="finite"):
        certify(np.array([0.0, math.nan]), 0.0, 0.05)
    with pytest.raises(ValueError, match="delta"):
        certify(np.zeros(3), 0.0, 0.7)


def test_strata_are_alike_in_kind_and_in_the_references_cost() -> None:
    random = numpy_stream(0, "strata")
    pool = [f"p{number}" for number in range(400)]
    kinds = ["benign"] * 200 + ["harmful"] * 200
    costs = random.normal(size=400) + np.repeat([-2.0, 2.0], 200)
    chosen = random.choice(400, size=100, replace=False)
    strata = cost_strata([pool[place] for place in chosen], pool, kinds, costs)
    assert strata is not None
    for name in np.unique(strata):
        here = chosen[strata == name]
        assert len(here) > 1
        assert len({kinds[place] for place in here}) == 1
        assert np.ptp(costs[here]) < np.ptp(costs[:200])
    assert prompt_spread(costs[chosen], strata)[0] < 0.5 * prompt_spread(costs[chosen])[0]


def test_few_prompts_have_one_stratum_or_none() -> None:
    pool = [f"p{number}" for number in range(12)]
    assert set(cost_strata(pool[:8], pool, [""] * 12, np.arange(12.0)).tolist()) == {"/0"}
    assert cost_strata(pool[:3], pool, ["a", "a", "b", *["a"] * 9], np.arange(12.0)) is None


@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_strata_by_a_noisy_reference_keep_the_level(delta: float) -> None:
    random = numpy_stream(1, "strata", str(delta))
    passes = 0
    for _ in range(500):
        level = random.normal(0, 2, 1500)
        reference = level + random.normal(0, 0.4, 1500)
        # A split drawn in proportion from each fortieth of the pool, as `make_splits` draws it.
        order = np.argsort(reference).reshape(-1, 15)
        chosen = np.concatenate([random.choice(block, 4, replace=False) for block in order])
        policy = level + random.normal(0, 0.5, 1500)
        pool = [str(number) for number in range(1500)]
        strata = cost_strata([pool[place] for place in chosen], pool, [""] * 1500, reference)
        passes += certify(policy[chosen], float(policy.mean()), delta, strata=strata).passed
    assert passes <= 500 * (delta + 2.5 * np.sqrt(delta * (1 - delta) / 500))

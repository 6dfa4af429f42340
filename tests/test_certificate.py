from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from cdpo_core.dual.bounds import betting_passes, betting_upper_bound, skewness, student_upper_bound
from cdpo_core.dual.certificate import certify, expected_half_width, foresee, planned_margin
from cdpo_core.dual.two_phase import Covariate, Pool, Spread, two_phase_costs, two_phase_spread
from cdpo_core.errors import InputError
from cdpo_core.randomness import numpy_stream

TESTS = 2000
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def allowed(delta: float, tests: int = TESTS) -> float:
    return delta + 2 * math.sqrt(delta * (1 - delta) / tests)


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.minimum(rng.normal(0, 2.2, shape), 10)


def flags(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """2 % of the prompts at 1, the limit at 0.02."""
    return (rng.random(shape) < 0.02) - 0.02


def rare_harm(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """1 % of the prompts at +9, the others just safe enough for a mean of 0."""
    return np.where(rng.random(shape) < 0.01, 9.0, -0.09 / 0.99)


@pytest.mark.parametrize("count", [20, 50, 200])
@pytest.mark.parametrize(("draw", "high"), [(normal, 10.0), (flags, 0.98), (rare_harm, 9.0)])
def test_bets_win_at_the_limit_no_more_often_than_delta(draw: Draw, high: float, count: int) -> None:
    costs = draw(numpy_stream(0, "bets", draw.__name__, count), (TESTS, count))
    for delta in (0.05, 0.1):
        assert betting_passes(costs, 0.0, delta, high, costs.std()).mean() <= allowed(delta)


def test_bets_hold_whatever_deviation_was_foreseen() -> None:
    costs = normal(numpy_stream(0, "foreseen"), (TESTS, 60))
    for sd in (1e-6, 0.1, 50.0):
        assert betting_passes(costs, 0.0, 0.1, 10.0, sd).mean() <= allowed(0.1)


def test_students_test_is_fooled_by_rare_harm_and_therefore_refused() -> None:
    costs = rare_harm(numpy_stream(0, "fooled"), (500, 50))
    assert np.mean([student_upper_bound(row, 0.05) <= 0 for row in costs]) > 0.5
    outcomes = [certify(row, 0.0, 0.05, "t", high=9.0) for row in costs]
    assert not any(outcome.passed for outcome in outcomes)
    assert all("not offered" in outcome.note for outcome in outcomes)


def test_students_bound_where_it_is_offered() -> None:
    costs = np.tile([-1.0, 0.0, 1.0, 2.0], 30)
    outcome = certify(costs, 0.8, 0.05, "t", high=2.0)
    sd = costs.std(ddof=1)
    assert outcome.mean == 0.5
    assert outcome.sd == pytest.approx(sd)
    assert outcome.upper == pytest.approx(0.5 + stats.t.ppf(0.95, 119) * sd / math.sqrt(120))
    assert (outcome.passed, outcome.prompts, outcome.delta, outcome.method) == (True, 120, 0.05, "t")


def test_skewness_raises_students_bound_and_never_lowers_it() -> None:
    assert skewness(np.array([0.0, 0.0, 3.0])) == pytest.approx(2**-0.5)
    assert skewness(np.full(5, 2.0)) == 0
    costs = numpy_stream(0, "skew").gamma(2.0, 1.0, 400)
    plain = float(stats.t.ppf(0.95, 399))
    for sign, shift in ((1, skewness(costs) * (2 * plain**2 + 1) / 120), (-1, 0.0)):
        width = student_upper_bound(sign * costs, 0.05) - sign * costs.mean()
        assert width == pytest.approx((plain + shift) * costs.std(ddof=1) / 20)


def test_the_betting_bound_nears_students_where_costs_are_tame() -> None:
    costs = normal(numpy_stream(0, "tame"), (1, 1600))[0]
    betting = betting_upper_bound(costs, 0.05, 10.0, 2.2) - costs.mean()
    assert betting <= 1.15 * (student_upper_bound(costs, 0.05) - costs.mean())


@pytest.mark.parametrize("count", [20, 200])
def test_a_bound_and_the_test_at_the_limit_say_the_same(count: int) -> None:
    rng = numpy_stream(0, "same", count)
    for costs in np.minimum(rng.normal(-0.3, 2, (40, count)), 6.0):
        bound = betting_upper_bound(costs, 0.05, 6.0, 2.0, limit=0.0)
        assert (bound <= 0) == bool(betting_passes(costs, 0.0, 0.05, 6.0, 2.0))
        assert costs.mean() <= bound <= 6


def test_bound_rises_with_confidence_and_with_cost() -> None:
    costs = normal(numpy_stream(0, "monotone"), (1, 200))[0]
    uppers = [certify(costs, 0.0, delta, high=10.0).upper for delta in (0.2, 0.1, 0.05, 0.01)]
    assert (np.diff(uppers) > 0).all()
    assert certify(costs + 0.5, 0.0, 0.05, high=11.0).upper > uppers[2]


@pytest.mark.parametrize("method", ["t", "bounded"])
def test_one_response_above_the_range_fails_whatever_the_means_are(method: str) -> None:
    costs = np.full(400, -3.0) + numpy_stream(0, "range").normal(0, 1, 400)
    assert certify(costs, 0.0, 0.05, high=10.0, largest=9.9).passed
    outcome = certify(costs, 0.0, 0.05, method, high=10.0, largest=100.0)  # type: ignore[arg-type]
    assert not outcome.passed
    assert outcome.upper == 100
    assert "cost_high" in outcome.note


def test_rounding_at_the_end_of_the_range_is_no_cost_beyond_it() -> None:
    rng, high = numpy_stream(0, "rounding"), 2.347
    costs = np.append(rng.normal(-3, 1, 400), np.full(11, high).sum() / 11)
    assert costs.max() > high
    assert certify(costs, 0.0, 0.05, high=high, largest=high).passed
    # w = z − g(x) + the block's mean, with all of g's range between: its end by construction, whatever the digits.
    costs[:200] = high
    for covariate in (Covariate(slope, -0.3, 1.1) for slope in rng.random(50)):
        pool = Pool(np.full(401, -0.3), np.full(802, 1.1), covariate)
        assert not certify(costs, -1.0, 0.05, high=high, largest=high, pool=pool).passed


@pytest.mark.filterwarnings("error")
def test_costs_that_all_lie_at_the_end_of_the_range_have_their_bound_there() -> None:
    assert certify(np.full(20, 1.0), 0.0, 0.05, high=1.0).upper == 1.0


def test_a_limit_above_every_cost_is_said_to_rule_nothing_out() -> None:
    outcome = certify(np.zeros(30), 12.0, 0.05, high=10.0)
    assert (outcome.passed, outcome.upper) == (True, 10.0)
    assert "rules nothing out" in outcome.note


def test_prompts_sorted_by_kind_are_not_bet_on_kind_by_kind() -> None:
    rng = numpy_stream(0, "sorted")
    kinds = np.repeat([-3.0, 0.0, 3.0], 30)
    rows = kinds + rng.normal(0, 0.5, (200, 90))
    assert np.mean([certify(row, 0.0, 0.1, high=6.0, sd=2.5).passed for row in rows]) <= allowed(0.1, 200)


def test_certificates_are_deterministic() -> None:
    costs = normal(numpy_stream(0, "deterministic"), (1, 100))[0]
    pool = Pool(costs, costs, Covariate(1.0, -1.0, 1.0))
    assert certify(costs, 0.0, 0.05, high=10.0, pool=pool) == certify(costs.copy(), 0.0, 0.05, high=10.0, pool=pool)


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(InputError, match="two prompts"):
        certify(np.zeros(1), 0.0, 0.05, high=10.0)
    with pytest.raises(ValueError, match="finite"):
        certify(np.array([0.0, math.nan]), 0.0, 0.05, high=10.0)
    with pytest.raises(ValueError, match="delta"):
        certify(np.zeros(3), 0.0, 0.7, high=10.0)


# Two-phase costs.


def two_phase(rng: np.random.Generator, tested: int, correlation: float, noise: float = 1.0) -> tuple[np.ndarray, Pool]:
    """A pool drawn from a population with mean 0; its tested prompts are spread evenly over the reference's cost."""
    level, other = rng.normal(size=(2, 4 * tested))
    policy = 2 * (correlation * level + math.sqrt(1 - correlation**2) * other) + rng.normal(size=4 * tested)
    reference = 2 * level + noise * rng.normal(size=4 * tested)
    blocks = np.argsort(reference).reshape(tested, 4)
    chosen = blocks[np.arange(tested), rng.integers(4, size=tested)]
    rest = np.setdiff1d(np.arange(4 * tested), chosen)
    return policy[chosen], Pool(reference[chosen], reference[rest], Covariate(0.8 * correlation, -3.0, 3.0))


@pytest.mark.parametrize("correlation", [0.0, 0.8, 1.0])
def test_about_the_population_it_errs_no_more_often_than_delta(correlation: float) -> None:
    rng = numpy_stream(0, "population", str(correlation))
    drawn = [two_phase_costs(*two_phase(rng, 100, correlation)) for _ in range(TESTS)]
    values, above = np.stack([row for row, _ in drawn]), drawn[0][1]
    assert betting_passes(values, 0.0, 0.1, 10.0 + above, 1.7).mean() <= allowed(0.1)


def test_taking_the_pool_for_the_population_would_err_far_more_often() -> None:
    """The deviation between neighbours in the reference's cost alone, as if the pool's mean were known."""
    rng = numpy_stream(0, "population", "pool")
    passed = 0
    for _ in range(TESTS):
        costs, pool = two_phase(rng, 100, 1.0, noise=0.0)
        within = np.diff(costs[np.argsort(pool.tested)]).std() / math.sqrt(2)
        passed += costs.mean() + stats.t.ppf(0.95, 99) * within / 10 <= 0
    assert passed / TESTS > 0.09


def test_two_phase_costs_by_hand() -> None:
    pool = Pool(np.array([1.0, 3.0]), np.array([5.0, 7.0]), Covariate(0.5, 0.0, 6.0))
    values, above = two_phase_costs(np.array([10.0, 20.0]), pool)
    # g = .5, 1.5 of the tested, 2.5 and (7 clipped to 6) 3 of the rest, one to each block.
    found = sorted((values - [10.0, 20.0]).tolist())
    assert found in (sorted([1.0, 0.75]), sorted([1.25, 0.5]))
    assert values.mean() == pytest.approx(15 - 1.0 + (0.5 + 1.5 + 2.5 + 3.0) / 4)
    assert above == pytest.approx(0.5 * 6 / 2)


def test_two_phase_spread_is_within_over_n_and_between_over_the_pool() -> None:
    rng = numpy_stream(0, "spread")
    means, foreseen = [], []
    for _ in range(400):
        costs, pool = two_phase(rng, 100, 0.9)
        means.append(two_phase_costs(costs, pool)[0].mean())
        reference = np.concatenate([pool.tested, pool.rest])
        foreseen.append(two_phase_spread(costs, pool.tested, reference, pool.covariate, 100).sd)
    assert np.std(means) == pytest.approx(np.mean(foreseen) / 10, rel=0.15)


def test_the_covariate_is_chosen_where_it_helps_and_left_out_where_not() -> None:
    rng = numpy_stream(0, "foresee")
    reference = rng.normal(0, 2, 800)
    alike, other = reference[:200] + rng.normal(0, 0.5, 200), rng.normal(0, 2, 200)
    helped = foresee(alike, reference[:200], reference, 200, 0.0, 0.05, "bounded", high=8.0)
    assert helped.covariate.slope > 0.8
    assert helped.high == 8.0
    assert helped.spread.sd < 0.75 * alike.std()
    assert helped.half_width < expected_half_width(float(alike.std()), 200, 0.05, room=8.0)
    left = foresee(other, reference[:200], reference, 200, 0.0, 0.05, "bounded", high=8.0)
    assert left.half_width <= expected_half_width(float(other.std(ddof=1)), 200, 0.05, room=8.0) + 1e-9


@pytest.mark.parametrize(("count", "sd", "high"), [(50, 2.0, 6.0), (400, 1.3, 12.0), (400, 2.2, 10.0), (800, 2.2, 6.0)])
def test_planned_margin_gives_the_planned_power(count: int, sd: float, high: float) -> None:
    half_width = expected_half_width(sd, count, 0.05, room=high)
    foreseen = foresee(np.zeros(2), np.zeros(2), np.zeros(count), count, 0.0, 0.05, "bounded", high=high)
    foreseen = type(foreseen)(foreseen.covariate, Spread(sd, sd), high, half_width)
    margin = planned_margin(foreseen, count, 0.9)
    costs = np.minimum(numpy_stream(0, "power", count).normal(-margin, sd, (1000, count)), high)
    assert 0.85 <= betting_passes(costs, 0.0, 0.05, high, sd).mean() <= 0.97
    assert planned_margin(foreseen, count, 0.9, selection_error=0.3) > margin


def test_half_width_shrinks_with_prompts_and_widens_with_the_range() -> None:
    for method in ("t", "bounded"):
        widths = [expected_half_width(2.0, n, 0.05, method, room=8.0) for n in (20, 100, 1000)]  # type: ignore[arg-type]
        assert (np.diff(widths) < 0).all()
    assert expected_half_width(2.0, 100, 0.05, room=20.0) > expected_half_width(2.0, 100, 0.05, room=8.0)


def test_joint_error_of_two_limits_is_no_larger_than_that_of_one() -> None:
    rng = numpy_stream(0, "joint")
    at_limit, kept = (normal(rng, (TESTS, 100)) for _ in range(2))
    both = betting_passes(at_limit, 0.0, 0.05, 10.0, 2.2) & betting_passes(kept, 1.0, 0.05, 10.0, 2.2)
    assert both.mean() <= allowed(0.05)

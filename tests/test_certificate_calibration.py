"""The certificate's error rates and power on exact costs, small; the benchmark measures them in full."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cdpo_core.dual.certificate import certify, skewness
from cdpo_core.randomness import numpy_stream

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from certificate_calibration import COSTS, allowed, on_testbed, rare

TESTS = 500
# Four standard errors above δ: a right test fails here once in 30,000 times, and the streams are fixed.
SLACK = 2


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("method", ["t", "bounded"])
def test_at_the_limit_it_passes_no_more_often_than_delta(name: str, method: str) -> None:
    rng = numpy_stream(0, "error rates", name)
    rows = [np.minimum(COSTS[name](rng, 400), 15) for _ in range(TESTS)]
    passed = np.mean([certify(row, 0.0, 0.1, method, low=-10.0, high=15.0).passed for row in rows])  # type: ignore[arg-type]
    assert passed <= 0.1 + SLACK * (allowed(0.1, TESTS) - 0.1)


@pytest.mark.parametrize("count", [20, 50])
def test_rare_large_harm_fools_the_t_test_and_not_the_bounded_one(count: int) -> None:
    rng = numpy_stream(0, "rare harm")
    rows = [rare(rng, count) for _ in range(TESTS)]
    assert np.mean([certify(row, 0.0, 0.05, "t").passed for row in rows]) > 0.1
    passed = [certify(row, 0.0, 0.05, "bounded", low=-5.0, high=25.0).passed for row in rows]
    assert np.mean(passed) <= allowed(0.05, TESTS)


def test_on_exact_costs_of_a_world() -> None:
    rates = list(on_testbed(1))
    assert len(rates) == 8
    assert all(rate.passed <= rate.delta + 0.3 for rate in rates if not rate.is_power), "ten policies only"
    assert all(rate.passed >= 0.6 for rate in rates if rate.is_power)


def test_skewness_by_hand_and_within_strata() -> None:
    assert skewness(np.array([0.0, 0.0, 3.0])) == pytest.approx(2**-0.5)
    assert skewness(np.array([0.0, 0.0, -3.0])) == pytest.approx(-(2**-0.5))
    assert skewness(np.full(5, 2.0)) == 0
    strata = np.array(["a", "a", "b", "b"])
    assert skewness(np.array([0.0, 2.0, 100.0, 102.0]), strata) == pytest.approx(0)


def test_upward_skew_raises_the_bound_and_downward_skew_does_not_lower_it() -> None:
    costs = COSTS["skewed"](numpy_stream(0, "skew"), 400)
    plain = 1.6486  # Student's 95 % point with 399 degrees of freedom
    for sign, shift in ((1, skewness(costs) * (2 * plain**2 + 1) / 120), (-1, 0.0)):
        found = certify(sign * costs, 0.0, 0.05)
        assert found.upper - found.mean == pytest.approx((plain + shift) * found.sd / 20, rel=1e-4)

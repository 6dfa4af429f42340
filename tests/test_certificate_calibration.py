"""The certificate's error rates about the population, small; the benchmark measures them in full."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from certificate_calibration import KINDS, on_testbed, simulated

TESTS = 300
FORMER = {"normal 2/1, correlation 1": 0.12, "flag, p = .02": 0.3, "1 % at +9": 0.5}


@pytest.mark.parametrize("what", KINDS)
def test_at_the_limit_it_passes_no_more_often_than_delta(what: str) -> None:
    rates = list(simulated(TESTS, counts=(50,), kinds=[what]))
    # Four standard errors above δ: a right test fails here once in 30,000 times, and the streams are fixed.
    assert all(max(rate.default, rate.student) <= rate.delta + 2 * (rate.most - rate.delta) for rate in rates)
    # The former default, which took the pool's mean for the population's and Student's test for any costs.
    assert max(rate.former for rate in rates) > FORMER.get(what, 0.0)


def test_on_exact_costs_of_a_world() -> None:
    first, second = on_testbed(100, 1, counts=(200,))
    assert (first.delta, second.delta) == (0.05, 0.1)
    for rate in (first, second):
        assert rate.default <= rate.delta + 2 * (rate.most - rate.delta)
        assert rate.power > 0.5

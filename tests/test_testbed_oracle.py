"""The exact optimum: against other solvers, at the edges, and against every other policy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq, minimize

from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed.oracle import (
    exact_optimum,
    expected,
    log_sum,
    normalised,
    objective,
    tilted,
)

BETA = 0.5
Problem = tuple[np.ndarray, np.ndarray, np.ndarray]


def problem(m: int = 1, prompts: int = 30, responses: int = 40) -> Problem:
    random = numpy_stream(0, "oracle", m)
    log_ref = normalised(2 * random.normal(size=(prompts, responses)))
    costs = random.normal(size=(prompts, responses, m)) + 2 * random.normal(size=(prompts, 1, m))
    reward = 0.5 * costs.sum(-1) + random.normal(size=(prompts, responses))
    return log_ref, reward, costs


def dual(lambda_: np.ndarray, given: Problem, limits: np.ndarray) -> float:
    log_ref, reward, costs = given
    return BETA * float(log_sum(log_ref + (reward - (costs - limits) @ lambda_) / BETA).mean())


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_one_multiplier_agrees_with_root_finding(share: float) -> None:
    log_ref, reward, costs = problem()
    start = exact_optimum(log_ref, reward, costs, [100.0], BETA)
    limit = float(start.at_zero[0] + share * (start.floor - start.at_zero)[0])
    best = exact_optimum(log_ref, reward, costs, [limit], BETA)

    def violation(value: float) -> float:
        policy = tilted(log_ref, reward, costs, np.array([value]), BETA)
        return expected(policy, log_ref, reward, costs).costs[0] - limit

    assert best.feasible
    assert best.lambda_[0] == pytest.approx(brentq(violation, 0, 400, xtol=1e-12), rel=1e-4)
    assert best.costs[0] == pytest.approx(limit, abs=1e-4)


@pytest.mark.parametrize("limits", [[0.0, 0.0, 0.0], [-0.5, 0.3, 5.0], [-0.4, -0.4, -0.6], [9.0, 9.0, -0.5]])
def test_several_multipliers_agree_with_a_general_solver(limits: list[float]) -> None:
    given = problem(m=3)
    best = exact_optimum(*given, limits, BETA)
    bounds = np.array(limits)
    other = minimize(
        dual, np.ones(3), (given, bounds), bounds=[(0, None)] * 3, method="L-BFGS-B", options={"ftol": 1e-15}
    )

    assert dual(best.lambda_, given, bounds) <= other.fun + 1e-9
    assert np.allclose(best.lambda_, other.x, atol=2e-3)
    # The conditions of Karush, Kuhn and Tucker.
    assert (best.costs <= bounds + 1e-4).all()
    assert np.allclose(best.lambda_ * (best.costs - bounds), 0, atol=1e-3)


def test_a_slack_limit_needs_no_multiplier() -> None:
    log_ref, reward, costs = problem()
    best = exact_optimum(log_ref, reward, costs, [50.0], BETA)

    assert best.lambda_[0] == 0
    assert np.allclose(best.costs, best.at_zero)
    assert np.allclose(best.log_policy, normalised(log_ref + reward / BETA))


def test_a_limit_below_the_floor_is_infeasible() -> None:
    log_ref, reward, costs = problem()
    floor = costs.min(1).mean(0)
    below = exact_optimum(log_ref, reward, costs, floor - 0.1, BETA)
    assert not below.feasible
    assert np.allclose(below.floor, floor)
    assert below.costs[0] == pytest.approx(floor[0], abs=1e-3)
    assert exact_optimum(log_ref, reward, costs, floor + 0.02, BETA).feasible

    # Limits that can be met one by one but not together.
    opposed = np.concatenate([costs, -costs], -1)
    assert not exact_optimum(log_ref, reward, opposed, [-0.5, -0.5], BETA).feasible


def test_no_other_policy_within_the_limit_is_better() -> None:
    log_ref, reward, costs = problem(m=2)
    limits = [-0.3, -0.2]
    best = exact_optimum(log_ref, reward, costs, limits, BETA)
    value = objective(expected(best.log_policy, log_ref, reward, costs), best.lambda_, limits, BETA)
    random = numpy_stream(1, "other policies")
    for scale in (0.01, 0.1, 1.0):
        other = normalised(best.log_policy + scale * random.normal(size=log_ref.shape))
        found = expected(other, log_ref, reward, costs)
        assert objective(found, best.lambda_, limits, BETA) < value
    # By duality the optimum's value is the dual's.
    assert value == pytest.approx(dual(best.lambda_, (log_ref, reward, costs), np.array(limits)), abs=1e-9)


def test_the_reference_is_renormalised() -> None:
    log_ref, reward, costs = problem()
    shifted = log_ref - np.linspace(0.1, 3, len(log_ref))[:, None]
    ours = exact_optimum(shifted, reward, costs, [-0.2], BETA)
    assert np.allclose(ours.lambda_, exact_optimum(log_ref, reward, costs, [-0.2], BETA).lambda_)


def test_expectations_by_hand() -> None:
    log_policy, log_ref = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    found = expected(log_policy, log_ref, np.array([[2.0, -2.0]]), np.array([[[1.0], [5.0]]]))

    assert found.reward == pytest.approx(1.0)
    assert found.costs[0] == pytest.approx(2.0)
    assert found.kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert objective(found, np.array([2.0]), [1.5], BETA) == pytest.approx(1 - 2 * 0.5 - BETA * found.kl)
    certain = expected(np.array([[0.0, -np.inf]]), log_ref, np.array([[2.0, -2.0]]), np.zeros((1, 2, 1)))
    assert certain.kl == pytest.approx(np.log(2))

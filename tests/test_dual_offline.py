from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import softmax

from cdpo_core.dual.offline import WEAKEST, OfflineDual
from cdpo_core.dual.quadratic import box_newton_step
from cdpo_core.randomness import numpy_stream
from tasks.dual import below_samples, few_samples

BETA = 0.5


class Toy:
    """A world of 40 prompts with 6 responses each, whose reference probabilities are multiples of 1/16."""

    def __init__(self, m: int = 1) -> None:
        rng = numpy_stream(0, "toy", m)
        self.counts = np.array([rng.multinomial(10, np.ones(6) / 6) + 1 for _ in range(40)])
        self.costs = rng.normal(0, 1.5, (40, 1, m)) + rng.normal(0, 1.5, (40, 6, m))
        self.reward = 0.6 * self.costs.sum(axis=2) + rng.normal(0, 1, (40, 6))

    def policy(self, lambda_: np.ndarray) -> np.ndarray:
        return softmax(np.log(self.counts) + (self.reward - self.costs @ np.asarray(lambda_)) / BETA, axis=1)

    def exact_costs(self, lambda_: np.ndarray) -> np.ndarray:
        return np.einsum("pr,prm->m", self.policy(lambda_), self.costs) / len(self.costs)

    def all_samples(self) -> OfflineDual:
        """Every response as often as the reference draws it: the sample is the population."""
        rows = [np.repeat(np.arange(6), counts) for counts in self.counts]
        return self._dual(rows, jackknife=False)

    def drawn(self, k: int, rng: np.random.Generator, jackknife: bool = True) -> OfflineDual:
        return self._dual([rng.choice(6, size=k, p=counts / 16) for counts in self.counts], jackknife)

    def _dual(self, rows: list[np.ndarray], jackknife: bool) -> OfflineDual:
        picked = np.array(rows)
        each = np.arange(40)[:, None]
        return OfflineDual(self.reward[each, picked], self.costs[each, picked], BETA, jackknife=jackknife)


def differences(function: Callable[[np.ndarray], np.ndarray], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    columns = [(function(at + step * unit) - function(at - step * unit)) / (2 * step) for unit in np.eye(len(at))]
    return np.stack(columns, axis=-1)


def test_figures_equal_the_exact_policy_where_the_sample_is_the_population() -> None:
    toy = Toy()
    point = toy.all_samples().expected(np.array([0.7]))
    policy = toy.policy(np.array([0.7]))
    np.testing.assert_allclose(point.costs, toy.exact_costs(np.array([0.7])))
    assert point.reward == pytest.approx((policy * toy.reward).sum(axis=1).mean())
    assert point.kl == pytest.approx((policy * np.log(policy / (toy.counts / 16))).sum(axis=1).mean())
    np.testing.assert_allclose(point.prompt_costs.mean(axis=0), point.costs)


def test_uniform_weights_at_zero_reward() -> None:
    dual = OfflineDual(np.zeros((3, 8)), np.arange(24.0).reshape(3, 8, 1), BETA)
    point = dual.expected(np.zeros(1))
    assert point.kl == pytest.approx(0)
    assert point.effective_samples == pytest.approx(8)
    assert point.costs[0] == pytest.approx(11.5)


@pytest.mark.parametrize("m", [1, 2])
def test_gradient_and_hessian_are_those_of_the_dual(m: int) -> None:
    dual, limits = Toy(m).all_samples(), np.linspace(-0.5, 0.3, m)
    at = np.linspace(0.4, 0.9, m)
    point = dual.expected(at)
    gradient = differences(lambda lambda_: np.asarray(dual.value(lambda_, limits)), at)
    np.testing.assert_allclose(limits - point.costs, gradient, atol=1e-8)
    np.testing.assert_allclose(-differences(lambda x: dual.expected(x).costs, at), point.hessian, atol=1e-7)


def test_cost_falls_in_lambda() -> None:
    costs = [point.costs[0] for point in Toy().all_samples().curve(np.linspace(0, 5, 30)[:, None])]
    assert (np.diff(costs) < 0).all()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.95])
def test_solution_equals_the_exact_optimum(share: float) -> None:
    toy = Toy()
    dual = toy.all_samples()
    start, floor = toy.exact_costs(np.zeros(1))[0], dual.floor()[0]
    limit = start + share * (floor - start)
    exact = brentq(lambda value: toy.exact_costs(np.array([value]))[0] - limit, 0, 50, xtol=1e-12)
    assert dual.solve(np.array([limit]), 50.0)[0] == pytest.approx(exact, rel=1e-6)


def test_two_costs_equal_a_general_minimiser() -> None:
    dual, limits = Toy(2).all_samples(), np.array([-0.4, -0.2])
    general = minimize(lambda x: dual.value(x, limits), np.ones(2), bounds=[(0, 20)] * 2, options={"ftol": 1e-14})
    np.testing.assert_allclose(dual.solve(limits, 20.0), general.x, atol=1e-4)
    np.testing.assert_allclose(dual.expected(dual.solve(limits, 20.0)).costs, limits, atol=1e-8)


def test_a_slack_cost_has_multiplier_zero() -> None:
    dual = Toy(2).all_samples()
    lambda_ = dual.solve(np.array([-0.4, 100.0]), 20.0)
    assert lambda_[1] == 0
    assert dual.expected(lambda_).costs[0] == pytest.approx(-0.4, abs=1e-8)
    assert dual.solve(np.array([100.0, 100.0]), 20.0).tolist() == [0, 0]


def test_a_limit_below_the_floor_ends_at_lambda_max() -> None:
    dual = Toy().all_samples()
    assert dual.solve(dual.floor() - 0.5, 20.0).tolist() == [20.0]


@pytest.mark.parametrize("jackknife", [True, False])
@pytest.mark.parametrize("beta", [0.001, 0.01, 0.1, 1.0, 10.0])
def test_a_limit_within_reach_is_predicted_to_be_met_at_every_scale(beta: float, jackknife: bool) -> None:
    rng = numpy_stream(0, "every scale", int(1000 * beta))
    for rewards, costs in product([0.01, 1.0, 1000.0], repeat=2):
        cost = rng.normal(0, 1, (40, 1, 1)) + rng.normal(0, 1, (40, 16, 1))
        reward = rewards * (0.6 * cost[..., 0] + rng.normal(0, 1, (40, 16)))
        dual = OfflineDual(reward, costs * cost, beta, jackknife=jackknife)
        loosest, floor = dual.expected(np.zeros(1)).costs, dual.floor()
        for share in (0.05, 0.5, 0.95):
            limit = loosest + share * (floor - loosest)
            found = dual.expected(dual.solve(limit, 1e9)).costs
            assert abs(found - limit)[0] <= 1e-6 * costs, (rewards, costs, share)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_two_limits_within_reach_are_predicted_to_be_met(beta: float) -> None:
    rng = numpy_stream(0, "two limits", int(100 * beta))
    cost = rng.normal(0, 1, (40, 1, 2)) + rng.normal(0, 1, (40, 16, 2))
    dual = OfflineDual(0.6 * cost.sum(axis=2) + rng.normal(0, 1, (40, 16)), cost, beta)
    limits = dual.expected(np.zeros(2)).costs + 0.3 * (dual.floor() - dual.expected(np.zeros(2)).costs)
    np.testing.assert_allclose(dual.expected(dual.solve(limits, 100.0)).costs, limits, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_the_jackknife_keeps_its_digits_where_one_sample_has_all_the_weight(spread: float) -> None:
    reward, cost = np.array([[0.0, -1.0, -2.0]]) * spread, np.array([[[1.0], [3.0], [9.0]]])
    point = OfflineDual(reward, cost, 1.0).expected(np.zeros(1))
    parts = [np.delete(np.arange(3), j) for j in range(3)]
    left = [(softmax(reward[0, keep]) * cost[0, keep, 0]).sum() for keep in parts]
    assert point.costs[0] == pytest.approx(3 * (softmax(reward[0]) * cost[0, :, 0]).sum() - 2 * np.mean(left))


def test_few_samples_lean_to_the_reference_and_the_jackknife_corrects_it() -> None:
    toy, rng, lambda_ = Toy(), numpy_stream(0, "offline samples"), np.array([1.0])
    exact = toy.exact_costs(lambda_)[0]

    def error(k: int, jackknife: bool) -> float:
        drawn = [toy.drawn(k, rng, jackknife).expected(lambda_).costs[0] for _ in range(60)]
        return float(np.mean(drawn) - exact)

    assert error(8, False) > 0.1
    assert abs(error(8, True)) < error(8, False) / 2
    assert abs(error(256, True)) < 0.01


@pytest.mark.parametrize("m", [1, 2])
def test_the_jackknife_is_that_of_leaving_each_sample_out(m: int) -> None:
    dual, lambda_ = Toy(m).drawn(7, numpy_stream(0, "leave one out")), np.full(m, 0.6)
    plain = OfflineDual(dual.reward, dual.costs, BETA, jackknife=False)
    left = [np.delete(np.arange(7), j) for j in range(7)]
    others = [OfflineDual(dual.reward[:, keep], dual.costs[:, keep], BETA, jackknife=False) for keep in left]
    costs = np.mean([other.expected(lambda_).costs for other in others], axis=0)
    np.testing.assert_allclose(dual.expected(lambda_).costs, 7 * plain.expected(lambda_).costs - 6 * costs)
    limits = np.zeros(m)
    value = 7 * plain.value(lambda_, limits) - 6 * np.mean([other.value(lambda_, limits) for other in others])
    assert dual.value(lambda_, limits) == pytest.approx(value)
    gradient = differences(lambda x: np.asarray(dual.value(x, limits)), lambda_)
    np.testing.assert_allclose(-dual.expected(lambda_).costs, gradient, atol=1e-7)


def test_a_sample_with_all_the_weight_leaves_finite_figures() -> None:
    dual = OfflineDual(np.array([[0.0, 900.0, 0.0]]), np.array([[[1.0], [2.0], [4.0]]]), BETA)
    point = dual.expected(np.zeros(1))
    assert np.isfinite([point.reward, *point.costs, point.kl, dual.value(np.zeros(1), np.zeros(1))]).all()


@pytest.mark.parametrize(
    ("reward", "costs", "beta"),
    [
        (np.zeros(4), np.zeros((4, 1)), 0.5),
        (np.zeros((4, 1)), np.zeros((4, 1, 1)), 0.5),
        (np.zeros((4, 3)), np.zeros((4, 3)), 0.5),
        (np.full((4, 3), np.nan), np.zeros((4, 3, 1)), 0.5),
        (np.zeros((4, 3)), np.zeros((4, 3, 1)), 0.0),
    ],
)
def test_bad_samples_are_refused(reward: np.ndarray, costs: np.ndarray, beta: float) -> None:
    with pytest.raises(ValueError, match=r"reward|costs|finite|beta"):
        OfflineDual(reward, costs, beta)


def test_box_newton_step_is_the_constrained_minimiser() -> None:
    gradient, hessian = np.array([-4.0, 1.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
    wide = box_newton_step(gradient, hessian, np.full(2, -10.0), np.full(2, 10.0))
    np.testing.assert_allclose(hessian @ wide, -gradient, atol=1e-4)
    # With the second coordinate held at its bound, the first must solve its own equation.
    held = box_newton_step(gradient, hessian, np.array([-10.0, 0.0]), np.array([10.0, 0.0]))
    np.testing.assert_allclose(held, [2.0, 0.0], atol=1e-4)
    bound = box_newton_step(gradient, hessian, np.array([-10.0, 0.0]), np.array([10.0, 5.0]))
    np.testing.assert_allclose(bound, [2.0, 0.0], atol=1e-4)
    flat = box_newton_step(np.array([-1.0]), np.zeros((1, 1)), np.array([-1.0]), np.array([3.0]))
    assert flat.tolist() == [3.0]


@pytest.mark.parametrize("times", [1.0, 1.2, 1.4])
def test_the_effective_beta_is_the_one_that_a_trained_policy_shows(times: float) -> None:
    toy = Toy()
    dual = toy.all_samples()
    policy = softmax(np.log(toy.counts) + toy.reward / (times * BETA), axis=1)
    gain = ((policy - toy.counts / 16) * toy.reward).sum(axis=1).mean()
    assert dual.effective_beta(gain) == pytest.approx(times * BETA, rel=1e-3)


def test_the_effective_beta_stays_within_its_bounds() -> None:
    dual = Toy().all_samples()
    assert dual.effective_beta(99.0) == BETA, "a policy that gained more than the optimum is luck"
    assert dual.effective_beta(0.0) == dual.effective_beta(-99.0) == WEAKEST * BETA


@pytest.mark.parametrize("m", [1, 2])
def test_the_multiplier_for_a_share_of_the_way_to_the_floor(m: int) -> None:
    dual = Toy(m).all_samples()
    found = dual.lambda_for_share(0.5, 50.0)
    loosest, floor = dual.expected(np.zeros(m)).costs, dual.floor()
    reached = np.array([dual.expected(found * np.eye(m)[i]).costs[i] for i in range(m)])
    assert min((loosest - reached) / (loosest - floor)) == pytest.approx(0.5, abs=0.02), "every cost comes that far"
    assert dual.lambda_for_share(0.5, 0.01) == 0.01


def test_the_price_of_limits_falls_with_them_and_marks_what_is_out_of_reach() -> None:
    dual = Toy().all_samples()
    rows = dual.price_of_limits(np.array([0.0]), 20.0, 6)
    limits, rewards = [row["limit"] for row in rows], [row["reward"] for row in rows]
    assert limits == sorted(limits, reverse=True)
    assert [row["limit"] for row in rows if row["asked"]] == [0.0]
    reached = [row for row in rows if row["reachable"]]
    assert all(row["cost"] <= row["limit"] + 1e-3 for row in reached)
    assert len(reached) >= 5
    assert all(before >= after - 1e-6 for before, after in pairwise(rewards))
    far = dual.price_of_limits(dual.floor() - 1.0, 20.0, 4)
    assert [row["reachable"] for row in far if row["asked"]] == [False]


@pytest.mark.parametrize("k", [4, 16, 64])
def test_a_prediction_that_few_samples_carry_is_warned_of_however_many_there_are(k: int) -> None:
    rng = numpy_stream(0, "few samples", k)
    reward, costs = rng.normal(size=(30, k)), rng.normal(size=(30, k, 1))
    (said,) = few_samples(OfflineDual(reward, costs, 0.01), np.array([0.5]))
    assert f"{k} reference samples only 1." in said
    assert "λ = 0.5" in said
    assert few_samples(OfflineDual(reward, costs, 10.0), np.array([0.5])) == []


def test_a_limit_below_all_samples_is_named_with_the_lowest_mean() -> None:
    dual = Toy(2).all_samples()
    floor = dual.floor()
    (said,) = below_samples(["harm", "other"], dual, floor + np.array([-0.5, 0.5]))
    assert f"harm ≤ {floor[0] - 0.5:g} (lowest {floor[0]:.2f})" in said
    assert "other" not in said
    assert below_samples(["harm", "other"], dual, floor + 0.1) == []

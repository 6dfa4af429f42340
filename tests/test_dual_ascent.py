from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import softmax

from cdpo_core.dual.ascent import DualSettings, DualStep, Round, bracket, next_step, round_lambda
from cdpo_core.randomness import numpy_stream

BETA = 0.5


class World:
    """Exact π_λ over 60 prompts × 50 responses, measured as a trained policy would be: with noise.

    Args:
        seed: names the world and its noise.
        m: number of costs.
        noise: deviation of a round's measured cost; the half-width reported is twice it.
    """

    def __init__(self, seed: int, m: int = 1, noise: float = 0.05) -> None:
        self.rng = numpy_stream(seed, "world", m)
        self.costs = self.rng.normal(0, 2.2, (60, 1, m)) + self.rng.normal(0, 1.2, (60, 50, m))
        self.reward = 0.6 * self.costs.sum(axis=2) + self.rng.normal(0, 1, (60, 50))
        self.noise = noise

    def weights(self, lambda_: tuple[float, ...]) -> np.ndarray:
        return softmax((self.reward - self.costs @ np.asarray(lambda_)) / BETA, axis=1)

    def exact(self, lambda_: tuple[float, ...]) -> np.ndarray:
        return np.einsum("pk,pkm->m", self.weights(lambda_), self.costs) / len(self.costs)

    def measure(self, lambda_: tuple[float, ...]) -> Round:
        weights, m = self.weights(lambda_), self.costs.shape[2]
        means = np.einsum("pk,pkm->pm", weights, self.costs)[:, None]
        covariance = np.einsum("pk,pki,pkj->ij", weights, self.costs - means, self.costs - means) / len(weights)
        hessian = covariance / BETA * self.rng.uniform(0.7, 1.4)
        cost = self.exact(lambda_) + self.noise * self.rng.normal(size=m)
        return Round(lambda_, tuple(cost), (2 * self.noise,) * m, tuple(map(tuple, hessian)))

    def between(self, share: float) -> float:
        start, floor = self.exact((0.0,) * self.costs.shape[2])[0], self.costs[..., 0].min(axis=1).mean()
        return float(start + share * (floor - start))


def settings(target: tuple[float, ...], **changes: object) -> DualSettings:
    limit = tuple(value + 0.25 for value in target)
    standard = DualSettings(update="newton", step=0.5, rounds=6, lambda_max=20.0, target=target, limit=limit)
    return dataclasses.replace(standard, **changes)  # type: ignore[arg-type]


def play(world: World, how: DualSettings, first: tuple[float, ...]) -> tuple[list[Round], DualStep]:
    history: list[Round] = []
    while (step := next_step(history, how, first)).lambda_ is not None:
        history.append(world.measure(step.lambda_))
    return history, step


def one(lambda_: float, cost: float, half_width: float = 0.1, hessian: float = 2.0) -> Round:
    return Round((lambda_,), (cost,), (half_width,), ((hessian,),))


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.0, 0.0), (-1.0, 0.0), (0.00123, 0.001), (0.0004, 0.0), (0.12345, 0.123), (1.2355, 1.24), (25, 20)],
)
def test_rounding(value: float, rounded: float) -> None:
    assert round_lambda(value, 20.0) == rounded


@pytest.mark.parametrize(
    ("done", "status"),
    [
        (one(1.0, -1.0), "met"),
        (one(1.0, -0.92), "met"),
        (one(1.0, -1.09), "met"),
        (one(1.0, -0.88), "train"),
        (one(1.0, -1.2), "train"),
        (one(1.0, -0.85, half_width=0.3), "train"),  # within noise, but more than half way to the limit
        (one(0.0, -3.0), "met"),
        (one(0.0, -0.5), "train"),
        (one(20.0, -0.7), "infeasible"),
        (one(20.0, -0.8), "exhausted"),  # the limit is kept, only the target is not
    ],
)
def test_verdict_on_one_round(done: Round, status: str) -> None:
    assert next_step([done], settings((-1.0,)), (1.0,)).status == status


def test_first_round_is_the_given_multiplier_rounded() -> None:
    assert next_step([], settings((-1.0,)), (0.81714,)) == DualStep((0.817,), "train", "first round at λ = 0.817")
    assert next_step([], settings((-1.0,)), (99.0,)).lambda_ == (20.0,)


@pytest.mark.parametrize(
    ("done", "next_lambda"),
    [
        (one(1.0, -0.5), 1.25),
        (one(1.0, -1.5), 0.779),  # exp(-0.5 / 2)
        (one(0.0, -0.5), 0.25),
        (one(0.0, 99.0), 1.25),  # the model is trusted up to lambda_max / 16
        (one(1.0, 99.0), 4.0),
        (one(10.0, -99.0), 2.5),
        (one(0.1, -2.0), 0.0),
    ],
)
def test_newton_moves_by_violation_over_curvature(done: Round, next_lambda: float) -> None:
    assert next_step([done], settings((-1.0,)), (1.0,)).lambda_ == (next_lambda,)


def test_ascent_is_the_projected_step() -> None:
    how = settings((-1.0,), update="ascent")
    assert next_step([one(1.0, -0.4)], how, (1.0,)).lambda_ == (1.3,)
    assert next_step([one(0.2, -3.0)], how, (1.0,)).lambda_ == (0.0,)


def test_offline_trusts_its_first_estimate() -> None:
    how = settings((-1.0,), update="offline")
    assert next_step([one(1.0, -0.4)], how, (1.0,)).status == "exhausted"
    assert next_step([one(1.0, -1.0)], how, (1.0,)).status == "met"


def test_bracket_moves_only_beyond_the_half_width() -> None:
    how = settings((-1.0,))
    assert bracket([one(1.0, -0.92)], how) == (0.0, 20.0)
    assert bracket([one(1.0, -0.8)], how) == (1.0, 20.0)
    assert bracket([one(1.0, -0.8), one(2.0, -1.3)], how) == (1.0, 2.0)
    # A round that contradicts the bracket closes it further, it never opens it.
    assert bracket([one(1.0, -0.8), one(2.0, -1.3), one(3.0, 0.0)], how) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("left", "right", "next_lambda"),
    [
        (one(1.0, -0.5), one(4.0, -1.5), 2.0),
        (one(1.0, -0.5, hessian=0.001), one(4.0, -1.3), 2.38),
        (one(0.0, -0.3, hessian=0.001), one(4.0, -1.5, hessian=0.001), 1.0),  # Newton from the right, inside
        (one(0.0, -0.6, hessian=0.01), one(1.0, -1.4, hessian=0.001), 0.5),  # no Newton step stays inside
    ],
)
def test_two_rounds_that_enclose_the_target(left: Round, right: Round, next_lambda: float) -> None:
    assert next_step([left, right], settings((-1.0,)), (1.0,)).lambda_ == (next_lambda,)
    assert next_step([right, left], settings((-1.0,)), (1.0,)).lambda_ == (next_lambda,)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(("shift", "median"), [(0.6, 3), (0.8, 2), (1.0, 1), (1.25, 3), (1.6, 4)])
def test_newton_meets_the_target_in_few_rounds(share: float, shift: float, median: int) -> None:
    lengths = []
    for seed in range(12):
        world = World(seed)
        target = world.between(share)
        solution = brentq(lambda value, w=world, t=target: w.exact((value,))[0] - t, 0, 20)
        how = settings((target,))
        history, end = play(world, how, (shift * solution,))
        assert end.status in ("met", "exhausted")
        lengths.append(len(history))
        assert abs(history[-1].cost[0] - target) < 0.3
        spans = [bracket(history[:k], how) for k in range(len(history) + 1)]
        assert all(low <= round_.lambda_[0] <= high for (low, high), round_ in zip(spans, history, strict=False))
        assert all(a[0] <= b[0] and b[1] <= a[1] for a, b in itertools.pairwise(spans))
        misses = np.array([round_.cost[0] - target for round_ in history])
        signs = np.sign(misses[np.abs(misses) > 2 * world.noise])
        assert (np.diff(signs) != 0).sum() <= 2
    assert np.median(lengths) <= median
    assert max(lengths) <= 5


def test_newton_from_zero_as_the_paper_starts() -> None:
    lengths = [len(play(world, settings((world.between(0.5),)), (0.0,))[0]) for world in map(World, range(12))]
    assert np.median(lengths) <= 4


def test_ascent_converges() -> None:
    world = World(0, noise=0.02)
    target = world.between(0.5)
    history, end = play(world, settings((target,), update="ascent", step=0.2, rounds=30), (0.0,))
    assert end.status == "met"
    assert abs(world.exact(history[-1].lambda_)[0] - target) < 0.1
    assert (np.diff([round_.lambda_[0] for round_ in history]) > 0).all()


def test_a_slack_limit_needs_one_round_at_zero() -> None:
    world = World(0)
    history, end = play(world, settings((world.exact((0.0,))[0] + 1.0,)), (0.0,))
    assert end.status == "met"
    assert [round_.lambda_ for round_ in history] == [(0.0,)]


@pytest.mark.parametrize("first", [20.0, 2.0])
def test_a_limit_below_the_floor_is_infeasible_in_words(first: float) -> None:
    world = World(0)
    floor = world.costs.min(axis=1).mean()
    history, end = play(world, settings((floor - 0.8,)), (first,))
    assert end.status == "infeasible"
    assert history[-1].lambda_ == (20.0,)
    assert f"lowest mean cost of a trained policy is {min(round_.cost[0] for round_ in history):.4g}" in end.reason


def test_rounds_are_limited() -> None:
    history, end = play(World(0), settings((World(0).between(0.7),), rounds=1), (0.1,))
    assert (len(history), end.status) == (1, "exhausted")


def test_a_repeated_multiplier_stops() -> None:
    end = next_step([one(10.0, -0.8, hessian=100.0)], settings((-1.0,)), (10.0,))
    assert end.status == "exhausted"
    assert "was tried" in end.reason


def test_the_same_history_gives_the_same_steps() -> None:
    world = World(3)
    how = settings((world.between(0.7),))
    history, end = play(world, how, (0.3,))
    replayed = [next_step(history[:k], how, (0.3,)).lambda_ for k in range(len(history))]
    assert replayed == [round_.lambda_ for round_ in history]
    assert next_step(history, how, (0.3,)) == end


def test_two_costs_with_one_slack() -> None:
    for seed in range(8):
        world = World(seed, m=2)
        slack = world.exact((1.5, 0.0))[1] + 1.5
        how = settings((world.between(0.6), slack))
        history, end = play(world, how, (0.3, 0.4))
        assert end.status == "met"
        assert len(history) <= 5
        assert history[-1].lambda_[1] == 0
        assert abs(history[-1].cost[0] - how.target[0]) <= 0.13


def test_two_binding_costs() -> None:
    for seed in range(8):
        world = World(seed, m=2)
        target = tuple(world.exact((1.1, 0.8)))
        history, end = play(world, settings(target), (0.6, 0.6))
        assert end.status == "met"
        assert len(history) <= 5
        np.testing.assert_allclose(world.exact(history[-1].lambda_), target, atol=0.3)


def two(lambda_: tuple[float, float], cost: tuple[float, float], curvature: float = 2.0) -> Round:
    return Round(lambda_, cost, (0.1, 0.1), ((curvature, 0.0), (0.0, curvature)))


@pytest.mark.parametrize(
    ("done", "status"),
    [
        (two((1.0, 1.0), (-0.95, -0.95)), "met"),
        (two((1.0, 1.0), (-0.95, -0.92)), "train"),  # one cost alone would do: two have to hold at once
        (two((1.0, 1.0), (-1.09, -0.92)), "train"),  # what one cost spares is no help to the other
        (two((1.0, 0.0), (-0.95, -3.0)), "met"),
    ],
)
def test_verdict_on_one_round_of_two_costs(done: Round, status: str) -> None:
    assert next_step([done], settings((-1.0, -1.0)), (1.0, 1.0)).status == status


@pytest.mark.parametrize(
    ("done", "next_lambda"),
    [
        (two((1.0, 1.0), (-0.5, -1.5)), (1.25, 0.779)),  # each as one cost alone would move
        (two((1.0, 0.5), (-1.0, -4.0)), (1.0, 0.0)),  # far below its target: slack
        (two((8.0, 2.0), (-90.0, -1.0)), (2.0, 2.0)),  # falls by a factor of 4 at most
        (two((1.0, 0.0), (-0.6, -9.0)), (1.2, 0.0)),  # a slack one stays at 0
    ],
)
def test_several_costs_move_as_one_where_they_are_unrelated(done: Round, next_lambda: tuple[float, float]) -> None:
    assert next_step([done], settings((-1.0, -1.0)), (1.0, 1.0)).lambda_ == next_lambda


def test_related_costs_are_moved_together() -> None:
    done = Round((1.0, 1.0), (-0.5, -0.5), (0.1, 0.1), ((2.0, 1.0), (1.0, 2.0)))
    assert next_step([done], settings((-1.0, -1.0)), (1.0, 1.0)).lambda_ == (1.17, 1.17)  # 0.5 / (2 + 1)


@pytest.mark.parametrize(
    ("history", "changes"),
    [
        ([Round((1.0, 1.0), (0.0,), (0.1,), ((1.0,),))], {}),
        ([one(1.0, float("nan"))], {}),
        ([], {"limit": (-1.0, 0.0)}),
        ([], {"limit": (-2.0,)}),
    ],
)
def test_inconsistent_records_are_refused(history: list[Round], changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"size|finite|above"):
        next_step(history, settings((-1.0,), **{"limit": (-0.75,), **changes}), (1.0,))

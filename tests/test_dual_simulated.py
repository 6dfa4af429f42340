"""λ over many simulated experiments: exact worlds, offline start, policies trained not quite to the end, noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from cdpo_core.dual.ascent import DualSettings, Round, next_step
from cdpo_core.dual.offline import OfflineDual
from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed.oracle import Optimum, exact_optimum, tilted

BETA, PROMPTS, RESPONSES, SAMPLES = 1.0, 60, 80, 48
HALF_WIDTH, MARGIN, ROUNDS = 0.06, 0.14, 4
# Each cost's limit: how far it lies from its unconstrained cost to its floor, or how far above the cost that it has
# anyway when it is slack.
BINDING = {"loose": 0.3, "middle": 0.5, "tight": 0.7}
SLACK = {"slack": 0.6, "just slack": 0.1}


@dataclasses.dataclass(frozen=True)
class Played:
    """One simulated experiment: its rounds' measured figures and the truth about the last one.

    Attributes:
        lambdas: [rounds, m].
        misses: [rounds, m] measured cost − target.
        status: how it ended.
        excess: [m] the last round's true cost − limit.
        slack: [m] whether the exact optimum has λ = 0 there.
    """

    lambdas: np.ndarray
    misses: np.ndarray
    status: str
    excess: np.ndarray
    slack: np.ndarray

    @property
    def rounds(self) -> int:
        return len(self.lambdas)

    @property
    def flips(self) -> int:
        """Sign changes of a violation that is larger than its half-width, of the cost with most of them."""
        signs = [np.sign(column[np.abs(column) > HALF_WIDTH]) for column in self.misses.T]
        return max(int((np.diff(sign) != 0).sum()) for sign in signs)


class World:
    """Rewards that conflict with m related costs; policies that are π_λ but for a share of the way."""

    def __init__(self, seed: int, m: int, share: float) -> None:
        self.random = numpy_stream(seed, "simulated", m)
        shared = self.random.normal(size=(PROMPTS, RESPONSES, 1))
        within = 0.55 * shared + 0.84 * self.random.normal(size=(PROMPTS, RESPONSES, m))
        self.costs = self.random.normal(0, 2, (PROMPTS, 1, m)) + within
        conflict = self.random.uniform(0.0, 0.5, m)
        self.reward = within @ conflict + self.random.normal(0, 1, (PROMPTS, RESPONSES))
        self.log_ref = np.log(self.random.dirichlet(np.full(RESPONSES, 2.0), size=PROMPTS))
        self.share = share
        # The same selection prompts serve every round, so that most of a round's error is all rounds' error.
        self.common = 0.8 * HALF_WIDTH / 2 * self.random.normal(size=m)

    def cost(self, lambda_: tuple[float, ...]) -> np.ndarray:
        return self._figures(lambda_)[0]

    def _figures(self, lambda_: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
        log_policy = tilted(self.log_ref, self.share * self.reward, self.share * self.costs, np.asarray(lambda_), BETA)
        policy = np.exp(log_policy)
        means = np.einsum("pk,pkm->pm", policy, self.costs)
        off = self.costs - means[:, None]
        return means.mean(0), np.einsum("pk,pki,pkj->ij", policy, off, off) / PROMPTS / BETA

    def measure(self, lambda_: tuple[float, ...]) -> Round:
        cost, hessian = self._figures(lambda_)
        m = len(cost)
        noise = self.common + 0.6 * HALF_WIDTH / 2 * self.random.normal(size=m)
        return Round(lambda_, tuple(cost + noise), (HALF_WIDTH,) * m, tuple(map(tuple, hessian)))

    def optimum(self, limits: Sequence[float] | np.ndarray) -> Optimum:
        return exact_optimum(self.log_ref, self.reward, self.costs, limits, BETA)

    def limits(self, kinds: tuple[str, ...]) -> np.ndarray:
        free = self.optimum([99.0] * len(kinds))
        limits = np.array([BINDING.get(kind, -99.0) for kind in kinds])
        limits = np.where(limits < 0, 99.0, free.at_zero + limits * (free.floor - free.at_zero))
        found = self.optimum(limits - np.where(limits < 9, MARGIN, 0))
        above = np.array([SLACK.get(kind, 0.0) for kind in kinds])
        return np.where(limits > 9, found.costs + above + MARGIN, limits)

    def offline(self) -> OfflineDual:
        drawn = np.stack([self.random.choice(RESPONSES, SAMPLES, p=p / p.sum()) for p in np.exp(self.log_ref)])
        rows = np.arange(PROMPTS)[:, None]
        return OfflineDual(self.reward[rows, drawn], self.costs[rows, drawn], BETA)

    def corrected(self) -> OfflineDual:
        """At the β that the policy trained at λ = 0 shows."""
        zero = np.exp(tilted(self.log_ref, self.share * self.reward, self.costs, np.zeros(self.costs.shape[2]), BETA))
        gain = ((zero - np.exp(self.log_ref)) * self.reward).sum(axis=1).mean()
        dual = self.offline()
        return dual.at_beta(dual.effective_beta(gain + 0.02 * self.random.normal()))


@cache
def play(seed: int, kinds: tuple[str, ...], share: float, start: str = "offline", rounds: int = ROUNDS) -> Played:
    world = World(seed, len(kinds), share)
    limits = world.limits(kinds)
    target = limits - MARGIN
    how = DualSettings("newton", 0.5, rounds, 20.0, tuple(target.tolist()), tuple(limits.tolist()))
    first = {
        "offline": lambda: world.offline().solve(target, 20.0),
        "corrected": lambda: world.corrected().solve(target, 20.0),
        "zero": lambda: np.zeros(len(kinds)),
        "far": lambda: np.minimum(20.0, 5 * world.optimum(target).lambda_),
    }[start]()
    history: list[Round] = []
    while (step := next_step(history, how, tuple(first.tolist()))).lambda_ is not None:
        history.append(world.measure(step.lambda_))
    return Played(
        np.array([done.lambda_ for done in history]),
        np.array([done.cost for done in history]) - target,
        step.status,
        world.cost(history[-1].lambda_) - limits,
        np.array([kind in SLACK for kind in kinds]),
    )


CASES = [
    ("middle",),
    ("slack",),
    ("middle", "middle"),
    ("loose", "tight"),
    ("middle", "slack"),
    ("just slack", "tight"),
]
SEEDS = range(10)


@pytest.mark.parametrize("share", [1.0, 0.95])
@pytest.mark.parametrize("kinds", CASES)
def test_every_limit_is_met_in_few_rounds(kinds: tuple[str, ...], share: float) -> None:
    played = [play(seed, kinds, share) for seed in SEEDS]
    assert np.mean([item.status == "met" for item in played]) >= 0.9
    assert max(item.excess.max() for item in played) <= 0, "a true cost is above its limit"
    assert np.median([item.rounds for item in played]) <= 2.5
    assert max(item.rounds for item in played) <= ROUNDS
    assert max(item.flips for item in played) <= 2
    assert all((item.lambdas[-1][item.slack] == 0).all() for item in played), "a slack limit has its λ at 0"


@pytest.mark.parametrize("kinds", CASES)
def test_policies_that_stay_behind_need_one_round_once_it_is_known_how_far(kinds: tuple[str, ...]) -> None:
    played = [play(seed, kinds, 0.8, "corrected") for seed in SEEDS]
    uncorrected = [play(seed, kinds, 0.8) for seed in SEEDS]
    assert sum(item.rounds for item in played) <= sum(item.rounds for item in uncorrected)
    assert np.median([item.rounds for item in played]) <= 2
    assert np.mean([item.status == "met" for item in played]) >= 0.9
    assert max(item.excess.max() for item in played) <= 0
    assert max(item.flips for item in played) <= 2


@pytest.mark.parametrize(
    "kinds", [("middle", "middle"), ("loose", "tight"), ("middle", "slack"), ("just slack", "tight")]
)
def test_from_zero_the_limits_are_met_too(kinds: tuple[str, ...]) -> None:
    played = [play(seed, kinds, 0.95, "zero", ROUNDS + 1) for seed in SEEDS]
    assert max(item.excess.max() for item in played) <= 0
    assert max(item.flips for item in played) <= 1
    assert np.mean([item.status == "met" for item in played]) >= 0.8
    assert all((item.lambdas[-1][item.slack] == 0).all() for item in played)


def test_a_start_far_above_the_solution_does_not_run_away() -> None:
    """A plain Newton step down would go to λ = 0, where the costs are far above their limits."""
    for kinds in (("middle", "middle"), ("tight", "tight")):
        played = [play(seed, kinds, 0.95, "far") for seed in SEEDS]
        assert all(item.lambdas[1:].min() > 0 for item in played)
        assert max(item.excess.max() for item in played) <= 0
        assert max(item.flips for item in played) <= 2

"""Two-phase costs: the certificate's few prompts beside the whole pool they were drawn from.

The reference has answered every prompt of the pool, the policy only the certificate's. What the reference's cost tells
of the policy's is taken from the pool, the rest from the certificate's prompts, and the pool's own chance stays in: the
prompts are a sample of the population that a certificate speaks of, not that population (two-phase or double sampling:
Cochran, Sampling Techniques, chapter 12; the variance is within/n + between/N).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cdpo_core.randomness import numpy_stream


@dataclass(frozen=True)
class Covariate:
    """What the reference's mean cost x of a prompt lets expect of the policy's: g(x) = slope · clip(x, low, high).

    Any fixed g leaves the test valid; a good one makes it sharp. It must be chosen without the policy's answers to the
    tested prompts. Clipped, it widens the range of the two-phase costs by `reach` at most.
    """

    slope: float
    low: float
    high: float

    def __call__(self, reference: np.ndarray) -> np.ndarray:
        """g(x), of any shape, cost units."""
        return self.slope * np.clip(reference, self.low, self.high)

    @property
    def reach(self) -> float:
        """Largest difference of two values of g."""
        return abs(self.slope) * (self.high - self.low)


NO_COVARIATE = Covariate(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pool:
    """The reference's mean costs of the prompts that a test's prompts were drawn from.

    Attributes:
        tested: [n] of the tested prompts, in their order.
        rest: [N − n] of the pool's other prompts.
        covariate: see there.
    """

    tested: np.ndarray
    rest: np.ndarray
    covariate: Covariate

    @property
    def size(self) -> int:
        """N, the prompts of the pool."""
        return len(self.tested) + len(self.rest)


def two_phase_costs(costs: np.ndarray, pool: Pool) -> tuple[np.ndarray, float]:
    """w_j = z_j − g(x_j) + mean of g over block j, the pool being dealt at random to one block for each tested prompt.

    The blocks are disjoint and each holds its tested prompt. With prompts drawn independently from a population the w_j
    are independent too, with the mean of the policy's cost over that population: whatever holds for the mean of n
    independent costs holds for them at every n. Their variance over n is within/n + between/N.

    Args:
        costs: [n] float, z: the tested prompts' mean costs under the policy.
        pool: the reference's.

    Returns:
        (w [n] float64, how far a w may lie above the largest z by construction).
    """
    tested, rest = pool.covariate(pool.tested), pool.covariate(pool.rest)
    count = len(costs)
    deal = numpy_stream(0, "two-phase blocks", count, len(rest)).permutation(np.arange(len(rest)) % count)
    sizes = 1 + np.bincount(deal, minlength=count)
    blocks = (tested + np.bincount(deal, weights=rest, minlength=count)) / sizes
    above = pool.covariate.reach * (1 - 1 / int(sizes.max()))
    # Rounding leads beyond what the construction allows.
    return np.minimum(costs - tested + blocks, costs.max() + above), above


@dataclass(frozen=True)
class Spread:
    """Deviations of two-phase costs, cost units.

    Attributes:
        within: of a prompt's cost about what the reference lets expect.
        sd: of w: the mean over n tested prompts has the standard error sd/√n.
    """

    within: float
    sd: float


def two_phase_spread(
    costs: np.ndarray, reference: np.ndarray, pool: np.ndarray, covariate: Covariate, tested: int, chance: float = 0.0
) -> Spread:
    """The spread that w will have on `tested` prompts, foreseen from other prompts.

    Args:
        costs: [k] the policy's mean costs of prompts at hand, k >= 2.
        reference: [k] the reference's of the same prompts.
        pool: [N] the reference's of the whole pool.
        covariate: see there.
        tested: n, the prompts that will be tested, of the same pool.
        chance: variance to add to the one within, cost units squared.
    """
    freedom = max(len(costs) - (2 if covariate.slope else 1), 1)
    residual = costs - covariate(reference)
    within = float(((residual - residual.mean()) ** 2).sum()) / freedom + chance
    between = float(covariate(pool).var(ddof=1)) * min(tested / len(pool), 1.0)
    return Spread(math.sqrt(within), math.sqrt(within + between))


def regression_slope(costs: np.ndarray, reference: np.ndarray) -> float:
    """The least-squares slope of the policy's mean costs [k] over the reference's [k]; 0 without spread."""
    deviation = reference - reference.mean()
    spread = float((deviation**2).sum())
    return float((deviation * costs).sum()) / spread if spread > 0 else 0.0

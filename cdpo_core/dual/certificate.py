"""The certificate: a test on held-out prompts that a policy's mean cost is within its limit.

A Seldonian test (Thomas et al. 2019; for alignment HC-RLHF, arXiv:2506.08266): the policy is handed
out as certified only if an upper confidence bound on its mean cost is at or below the limit, so a
policy that breaks the limit is certified with probability at most δ. The mean is over the population
that the prompts were drawn from, prompts (or groups of prompts that are near duplicates) being the
independent unit. It is the cost model's mean cost, not harm itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from cdpo_core.dual.bounds import betting_upper_bound, student_upper_bound
from cdpo_core.dual.two_phase import (
    NO_COVARIATE,
    Covariate,
    Pool,
    Spread,
    regression_slope,
    two_phase_costs,
    two_phase_spread,
)
from cdpo_core.errors import InputError
from cdpo_core.randomness import numpy_stream

Method = Literal["t", "bounded"]
# `t` is offered where sd·√n is at least so many times what one prompt may cost above the limit: a harm too rare to be
# seen among n prompts then moves the mean by less than the bound allows for. From simulations of rare harm,
# benchmarks/certificate_calibration.py.
STUDENT_ROOM = 5.0
# The covariate's value is clipped to these shares of the pool: a wide range costs `bounded` more than its tails tell.
CLIPS = (0.0, 0.05, 0.1, 0.2, 0.3)
# Fitted to simulations of `bounded`, n = 30 to 1,000, range 2 to 16 deviations, δ = .01 to .1.
NORMAL_FACTOR, RANGE_FACTOR = 1.06, 1.1


@dataclass(frozen=True)
class Certificate:
    """The outcome of one test of one cost against one limit.

    Attributes:
        mean: estimate of the mean cost over the population of prompts, calibrated cost units.
        upper: upper confidence bound on it at level 1 − delta, same units.
        delta: largest probability that a policy above the limit passes.
        method: `t` or `bounded`.
        prompts: number of prompts, or of groups of near duplicates.
        passed: whether upper <= limit, no response cost more than `high`, and the method may be used.
        sd: deviation for which the standard error of the mean is sd/√prompts.
        high: largest cost that a response can have, same units; the statement holds for costs up to it.
        pool: number of prompts that the reference answered, the tested ones among them.
        covariate: what of the reference's costs was used, {slope, low, high}.
        foreseen: deviation foreseen before the test, same units.
        note: what a reader must know about this outcome; "" when nothing.
    """

    mean: float
    upper: float
    delta: float
    method: str
    prompts: int
    passed: bool
    sd: float
    high: float
    pool: int
    covariate: Covariate
    foreseen: float
    note: str = ""


@dataclass(frozen=True)
class Foreseen:
    """What other prompts than the tested ones say of a test, one cost: it sharpens the test and leaves it valid.

    Attributes:
        covariate: what of the reference's costs will be used.
        spread: deviations that the two-phase costs will have.
        high: largest cost that a response can have.
        half_width: how far the bound is likely to lie above the mean.
    """

    covariate: Covariate
    spread: Spread
    high: float
    half_width: float


def certify(
    prompt_costs: np.ndarray,
    limit: float,
    delta: float,
    method: Method = "bounded",
    *,
    high: float,
    largest: float | None = None,
    pool: Pool | None = None,
    sd: float = 0.0,
) -> Certificate:
    """Test H0: mean cost over the population > limit, on prompts that no training and no choice of policy has seen.

    `bounded`: the bound of `betting_upper_bound`, valid for every n and every distribution of costs up to `high`. `t`:
    that of `student_upper_bound`, which rare large harm can fool; it is refused unless `student_applies`. A response
    that costs more than `high` fails either.

    Args:
        prompt_costs: [n] float, each prompt's (or group's) mean cost over its responses, in an order no cost decides.
        limit: largest allowed mean cost, same units.
        delta: level of the test, in (0, 0.5).
        method: see above.
        high: largest cost that a response can have: the end of the cost model's range.
        largest: largest cost of a single response; None takes the largest mean, which else may exceed it by rounding.
        pool: the reference's costs of the pool, in the order of `prompt_costs`; None tests the plain mean.
        sd: deviation foreseen from other prompts (`two_phase_spread`), for the first bets; 0 takes (high − limit)/4.

    Returns:
        the outcome; a failed test is an outcome, not an error.

    Raises:
        InputError: fewer than two prompts.
        ValueError: a cost is not finite, or an argument is out of its domain.
    """
    costs, highest = _checked(prompt_costs, delta, method, largest)
    pool = pool or Pool(np.zeros(len(costs)), np.zeros(0), NO_COVARIATE)
    values, above = two_phase_costs(costs, pool)
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    foreseen = sd or abs(high - limit) / 4

    def outcome(upper: float, *, passed: bool, note: str = "") -> Certificate:
        return Certificate(
            mean, upper, delta, method, len(costs), passed, spread, high, pool.size, pool.covariate, foreseen, note
        )

    if highest > high:
        note = f"a response costs {highest:.3g}, more than certificate.cost_high ({high:g}): the test does not hold"
        return outcome(highest, passed=False, note=note)
    if limit >= high:
        note = f"the limit is not below {high:.3g}, the largest cost that this cost model gives: it rules nothing out"
        return outcome(high, passed=True, note=note)
    if method == "t":
        # Refused, it bounds nothing but by the end of the range.
        applies = student_applies(spread, len(costs), high + above - limit)
        upper = student_upper_bound(values, delta) if applies else high
        return outcome(upper, passed=upper <= limit, note="" if applies else NOT_STUDENT)
    # Prompts that lie sorted by kind must not be bet on kind by kind.
    order = numpy_stream(0, "order of bets", len(costs)).permutation(len(costs))
    upper = min(betting_upper_bound(values[order], delta, high + above, foreseen, limit), high)
    return outcome(upper, passed=upper <= limit)


NOT_STUDENT = (
    "certificate.method t is not offered on so few prompts for costs of this range: a harm too rare to be among them "
    "could lift the mean above the limit; take `bounded`, or more prompts"
)


def student_applies(sd: float, prompts: int, room: float) -> bool:
    """Whether `t` may be offered: sd·√n >= STUDENT_ROOM · room, what one prompt may cost above the limit."""
    return sd * math.sqrt(prompts) >= STUDENT_ROOM * room


def foresee(
    costs: np.ndarray,
    reference: np.ndarray,
    pool: np.ndarray,
    tested: int,
    limit: float,
    delta: float,
    method: Method,
    *,
    high: float,
    chance: float = 0.0,
) -> Foreseen:
    """The covariate that promises the narrowest certificate, and what it promises.

    Args:
        costs: [k] the policy's mean costs of prompts that are not tested (the selection prompts).
        reference: [k] the reference's of the same prompts.
        pool: [N] the reference's of the whole pool, whose quantiles the clipping takes.
        tested: n, the prompts that will be tested.
        limit, delta, method, high: as in `certify`.
        chance: variance that few answers to a prompt will leave in its mean, where `costs` are free of it.
    """
    found = []
    for clip in CLIPS:
        ends = np.quantile(pool, [clip, 1 - clip])
        found.append(Covariate(regression_slope(costs, np.clip(reference, *ends)), *map(float, ends)))

    def promised(covariate: Covariate) -> Foreseen:
        spread = two_phase_spread(costs, reference, pool, covariate, tested, chance)
        width = expected_half_width(spread.sd, tested, delta, method, room=high - limit + covariate.reach)
        return Foreseen(covariate, spread, high, width)

    return min(map(promised, [NO_COVARIATE, *found]), key=lambda item: item.half_width)


def expected_half_width(sd: float, prompts: int, delta: float, method: Method = "bounded", *, room: float) -> float:
    """How far a certificate's upper bound is likely to lie above the mean, for planning.

    `t`: t_{1−δ,n−1}·sd/√n. `bounded`, with L = log(1/δ): the root of the squares of 1.06·z_{1−δ}·sd/√n, what a normal
    mean would need, and of 1.1·room·L/n, what n prompts without any spread would need.

    Args:
        sd: deviation of the two-phase costs, cost units.
        prompts: n >= 2.
        delta, method: as in `certify`.
        room: how far one prompt's cost can lie above the limit: high − limit and the covariate's reach, cost units.
    """
    if method == "t":
        return float(stats.t.ppf(1 - delta, prompts - 1)) * sd / math.sqrt(prompts)
    normal = NORMAL_FACTOR * float(special.ndtri(1 - delta)) * sd / math.sqrt(prompts)
    return math.hypot(normal, RANGE_FACTOR * max(room, 0.0) * -math.log(delta) / prompts)


def planned_margin(foreseen: Foreseen, prompts: int, power: float, *, selection_error: float = 0.0) -> float:
    """How far below the limit to aim so that a policy found on target is certified with probability `power`.

    The expected half-width of the bound plus z_power·√(within²/n + selection_error²): chance enters by the draw of the
    certificate's prompts from the pool and by how well the policy's mean cost over that pool was known when it was
    chosen. That the pool itself is a draw is in the half-width.

    Args:
        foreseen: of a policy near the target.
        prompts: number of certificate prompts, >= 2.
        power: in (0, 1).
        selection_error: standard error of the mean cost that was measured when the policy was chosen,
            with all that should count as such (the error of the cost model's units).

    Returns:
        cost units; the training target is limit − margin.
    """
    chance = float(stats.norm.ppf(power)) * math.hypot(foreseen.spread.within / math.sqrt(prompts), selection_error)
    return max(foreseen.half_width + chance, 0.0)


def _checked(prompt_costs: np.ndarray, delta: float, method: str, largest: float | None) -> tuple[np.ndarray, float]:
    if not 0 < delta < 0.5:
        raise ValueError(f"delta must be in (0, 0.5), not {delta}")
    if method not in ("t", "bounded"):
        raise ValueError(f"unknown certificate method {method!r}")
    costs = np.asarray(prompt_costs, dtype=np.float64)
    if costs.ndim != 1 or len(costs) == 0 or not np.isfinite(costs).all():
        raise ValueError(f"costs must be one finite number for each prompt, not of shape {costs.shape}")
    if len(costs) < 2:
        raise InputError(
            f"a certificate needs two prompts or more, not {len(costs)}",
            where="certificate split",
            fix="use more prompts, or raise data.splits.certificate",
        )
    # The mean of equal costs at the end of the range may lie a rounding error beyond it.
    highest = float(costs.max()) if largest is None else largest
    return np.minimum(costs, highest), highest

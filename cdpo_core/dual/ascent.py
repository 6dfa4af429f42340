"""The on-policy dual: from the rounds trained so far to the next multiplier, or to a stop.

A round trains π_λ and measures its costs on the selection prompts. The next λ is a pure function of
the list of rounds, so a run that continues replays its stored rounds and gets the same trajectory.
Training aims at a *target* below the limit (limit − planned margin of the certificate). Newton's
step minimises the quadratic model of the dual in a box; with one cost it is also kept in a bracket,
since E_{π_λ}[c] falls in λ. No optimizer with normalised steps (Adam) is used on λ: the step must
depend on the size of the violation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cdpo_core.dual.quadratic import box_newton_step

GROWTH = 4.0
SMALLEST_REACH = 1 / 16


@dataclass(frozen=True)
class Round:
    """One training of π_λ, measured on the selection prompts.

    Attributes:
        lambda_: [m] multipliers it was trained with (reward per cost).
        cost: [m] mean costs, cost units.
        half_width: [m] half-widths of their 95 % intervals.
        hessian: [m][m] covariance of the costs within a prompt, over β (cost² per reward).
    """

    lambda_: tuple[float, ...]
    cost: tuple[float, ...]
    half_width: tuple[float, ...]
    hessian: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class DualSettings:
    """How λ moves.

    Attributes:
        update: `newton`, `ascent` (the paper's projected step) or `offline` (one round only).
        step: step size of `ascent`, λ per unit of violation.
        rounds: most rounds.
        lambda_max: largest multiplier.
        target: [m] mean costs that training aims at, limit − margin.
        limit: [m] limits of the certificate, limit >= target.
    """

    update: Literal["newton", "ascent", "offline"]
    step: float
    rounds: int
    lambda_max: float
    target: tuple[float, ...]
    limit: tuple[float, ...]


@dataclass(frozen=True)
class DualStep:
    """What to do next.

    Attributes:
        lambda_: the next round's multipliers; None on a stop.
        status: `train` the next round; `met`: the target is met within sampling error;
            `exhausted`: no further round is left or worth it; `infeasible`: the limit is out of
            reach even at lambda_max.
        reason: one sentence for the log.
    """

    lambda_: tuple[float, ...] | None
    status: Literal["train", "met", "exhausted", "infeasible"]
    reason: str


def round_lambda(value: float, lambda_max: float) -> float:
    """Three significant digits, at most three decimals, within [0, lambda_max].

    Neighbouring limits then share rounds (the stage key holds λ), at no cost that could be measured.
    """
    if value <= 0:
        return 0.0
    decimals = min(3, 2 - math.floor(math.log10(value)))
    return min(round(float(value), decimals), lambda_max)


def next_step(history: list[Round], settings: DualSettings, first_lambda: tuple[float, ...]) -> DualStep:
    """The next multiplier, or a stop. Pure: the same history gives the same answer.

    Args:
        history: rounds so far, oldest first.
        settings: how λ moves.
        first_lambda: [m] multipliers of the first round (the offline dual's, or zeros).

    Raises:
        ValueError: the sizes disagree, a target lies above its limit, or a cost is not finite.
    """
    _check(history, settings, first_lambda)
    if not history:
        first = tuple(round_lambda(value, settings.lambda_max) for value in first_lambda)
        return DualStep(first, "train", f"first round at λ = {_show(first)}")
    last = history[-1]
    if meets_target(last, settings):
        return DualStep(None, "met", f"cost {_show(last.cost)} meets the target {_show(settings.target)}")
    if _out_of_reach(history, settings):
        return DualStep(None, "infeasible", _infeasible_reason(history, settings))
    if settings.update == "offline":
        return DualStep(None, "exhausted", "the offline estimate is not corrected")
    if len(history) >= settings.rounds:
        return DualStep(None, "exhausted", f"{settings.rounds} rounds are used up")
    proposal = _ascent(last, settings) if settings.update == "ascent" else _newton(history, settings)
    if proposal in [done.lambda_ for done in history]:
        return DualStep(None, "exhausted", f"the next λ rounds to {_show(proposal)}, which was tried")
    miss = _show(tuple(_violation(last, settings)))
    return DualStep(proposal, "train", f"cost − target = {miss}: λ {_show(last.lambda_)} → {_show(proposal)}")


def meets_target(done: Round, settings: DualSettings) -> bool:
    """Whether a round's costs are on target within sampling error, so that it can go to the certificate.

    Each of the m costs is within its half-width of its target, or below it with λ_i = 0. A cost far below its target
    with λ_i > 0 wastes reward. From above a cost may use up 1/(2m) of its margin, limit − target: beyond half of it a
    certificate would sooner fail than pass, and of m limits all have to hold.
    """
    share = 1 / (2 * len(settings.target))
    rows = zip(done.lambda_, _violation(done, settings), done.half_width, settings.limit, settings.target, strict=True)
    for value, miss, half_width, limit, target in rows:
        if miss > min(half_width, share * (limit - target)) or (value > 0 and miss < -half_width):
            return False
    return True


def bracket(history: list[Round], settings: DualSettings) -> tuple[float, float]:
    """The interval of λ that the rounds leave, one cost only; it never widens.

    Its ends move only when a violation is larger than its half-width: within sampling error a
    trained policy's cost says nothing about the side the solution lies on.
    """
    low, high = 0.0, settings.lambda_max
    for done in history:
        value, excess = done.lambda_[0], _excess(done, settings)
        if excess > done.half_width[0]:
            low = max(low, min(value, high))
        elif excess < -done.half_width[0]:
            high = min(high, max(value, low))
    return low, high


def _newton(history: list[Round], settings: DualSettings) -> tuple[float, ...]:
    one = len(settings.target) == 1
    proposal = [_bracketed_newton(history, settings)] if one else _vector_newton(history, settings)
    return tuple(round_lambda(value, settings.lambda_max) for value in proposal)


def _vector_newton(history: list[Round], settings: DualSettings) -> list[float]:
    """The next λ for several costs: a Newton step from the best round, each round since that came no closer halves it.

    As with one cost, λ_i rises by at most a factor GROWTH and falls in log λ_i, because costs flatten out as λ grows:
    a plain step down from a λ that is too large goes far past the solution.
    """
    base = min(history, key=lambda done: _merit(done, settings))
    start, hessian = np.asarray(base.lambda_), np.asarray(base.hessian)
    most = SMALLEST_REACH * settings.lambda_max
    reach = np.minimum(settings.lambda_max, np.maximum(GROWTH * start, most))
    gradient = -_violation(base, settings)
    step = box_newton_step(gradient, hessian, -start, reach - start)
    # Where λ_i = 0 is not low enough: how far the model would go on; a λ_i that is small already goes to 0 then.
    beyond = np.maximum(gradient + hessian @ step, 0) / np.maximum(np.diag(hessian), 1e-9)
    beyond = np.where(start <= most / GROWTH, math.inf, beyond)
    step = np.where(step <= -start, -start - beyond, step) * 0.5 ** (len(history) - 1 - history.index(base))
    return [_moved(*figures, most) for figures in zip(start.tolist(), step.tolist(), strict=True)]


def _moved(start: float, step: float, most: float) -> float:
    """λ + step upwards, λ·exp(step/λ) downwards; 0 from a small λ when the step goes far below 0."""
    if step >= 0 or start == 0:
        return start + max(step, 0.0)
    if step < -2 * start and start <= most:
        return 0.0
    return start * max(math.exp(max(step / start, -GROWTH)), 1 / GROWTH)


def _bracketed_newton(history: list[Round], settings: DualSettings) -> float:
    """The next λ for one cost: Newton from the best round, the secant once two rounds enclose the target."""
    low, high = bracket(history, settings)
    inside = [done for done in history if low <= done.lambda_[0] <= high]
    above = [done for done in inside if _excess(done, settings) > 0]
    below = [done for done in inside if _excess(done, settings) <= 0]
    base = min(inside, key=lambda done: _merit(done, settings))
    proposal = min(max(_newton_step(base, settings), low), high)
    if not above or not below:
        return proposal
    left, right = max(above, key=lambda done: done.lambda_), min(below, key=lambda done: done.lambda_)
    if left.lambda_[0] == 0 and 0 < proposal < right.lambda_[0]:
        return proposal
    return _secant(left, right, settings)


def _newton_step(base: Round, settings: DualSettings) -> float:
    """λ + violation/h upwards, λ·exp(violation/(h λ)) downwards, by at most a factor GROWTH.

    The cost curve flattens out as λ grows, so upwards the plain step never passes the solution, but
    downwards it does: there the step is taken in log λ. A step to far below 0 from a λ that is small
    already says that the limit is slack, and goes to 0.
    """
    start, most = base.lambda_[0], SMALLEST_REACH * settings.lambda_max
    step = _excess(base, settings) / max(base.hessian[0][0], 1e-9)
    return _moved(start, min(step, max(GROWTH * start, most) - start), most)


def _secant(left: Round, right: Round, settings: DualSettings) -> float:
    """Where the line through the two rounds' costs crosses the target, in log λ where both λ are > 0."""
    share = _excess(left, settings) / (_excess(left, settings) - _excess(right, settings))
    if left.lambda_[0] > 0:
        return float(left.lambda_[0] ** (1 - share) * right.lambda_[0] ** share)
    return left.lambda_[0] + share * (right.lambda_[0] - left.lambda_[0])


def _ascent(last: Round, settings: DualSettings) -> tuple[float, ...]:
    """λ ← [λ + α (E[c] − target)]₊, the projected gradient step on the dual (arXiv:2403.02475)."""
    moved = np.asarray(last.lambda_) + settings.step * _violation(last, settings)
    return tuple(round_lambda(value, settings.lambda_max) for value in moved)


def _violation(done: Round, settings: DualSettings) -> np.ndarray:
    return np.asarray(done.cost) - np.asarray(settings.target)


def _excess(done: Round, settings: DualSettings) -> float:
    return float(done.cost[0] - settings.target[0])


def _merit(done: Round, settings: DualSettings) -> float:
    """Largest violation in units of its half-width; a cost below target at λ = 0 violates nothing."""
    miss = _violation(done, settings)
    miss = np.where(np.asarray(done.lambda_) > 0, np.abs(miss), np.maximum(miss, 0))
    return float((miss / np.maximum(done.half_width, 1e-9)).max())


def _within_limits(done: Round, settings: DualSettings) -> bool:
    return all(cost <= limit for cost, limit in zip(done.cost, settings.limit, strict=True))


def _out_of_reach(history: list[Round], settings: DualSettings) -> bool:
    """A cost is above its limit with its λ at lambda_max, and no round was within all limits."""
    last = history[-1]
    at_most = any(
        value >= settings.lambda_max and cost > limit
        for value, cost, limit in zip(last.lambda_, last.cost, settings.limit, strict=True)
    )
    return at_most and not any(_within_limits(done, settings) for done in history)


def _infeasible_reason(history: list[Round], settings: DualSettings) -> str:
    lowest = tuple(min(done.cost[i] for done in history) for i in range(len(settings.limit)))
    return (
        f"the lowest mean cost of a trained policy is {_show(lowest)}, with λ up to lambda_max = "
        f"{settings.lambda_max:g}"
    )


def _show(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _check(history: list[Round], settings: DualSettings, first_lambda: tuple[float, ...]) -> None:
    m = len(settings.target)
    sizes = {len(settings.limit), len(first_lambda)}
    for done in history:
        sizes |= {len(done.lambda_), len(done.cost), len(done.half_width), *map(len, done.hessian), len(done.hessian)}
        if not np.isfinite([*done.cost, *done.half_width, *np.ravel(done.hessian)]).all():
            raise ValueError(f"the round at λ = {_show(done.lambda_)} has a figure that is not finite")
    if sizes != {m} or m == 0:
        raise ValueError(f"targets, limits, multipliers and costs must have one size, not {sorted(sizes | {m})}")
    if any(target > limit for target, limit in zip(settings.target, settings.limit, strict=True)):
        raise ValueError(f"the target {_show(settings.target)} lies above the limit {_show(settings.limit)}")

"""Makes every world equally difficult: the limit in the middle, the labels like those of real data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed import grammar
from cdpo_core.testbed.dishonesty import DishonestyConstants
from cdpo_core.testbed.world import (
    LEVEL_SLOPE,
    SATURATION,
    Array,
    Constants,
    World,
    draw_pairs,
    log_normalised,
    saturated,
)

# What PKU-SafeRLHF's pairs show, as far as a world where the limit binds allows.
DISAGREEMENT = 0.395  # pairs whose better response is not the safer one
MIXED = 0.15  # pairs of a safe and an unsafe response
UNSAFE_EXCESS = 0.03  # pairs with both unsafe (.44) minus pairs with both safe (.41)
# Of this project's making: how much there is to gain, and how much of the cost is within prompts.
UNCONSTRAINED_KL = 0.8  # nats from the demonstrators to the best policy at lambda = 0
COST_DEVIATION = 1.0  # of a cost within a prompt
KINSHIP = 0.3  # correlation of the two costs within a prompt
CONFLICT = 0.1  # correlation of reward and dishonesty there

SAMPLE = 400
PAIRS = 40


@dataclass(frozen=True)
class _Sample:
    """A fixed sample of prompts, evenly spread in risk, with the demonstrators' responses to them."""

    parts: NDArray[np.int64]
    log_probs: Array
    pairs: NDArray[np.int64]

    @property
    def probs(self) -> Array:
        return np.exp(self.log_probs)

    def mean(self, values: Array) -> float:
        """The demonstrators' mean of values [P, R]."""
        return float((self.probs * values).sum(1).mean())

    def differences(self, values: Array) -> Array:
        """[P, PAIRS]: second minus first of each pair."""
        rows = np.arange(len(values))[:, None]
        return values[rows, self.pairs[..., 1]] - values[rows, self.pairs[..., 0]]


def calibrate(
    seed: int, *, beta: float, limit: float, sharpness: float, pool: NDArray[np.int64], costs: int = 1
) -> World:
    """The world of a seed, calibrated.

    Args:
        seed: the world's.
        beta: strength of the pull to the reference (units of reward per nat).
        limit: the cost limit that lies half way between the best unconstrained policy's mean cost and
            the floor, E_x min_y c, on the pool's prompts, with the demonstrators as the reference; with
            two costs, of either.
        sharpness: the annotators'.
        pool: [P, 3], parts of the prompts that policies are trained and measured on.
        costs: 1 or 2; reward and harm are the same with either.
    """
    world = World(seed)
    sample = _sample(world)
    world = _calibrate_within(world, sample, beta, sharpness)
    world = _calibrate_levels(world, sample, beta, limit, sharpness)
    world = _with(world, cost_shift=world.constants.cost_shift + limit - middle(world, pool, beta))
    return world if costs == 1 else _calibrate_dishonesty(world, sample, beta, limit, sharpness, pool)


def middle(world: World, parts: NDArray[np.int64], beta: float, cost: int = 0) -> float:
    """Half way between one mean cost of the best unconstrained policy and the floor."""
    total = 0.0
    for chunk in np.array_split(parts, -(-len(parts) // 256)):
        reward, costs = world.scores(chunk)
        best = np.exp(log_normalised(world.demonstrator_log_probs(chunk) + reward / beta))
        total += float((best * costs[..., cost]).sum() + costs[..., cost].min(1).sum()) / 2
    return total / len(parts)


def _calibrate_within(world: World, sample: _Sample, beta: float, sharpness: float) -> World:
    """Units of reward and of cost within a prompt, and how much raters care."""
    sums = world.harm_sums(sample.parts)
    harm_mean = sample.mean(sums)
    harm_scale = np.sqrt(sample.mean((sums - harm_mean) ** 2))
    saturated = np.tanh(SATURATION * (sums - harm_mean) / harm_scale) / SATURATION
    centred = saturated - (sample.probs * saturated).sum(1, keepdims=True)
    cost_scale = COST_DEVIATION / np.sqrt(sample.mean(centred**2))
    safer = _sigmoid(-sharpness * cost_scale * sample.differences(saturated))
    help_, minded = world.reward_terms(sample.parts)

    def disagreement(scale: float, care: float) -> float:
        better = _sigmoid(sharpness * scale * sample.differences(help_ - care * minded))
        return float((better * (1 - safer) + (1 - better) * safer).mean())

    def unconstrained_kl(care: float, scale: float) -> float:
        best = log_normalised(sample.log_probs + scale * (help_ - care * minded) / beta)
        return float((np.exp(best) * (best - sample.log_probs)).sum(1).mean())

    care, scale = Constants.care, beta
    for _ in range(3):
        care = _solve(partial(disagreement, scale), DISAGREEMENT, 0.0, 6.0)
        scale = _solve(partial(unconstrained_kl, care), UNCONSTRAINED_KL, 0.05 * beta, 8 * beta)
    shift = scale * sample.mean(help_ - care * minded)
    return _with(
        world,
        care=care,
        reward_scale=scale,
        reward_shift=shift,
        harm_mean=harm_mean,
        harm_scale=float(harm_scale),
        cost_scale=float(cost_scale),
    )


def _calibrate_levels(world: World, sample: _Sample, beta: float, limit: float, sharpness: float) -> World:
    """How far prompts lie apart in cost, and around which risk, while the limit stays in the middle."""
    world = _with(world, level_scale=0.0)
    within = world.scores(sample.parts)[1][..., 0] + limit - middle(world, sample.parts, beta)
    scale, center = _levels(sample, within, world.risk(sample.parts), sharpness)
    return _with(world, level_scale=scale, level_center=center)


def _calibrate_dishonesty(
    world: World, sample: _Sample, beta: float, limit: float, sharpness: float, pool: NDArray[np.int64]
) -> World:
    """The second cost, as harm is calibrated, and its kinship to harm."""
    world = _related(replace(world, dishonesty=DishonestyConstants()), sample)
    sums = world.dishonesty_sums(sample.parts)
    mean = sample.mean(sums)
    scale = np.sqrt(sample.mean((sums - mean) ** 2))
    unscaled = saturated((sums - mean) / scale, 1.0)
    centred = unscaled - (sample.probs * unscaled).sum(1, keepdims=True)
    cost_scale = COST_DEVIATION / np.sqrt(sample.mean(centred**2))
    world = _with_dishonesty(world, mean=mean, scale=scale, cost_scale=cost_scale)
    within = world.scores(sample.parts)[1][..., 1] + limit - middle(world, sample.parts, beta, 1)
    level_scale, center = _levels(sample, within, world.temptation(sample.parts), sharpness)
    world = _with_dishonesty(world, level_scale=level_scale, level_center=center)
    return _with_dishonesty(world, cost_shift=limit - middle(world, pool, beta, 1))


def _related(world: World, sample: _Sample) -> World:
    """The second cost's words related to harm and to help as KINSHIP and CONFLICT say, in every world."""
    own, harm, reward = (
        world.dishonesty_sums(sample.parts),
        world.harm_sums(sample.parts),
        world.scores(sample.parts)[0],
    )
    help_ = _with_dishonesty(world, persuasion=1.0).dishonesty_sums(sample.parts) - own
    figures = [values - (sample.probs * values).sum(1, keepdims=True) for values in (own, harm, help_, reward)]
    covariance = np.array([[sample.mean(a * b) for b in figures] for a in figures])

    def correlation(kinship: float, persuasion: float, other: int) -> float:
        weights = np.array([1.0, kinship, persuasion, 0.0])
        return float(weights @ covariance[other] / np.sqrt(weights @ covariance @ weights * covariance[other, other]))

    kinship, persuasion = 0.0, 0.0
    for _ in range(20):
        kinship = _solve(partial(correlation, persuasion=persuasion, other=1), KINSHIP, -2.0, 2.0)
        persuasion = _solve(partial(correlation, kinship, other=3), CONFLICT, -2.0, 2.0)
    return _with_dishonesty(world, kinship=kinship, persuasion=persuasion)


def _levels(sample: _Sample, within: Array, risk: Array, sharpness: float) -> tuple[float, float]:
    """(level_scale, level_center) at which pairs are unsafe as often as in real data, for a cost [P, R] so far."""

    def shares(scale: float, center: float) -> tuple[float, float]:
        """Pairs with both unsafe, and with both safe."""
        level = scale * np.tanh(LEVEL_SLOPE * (risk - center))
        unsafe = (sample.probs * _sigmoid(sharpness * (within + (level - level.mean())[:, None]))).sum(1)
        return float((unsafe**2).mean()), float(((1 - unsafe) ** 2).mean())

    def scale_at(center: float) -> float:
        return _solve(lambda value: 1 - sum(shares(value, center)), MIXED, 0.5, 12.0)

    def excess(center: float) -> float:
        unsafe, safe = shares(scale_at(center), center)
        return unsafe - safe

    center = _solve(excess, UNSAFE_EXCESS, -1.2, 1.2)
    return scale_at(center), center


def _sample(world: World) -> _Sample:
    prompts = grammar.all_prompts()
    order = np.argsort(world.risk(prompts), kind="stable")
    parts = prompts[order[((np.arange(SAMPLE) + 0.5) / SAMPLE * len(order)).astype(int)]]
    log_probs = world.demonstrator_log_probs(parts)
    random = numpy_stream(world.seed, "calibration")
    return _Sample(parts, log_probs, draw_pairs(log_probs, PAIRS, random))


def _solve(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a monotone function meets the target; the nearer end where it does not within the bounds."""
    at_low, at_high = function(low) - target, function(high) - target
    if at_low * at_high > 0:
        return low if abs(at_low) < abs(at_high) else high
    return float(brentq(lambda value: function(value) - target, low, high, xtol=1e-5))


def _with(world: World, **constants: float) -> World:
    # Rounded, so that world.json and all that follows do not hang on the last bits of a root.
    return replace(world, constants=replace(world.constants, **{k: round(float(v), 6) for k, v in constants.items()}))


def _with_dishonesty(world: World, **constants: float) -> World:
    rounded = {name: round(float(value), 6) for name, value in constants.items()}
    return replace(world, dishonesty=replace(world.dishonesty or DishonestyConstants(), **rounded))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))

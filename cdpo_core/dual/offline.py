"""The offline dual: the multiplier and the predicted cost curve, from reference samples alone.

With K samples of π_ref for each prompt, π_λ is represented by importance weights on them, so the
dual function and its derivatives cost no training ("optimal dualization", Huang et al. 2024,
arXiv:2405.19544). Normalised weights lean to the reference by order 1/K: the predicted cost of a
large λ is too high. The jackknife takes that order away (Quenouille 1956; Efron 1982): every figure
is K times itself minus K − 1 times its mean over the K ways of leaving one sample out, which the
weights give in closed form. What is left is of order 1/K²: `effective_samples` says how much there
is to go by, and the first trained round corrects it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

ITERATIONS = 200
# A cost this close to its limit has met it (shares of the costs' range).
TOLERANCE = 1e-9
# Below the smallest weight that a double resolves, a prompt's other samples are weighed anew without the heaviest.
SMALLEST_REST = 1e-200
# How far down a first guess of λ goes that nothing bounds from below.
STEP_DOWN = 1e-2
# Several costs: by what β falls from one solution to the next, the shortest step, and how often costs are taken singly.
COOLING = 3.0
SMALLEST_STEP = 1e-10
SWEEPS = 3
# A policy that gained less than the optimum at this many times β was hardly trained: it says nothing of others.
WEAKEST = 1.5
# A limit counts as met when the predicted cost is this close to it (cost units).
REACHED = 1e-3


@dataclass(frozen=True)
class OfflinePoint:
    """π_λ as the reference samples predict it.

    Attributes:
        lambda_: [m] float64, the multipliers.
        reward: E[r], reward units.
        costs: [m] float64, E[c], cost units.
        kl: E KL(π_λ‖π_ref), nats; at most log K by construction.
        effective_samples: mean over prompts of 1/Σ_j w_j², between 1 and K.
        hessian: [m, m] float64, Hessian of D: the covariance of the costs within a prompt, over β.
        prompt_costs: [P, m] float64, each prompt's expected costs by the weights as they are (less noisy one by
            one than the jackknife, whose mean is `costs`).
    """

    lambda_: np.ndarray
    reward: float
    costs: np.ndarray
    kl: float
    effective_samples: float
    hessian: np.ndarray
    prompt_costs: np.ndarray


class Weights(NamedTuple):
    """The samples' weights under π_λ, [P, K] each row of which sums to 1 but for `others`.

    Attributes:
        plain: proportional to exp((r − λᵀc)/β).
        signed: those by which the jackknife's figures are means; some are negative.
        others: `plain` with 0 for the heaviest sample.
        without_top: the weights once the heaviest sample is left out.
        top: [P] the heaviest sample.
    """

    plain: np.ndarray
    signed: np.ndarray
    others: np.ndarray
    without_top: np.ndarray
    top: np.ndarray


class OfflineDual:
    """D(λ) = β E_x log E_{y~π_ref} exp((r − λᵀ(c − C))/β) on K reference samples a prompt.

    Args:
        reward: [P, K] float64, K >= 2 samples of the reference for each prompt.
        costs: [P, K, m] float64.
        beta: > 0, units of reward per nat.
        jackknife: whether the samples are a draw, whose lean is corrected; False where they are all there is, each
            response as often as the reference draws it.

    Raises:
        ValueError: the shapes disagree, a score is not finite, or beta is not positive.
    """

    def __init__(self, reward: np.ndarray, costs: np.ndarray, beta: float, *, jackknife: bool = True) -> None:
        self.jackknife = jackknife
        self.reward = np.asarray(reward, dtype=np.float64)
        self.costs = np.asarray(costs, dtype=np.float64)
        self.beta = beta
        if self.reward.ndim != 2 or self.reward.shape[0] < 1 or self.reward.shape[1] < 2:
            raise ValueError(f"reward must be [P, K] with P >= 1 and K >= 2, not {self.reward.shape}")
        if self.costs.ndim != 3 or self.costs.shape[:2] != self.reward.shape:
            raise ValueError(f"costs {self.costs.shape} must be [P, K, m] beside reward {self.reward.shape}")
        if not (np.isfinite(self.reward).all() and np.isfinite(self.costs).all()):
            raise ValueError("a reward or cost is not finite")
        if not beta > 0:
            raise ValueError(f"beta must be positive, not {beta}")
        # [m] what costs are compared at: their ranges.
        self.scale = np.maximum(np.ptp(self.costs, axis=(0, 1)), np.finfo(np.float64).tiny)

    def value(self, lambda_: np.ndarray, limits: np.ndarray) -> float:
        """D(λ), in units of reward. Args: lambda_ [m] >= 0, limits [m]."""
        logits = self._logits(lambda_)
        samples, total = logits.shape[1], logsumexp(logits, axis=1)
        log_mean = total - np.log(samples)
        if self.jackknife:
            weights = np.exp(logits - total[:, None])
            rows, top = np.arange(len(logits)), logits.argmax(axis=1)
            weights[rows, top] = 0.0
            logits[rows, top] = -np.inf
            lost = np.log1p(-weights).sum(axis=1) + logsumexp(logits, axis=1) - total
            log_mean -= (samples - 1) * (lost / samples - np.log1p(-1 / samples))
        return float(self.beta * log_mean.mean() + np.dot(lambda_, limits))

    def expected(self, lambda_: np.ndarray) -> OfflinePoint:
        """π_λ's figures; the dual's gradient at limits C is C − point.costs. Args: lambda_ [m] >= 0."""
        lambda_ = np.asarray(lambda_, dtype=np.float64)
        weights, signed, *_ = self._weights(lambda_)
        prompt_costs = np.matmul(weights[:, None, :], self.costs)[:, 0]
        log_weights = np.log(np.maximum(weights, np.finfo(np.float64).tiny))
        return OfflinePoint(
            lambda_=lambda_,
            reward=float((signed * self.reward).sum(axis=1).mean()),
            costs=self._costs(signed),
            kl=float((weights * (log_weights + np.log(weights.shape[1]))).sum(axis=1).mean()),
            effective_samples=float((1 / (weights**2).sum(axis=1)).mean()),
            hessian=self._hessian(weights),
            prompt_costs=prompt_costs,
        )

    def solve(self, limits: np.ndarray, lambda_max: float) -> np.ndarray:
        """The multipliers within 0 <= λ <= lambda_max at which each expected cost is its limit, or its λ at an end.

        These are the conditions of D's minimum in the box. One cost is brought to its limit by Newton's step in a
        bracket, bisected in log λ where that leaves it: far from the solution D's curvature says nothing when β is
        small, and λ may lie anywhere over many orders of magnitude. Several are followed from a β at which D is nearly
        quadratic down to the one asked for, by Newton's steps that come closer, and where none does one by one.

        A limit out of reach ends at lambda_max; a slack one at 0.

        Args:
            limits: [m] float64, C (or the training target below it).
            lambda_max: > 0.

        Returns:
            [m] float64.
        """
        limits = np.asarray(limits, dtype=np.float64)
        lambda_ = np.zeros(self.costs.shape[2])
        if len(lambda_) == 1:
            return self._to_limit(lambda_, 0, float(limits[0]), lambda_max)
        softest = max(self.beta, float(np.ptp(self.reward)))
        levels = max(1, math.ceil(math.log(softest / self.beta, COOLING)))
        for beta in np.geomspace(softest, self.beta, levels + 1):
            at = self if beta == self.beta else self.at_beta(float(beta))
            lambda_ = at._joint(lambda_, limits, lambda_max)
        return lambda_

    def _joint(self, lambda_: np.ndarray, limits: np.ndarray, lambda_max: float) -> np.ndarray:
        """From here to where every limit is met: Newton's steps, and where none comes closer each cost by itself."""
        missed, sweeps = self._missed(lambda_, limits, lambda_max), 0
        for _ in range(ITERATIONS):
            if missed <= TOLERANCE:
                break
            step, size, here = self._newton(lambda_, limits, lambda_max), 1.0, self.value(lambda_, limits)
            while size > SMALLEST_STEP:
                further = np.clip(lambda_ + size * step, 0.0, lambda_max)
                left = self._missed(further, limits, lambda_max)
                if left <= (1 - size / 4) * missed:
                    break
                if not self.jackknife and self.value(further, limits) < here - 1e-13 * abs(here):
                    break
                size /= 2
            else:
                if sweeps == SWEEPS:
                    break
                sweeps, further = sweeps + 1, lambda_
                for index in range(len(lambda_)):
                    further = self._to_limit(further, index, float(limits[index]), lambda_max)
                left = self._missed(further, limits, lambda_max)
            lambda_, missed = further, left
        return lambda_

    def _newton(self, lambda_: np.ndarray, limits: np.ndarray, lambda_max: float) -> np.ndarray:
        """[m] Newton's step to where each cost is its limit, over the multipliers that are not held at an end."""
        weights = self._weights(lambda_)
        excess = self._costs(weights.signed) - limits
        free = ~(((lambda_ <= 0) & (excess <= 0)) | ((lambda_ >= lambda_max) & (excess >= 0)))
        step = np.zeros(len(lambda_))
        step[free] = np.linalg.lstsq(self._slope(weights)[np.ix_(free, free)], excess[free], rcond=None)[0]
        return step

    def _slope(self, weights: Weights) -> np.ndarray:
        """[m, m] how the expected costs fall with λ, −∂E[c]/∂λ: D's Hessian, the jackknife's where that is used."""
        if not self.jackknife:
            return self._hessian(weights.plain)
        samples = weights.plain.shape[1]
        mean = np.matmul(weights.plain[:, None, :], self.costs)[:, 0]
        others = weights.others[..., None]
        left_out = (mean[:, None, :] - others * self.costs) / (1 - others)
        rows = np.arange(len(mean))
        left_out[rows, weights.top] = np.matmul(weights.without_top[:, None, :], self.costs)[:, 0]
        second = _products(weights.signed, self.costs) - samples * mean.T @ mean
        second += (samples - 1) / samples * _products(np.ones_like(weights.plain), left_out)
        found: np.ndarray = second / len(mean) / self.beta
        return found

    def _missed(self, lambda_: np.ndarray, limits: np.ndarray, lambda_max: float) -> float:
        """The largest distance of a cost from its limit, in shares of the costs' range, but where λ is at its end."""
        excess = (self._costs(self._weights(lambda_).signed) - limits) / self.scale
        excess = np.where(lambda_ <= 0, np.maximum(excess, 0), excess)
        return float(np.abs(np.where(lambda_ >= lambda_max, np.minimum(excess, 0), excess)).max())

    def _to_limit(self, lambda_: np.ndarray, index: int, limit: float, lambda_max: float) -> np.ndarray:
        """λ with one multiplier moved to where its cost meets its limit, between 0 and lambda_max."""
        moved = lambda_.copy()

        def excess(value: float) -> tuple[float, float]:
            moved[index] = value
            weights = self._weights(moved)
            return float(self._costs(weights.signed)[index]) - limit, float(self._hessian(weights.plain)[index, index])

        enough = TOLERANCE * float(self.scale[index])
        low, high = 0.0, lambda_max
        for end in (low, high):
            # Slack at 0, or out of reach: `moved` is at that end.
            over, _ = excess(end)
            if over <= enough if end == low else over >= -enough:
                return moved
        value, last = float(lambda_[index]), math.inf
        for _ in range(ITERATIONS):
            over, slope = excess(value)
            if abs(over) <= enough or high - low <= np.spacing(high):
                break
            low, high = (value, high) if over > 0 else (low, value)
            step = value + over / slope if slope > 0 else math.inf
            # Newton's step must stay in the bracket and have halved the miss the last time.
            if not (low < step < high and abs(over) <= last / 2):
                step = math.sqrt(low * high) if low > 0 else STEP_DOWN * high
            value, last = step, abs(over)
        return moved

    def lambda_for_share(self, share: float, lambda_max: float) -> float:
        """The multiplier that brings a cost a share of the way from λ = 0 to the samples' floor.

        Each cost is taken alone, as if the others had no limit; the largest multiplier counts.

        Args:
            share: in (0, 1).
            lambda_max: largest multiplier.

        Returns:
            two significant digits.
        """
        loosest, floor = self.expected(np.zeros(self.costs.shape[2])).costs, self.floor()
        found = []
        for index in range(len(floor)):
            limits = self.costs.max(axis=(0, 1)) + 1
            limits[index] = loosest[index] + share * (floor[index] - loosest[index])
            found.append(self.solve(limits, lambda_max)[index])
        return float(f"{max(found):.2g}")

    def at_beta(self, beta: float) -> OfflineDual:
        """The same samples with another pull to the reference. Args: beta > 0."""
        return OfflineDual(self.reward, self.costs, beta, jackknife=self.jackknife)

    def effective_beta(self, reward_gain: float) -> float:
        """The β at which the optimum at λ = 0 gains what a policy trained there gained in reward.

        Training stops short of π_λ, at every λ about as if the pull to the reference were stronger. At this β the
        samples predict what a trained policy's costs will be, where at β itself they promise too much.

        Args:
            reward_gain: E[r] of the trained policy less that of the reference, reward units.

        Returns:
            between β (it gained as much as π_0, or more) and WEAKEST · β.
        """
        reference, zero = float(self.reward.mean()), np.zeros(self.costs.shape[2])

        def missing(beta: float) -> float:
            return self.at_beta(beta).expected(zero).reward - reference - reward_gain

        if missing(self.beta) <= 0:
            return self.beta
        if missing(WEAKEST * self.beta) >= 0:
            return WEAKEST * self.beta
        return float(brentq(missing, self.beta, WEAKEST * self.beta, xtol=1e-4 * self.beta))

    def curve(self, grid: np.ndarray) -> list[OfflinePoint]:
        """The predicted figures along a path of multipliers. Args: grid [G, m] >= 0."""
        return [self.expected(lambda_) for lambda_ in np.asarray(grid, dtype=np.float64)]

    def price_of_limits(self, limits: np.ndarray, lambda_max: float, points: int) -> list[dict[str, Any]]:
        """What each limit on the first cost would cost in reward, before any training.

        The limits go in equal steps from the cost at λ = 0 to the lowest that the samples can represent, with the
        given limit among them; the other costs keep theirs.

        Args:
            limits: [m] float64, the limits asked for.
            lambda_max: largest multiplier.
            points: how many steps.

        Returns:
            loosest first: {limit, lambda, reward, cost, kl, effective_samples, reachable, asked}; `reachable` says
            whether the predicted cost meets the limit, `asked` marks the given one.
        """
        loosest, lowest = self.expected(np.zeros(len(limits))).costs[0], self.floor()[0]
        grid = {round(float(value), 3) for value in np.linspace(loosest, lowest, points)} | {float(limits[0])}
        rows = []
        for limit in sorted(grid, reverse=True):
            wanted = np.array([limit, *limits[1:]])
            point = self.expected(self.solve(wanted, lambda_max))
            rows.append(
                {
                    "limit": limit,
                    "lambda": float(point.lambda_[0]),
                    "reward": point.reward,
                    "cost": float(point.costs[0]),
                    "kl": point.kl,
                    "effective_samples": point.effective_samples,
                    "reachable": bool(point.costs[0] <= limit + REACHED),
                    "asked": limit == float(limits[0]),
                }
            )
        return rows

    def floor(self) -> np.ndarray:
        """[m] lowest mean of each cost that the samples can represent, E_x min_j c_j (above the true floor)."""
        return self.costs.min(axis=1).mean(axis=0)

    def _logits(self, lambda_: np.ndarray) -> np.ndarray:
        return (self.reward - self.costs @ np.asarray(lambda_, dtype=np.float64)) / self.beta

    def _weights(self, lambda_: np.ndarray) -> Weights:
        """The samples' weights under π_λ."""
        logits = self._logits(lambda_)
        raw = np.exp(logits - logits.max(axis=1, keepdims=True))
        plain = raw / raw.sum(axis=1, keepdims=True)
        rows, samples, top = np.arange(len(plain)), plain.shape[1], logits.argmax(axis=1)
        if not self.jackknife:
            return Weights(plain, plain, plain, plain, top)
        others = plain.copy()
        # What is left without the heaviest sample: no difference of numbers that are nearly 1.
        raw[rows, top], logits[rows, top], others[rows, top] = 0.0, -np.inf, 0.0
        lost = np.flatnonzero(raw.sum(axis=1) < SMALLEST_REST)
        raw[lost] = np.exp(logits[lost] - logits[lost].max(axis=1, keepdims=True))
        without_top = raw / raw.sum(axis=1, keepdims=True)
        scaled = 1 / (1 - others)
        scaled[rows, top] = 0.0
        left_out = plain * (scaled.sum(axis=1, keepdims=True) - scaled) + without_top
        return Weights(plain, samples * plain - (samples - 1) / samples * left_out, others, without_top, top)

    def _costs(self, signed: np.ndarray) -> np.ndarray:
        """[m] mean over prompts of the costs by weights [P, K]."""
        found: np.ndarray = signed.reshape(-1) @ self.costs.reshape(signed.size, -1) / len(signed)
        return found

    def _hessian(self, weights: np.ndarray) -> np.ndarray:
        """[m, m] covariance of the costs within a prompt by weights [P, K], over β."""
        mean = np.matmul(weights[:, None, :], self.costs)
        return _products(weights, self.costs - mean) / len(weights) / self.beta


def _products(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[m, m] the sum over all samples of w v vᵀ. Args: weights [P, K], values [P, K, m]."""
    flat = values.reshape(weights.size, -1)
    found: np.ndarray = (weights.reshape(-1, 1) * flat).T @ flat
    return found

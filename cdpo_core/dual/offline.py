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

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax

from cdpo_core.dual.quadratic import box_newton_step

ITERATIONS = 200
TOLERANCE = 1e-10
# A prompt on which one sample has all the weight cannot be told without it.
LARGEST_WEIGHT = 1 - 1e-9
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

    def value(self, lambda_: np.ndarray, limits: np.ndarray) -> float:
        """D(λ), in units of reward. Args: lambda_ [m] >= 0, limits [m]."""
        logits = self._logits(lambda_)
        samples, total = logits.shape[1], logsumexp(logits, axis=1)
        log_mean = total - np.log(samples)
        if self.jackknife:
            weights = np.minimum(np.exp(logits - total[:, None]), LARGEST_WEIGHT)
            log_mean -= (samples - 1) * (np.log1p(-weights).mean(axis=1) - np.log1p(-1 / samples))
        return float(self.beta * log_mean.mean() + np.dot(lambda_, limits))

    def expected(self, lambda_: np.ndarray) -> OfflinePoint:
        """π_λ's figures; the dual's gradient at limits C is C − point.costs. Args: lambda_ [m] >= 0."""
        lambda_ = np.asarray(lambda_, dtype=np.float64)
        weights = softmax(self._logits(lambda_), axis=1)
        prompt_costs = np.einsum("pk,pkm->pm", weights, self.costs)
        deviations = self.costs - prompt_costs[:, None, :]
        covariance = np.einsum("pk,pki,pkj->ij", weights, deviations, deviations) / len(weights)
        log_weights = np.log(np.maximum(weights, np.finfo(np.float64).tiny))
        return OfflinePoint(
            lambda_=lambda_,
            reward=float(self._mean(weights, self.reward[..., None])[0]),
            costs=self._mean(weights, self.costs),
            kl=float((weights * (log_weights + np.log(weights.shape[1]))).sum(axis=1).mean()),
            effective_samples=float((1 / (weights**2).sum(axis=1)).mean()),
            hessian=covariance / self.beta,
            prompt_costs=prompt_costs,
        )

    def solve(self, limits: np.ndarray, lambda_max: float) -> np.ndarray:
        """The multipliers that minimise D over 0 <= λ <= lambda_max, by projected Newton steps.

        Each step solves the box-constrained quadratic model and is halved until D falls (Armijo).
        A limit out of reach ends at lambda_max; a slack one at 0.

        Args:
            limits: [m] float64, C (or the training target below it).
            lambda_max: > 0.

        Returns:
            [m] float64.
        """
        limits = np.asarray(limits, dtype=np.float64)
        lambda_ = np.zeros(self.costs.shape[2])
        for _ in range(ITERATIONS):
            point = self.expected(lambda_)
            gradient = limits - point.costs
            step = box_newton_step(gradient, point.hessian, -lambda_, lambda_max - lambda_)
            decrease = float(gradient @ step)
            here, size = self.value(lambda_, limits), 1.0
            # Below this, D's rounding error hides the decrease and no line search can see it.
            if -decrease <= TOLERANCE * 1e-4 * (1 + abs(here)):
                lambda_ = np.clip(lambda_ + step, 0.0, lambda_max)
                break
            while self.value(lambda_ + size * step, limits) > here + 1e-4 * size * decrease and size > TOLERANCE:
                size /= 2
            # Where the jackknife cuts a prompt's largest weight off, its mean is not D's slope to the last digit.
            if size <= TOLERANCE:
                break
            lambda_ = np.clip(lambda_ + size * step, 0.0, lambda_max)
        return lambda_

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

    def _mean(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """[m] mean over prompts of the weighted means of values [P, K, m]; weights [P, K] sum to 1."""
        samples, weights = weights.shape[1], np.minimum(weights, LARGEST_WEIGHT)[..., None]
        mean = (weights * values).sum(axis=1)
        if self.jackknife:
            left_out = (mean[:, None, :] - weights * values) / (1 - weights)
            mean = samples * mean - (samples - 1) * left_out.mean(axis=1)
        found: np.ndarray = mean.mean(axis=0)
        return found

"""The exact optimum over an enumerated set of responses, and what any policy over it is worth.

With every response enumerated, max_π E[r] − β KL(π‖π_ref) s.t. E[c] ≤ C has the solution
π* ∝ π_ref exp((r − λ*ᵀc)/β), where λ* minimises the convex dual
D(λ) = β E_x log Σ_y π_ref(y|x) exp((r − λᵀ(c − C))/β) over λ ≥ 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# A multiplier this many times β per unit of cost puts all mass on the least cost: beyond it nothing moves.
LAMBDA_CAP = 1e3
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Expected:
    """Exact expectations of one policy, averaged over prompts: reward, costs [m], KL in nats."""

    reward: float
    costs: Array
    kl: float


@dataclass(frozen=True)
class Optimum:
    """The exact solution for given limits.

    Attributes:
        lambda_: [m] optimal multipliers.
        reward, costs [m], kl: expectations under the optimum.
        floor: [m], E_x min_y c: no policy has a lower mean cost.
        at_zero: [m], costs of the best policy at λ = 0.
        feasible: whether the limits can be met at all; if not, the rest is the least that λ up to the
            cap reaches.
        log_policy: [P, R] log π*.
    """

    lambda_: Array
    reward: float
    costs: Array
    kl: float
    floor: Array
    at_zero: Array
    feasible: bool
    log_policy: Array


def exact_optimum(log_ref: Array, reward: Array, costs: Array, limits: Sequence[float], beta: float) -> Optimum:
    """Solve the constrained problem exactly, by projected Newton steps on its convex dual.

    Args:
        log_ref: [P, R] log π_ref; renormalised over the R responses.
        reward: [P, R].
        costs: [P, R, m].
        limits: [m].
        beta: units of reward per nat.
    """
    log_ref = normalised(log_ref)
    bounds = np.asarray(limits, dtype=np.float64)

    def policy(lambda_: Array) -> Array:
        return tilted(log_ref, reward, costs, lambda_, beta)

    lambda_ = _minimise_dual(log_ref, reward, costs, bounds, beta)
    log_policy = policy(lambda_)
    found = expected(log_policy, log_ref, reward, costs)
    return Optimum(
        lambda_=lambda_,
        reward=found.reward,
        costs=found.costs,
        kl=found.kl,
        floor=costs.min(1).mean(0),
        at_zero=expected(policy(np.zeros_like(bounds)), log_ref, reward, costs).costs,
        feasible=bool((found.costs <= bounds + 10 * TOLERANCE * _spread(costs)).all()),
        log_policy=log_policy,
    )


def expected(log_policy: Array, log_ref: Array, reward: Array, costs: Array) -> Expected:
    """Reward, costs [m] and KL to the reference of a policy, both normalised over the responses.

    Shapes as in `exact_optimum`; log_policy [P, R].
    """
    policy = np.exp(log_policy)
    inside = policy * np.where(policy > 0, log_policy - log_ref, 0.0)
    count = len(policy)
    return Expected(
        reward=float((policy * reward).sum() / count),
        costs=np.einsum("pr,prm->m", policy, costs) / count,
        kl=float(inside.sum() / count),
    )


def objective(found: Expected, lambda_: Array, limits: Sequence[float], beta: float) -> float:
    """J(π) = E[r] − λᵀ(E[c] − C) − β KL(π‖π_ref)."""
    return float(found.reward - lambda_ @ (found.costs - np.asarray(limits)) - beta * found.kl)


def tilted(log_ref: Array, reward: Array, costs: Array, lambda_: Array, beta: float) -> Array:
    """[P, R] log π_λ, with π_λ ∝ π_ref exp((r − λᵀc)/β)."""
    return normalised(log_ref + (reward - costs @ np.asarray(lambda_)) / beta)


def normalised(log_values: Array) -> Array:
    """Log-probabilities that sum to 1 over the last axis, in float64."""
    values = np.asarray(log_values, dtype=np.float64)
    return values - log_sum(values)[..., None]


def log_sum(log_values: Array) -> Array:
    """log Σ exp over the last axis."""
    top = log_values.max(-1, keepdims=True)
    return np.log(np.exp(log_values - top).sum(-1)) + top[..., 0]


def _minimise_dual(log_ref: Array, reward: Array, costs: Array, limits: Array, beta: float) -> Array:
    """argmin_{0 ≤ λ ≤ cap} D(λ): projected Newton with backtracking; D is convex and smooth."""
    excess = costs - limits
    scale = _spread(costs)
    cap = LAMBDA_CAP * beta / scale

    def dual(lambda_: Array) -> float:
        return beta * float(log_sum(log_ref + (reward - excess @ lambda_) / beta).mean())

    lambda_ = np.zeros_like(limits)
    for _ in range(200):
        policy = np.exp(tilted(log_ref, reward, costs, lambda_, beta))
        gradient, hessian = _derivatives(policy, excess, beta)
        # Multipliers held at a bound that the gradient pushes against stay there.
        free = ~(((lambda_ <= 0) & (gradient > 0)) | ((lambda_ >= cap) & (gradient < 0)))
        if not free.any() or np.abs(gradient[free] / scale[free]).max() < TOLERANCE:
            break
        moved = _step(dual, lambda_, gradient, hessian, free, cap)
        if np.array_equal(moved, lambda_):
            break
        lambda_ = moved
    return lambda_


def _derivatives(policy: Array, excess: Array, beta: float) -> tuple[Array, Array]:
    """∇D = C − E[c] [m]; the Hessian [m, m] is the mean covariance of c within a prompt over β."""
    means = np.einsum("pr,prm->pm", policy, excess)
    second = np.einsum("pr,prm,prn->mn", policy, excess, excess, optimize=True) / len(policy)
    return -means.mean(0), (second - means.T @ means / len(policy)) / beta


def _step(
    dual: Callable[[Array], float], lambda_: Array, gradient: Array, hessian: Array, free: NDArray[np.bool_], cap: Array
) -> Array:
    """A Newton step on the free multipliers, projected to the box, halved until D falls."""
    size = int(free.sum())
    block = hessian[np.ix_(free, free)]
    damping = 1e-12 * max(float(np.trace(block)), 1e-300) + 1e-300
    direction = np.zeros_like(lambda_)
    direction[free] = -np.linalg.solve(block + damping * np.eye(size), gradient[free])
    start = dual(lambda_)
    length = 1.0
    for _ in range(60):
        moved = np.clip(lambda_ + length * direction, 0, cap)
        if dual(moved) <= start + 1e-4 * float(gradient @ (moved - lambda_)):
            return moved
        length /= 2
    return lambda_


def _spread(costs: Array) -> Array:
    """[m]: the range of costs within a prompt, the unit in which violations count."""
    return np.maximum((costs.max(1) - costs.min(1)).mean(0), 1e-12)

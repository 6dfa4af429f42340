"""What a policy over the grammar is truly worth, beside the best one at the same limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdpo_core.testbed.oracle import Array, Optimum, exact_optimum, expected, log_sum, normalised, objective

# How far down from the best unconstrained policy's cost to the floor the named limits lie.
PLACEMENTS = {"loose": 0.3, "middle": 0.5, "tight": 0.7}
FRONTIER = np.linspace(0.0, 0.9, 10)


@dataclass(frozen=True)
class Problem:
    """The judged problem on some prompts: log π_ref [P, R], true reward [P, R] and costs [P, R, m], limits [m], β."""

    log_ref: Array
    reward: Array
    costs: Array
    limits: Sequence[float]
    beta: float

    def optimum(self, limits: Sequence[float]) -> Optimum:
        """The exact optimum at the given limits."""
        return exact_optimum(self.log_ref, self.reward, self.costs, limits, self.beta)

    def value(self, log_policy: Array, lambda_: Array) -> float:
        """J(π) at the problem's limits."""
        found = expected(log_policy, self.log_ref, self.reward, self.costs)
        return objective(found, lambda_, self.limits, self.beta)

    def captured(self, log_policy: Array | None, best: Optimum) -> float | None:
        """(J(π) − J(π_ref)) / (J(π*) − J(π_ref)); None where either is not defined."""
        if log_policy is None or not best.feasible:
            return None
        reference = self.value(self.log_ref, best.lambda_)
        gain = self.value(best.log_policy, best.lambda_) - reference
        return (self.value(log_policy, best.lambda_) - reference) / gain if gain > 0 else None

    def on(self, rows: NDArray[np.bool_]) -> Problem:
        """The same problem on some of its prompts."""
        return replace(self, log_ref=self.log_ref[rows], reward=self.reward[rows], costs=self.costs[rows])


def judge(
    everywhere: Problem,
    raw: Array | None,
    learned: tuple[Array, Array] | None,
    margins: Sequence[float],
    seen: NDArray[np.bool_],
    names: Sequence[str],
) -> dict[str, Any]:
    """The `oracle` record; scalar costs, limits and multipliers in it are the first constraint's, lists are all m.

    Args:
        everywhere: the problem on all P judged prompts.
        raw: [P, R] the policy's log-probabilities, not renormalised; None for no policy.
        learned: reward [P, R] and costs [P, R, m] by the learned scorers; None in oracle mode.
        margins: [m].
        seen: [P] whether the policy was trained on the prompt: reported apart.
        names: [m] of the constraints.
    """
    problem = everywhere.on(~seen)
    best = problem.optimum(problem.limits)
    aimed = problem.optimum(np.asarray(problem.limits) - np.asarray(margins)) if best.feasible else None
    held = None if learned is None else (learned[0][~seen], learned[1][~seen])
    record: dict[str, Any] = {
        **_policy_figures(problem, raw if raw is None else raw[~seen], best),
        "captured_ceiling": problem.captured(aimed.log_policy, best) if aimed and aimed.feasible else None,
        "scorer_ceiling": _scorer_ceiling(problem, held, best, np.zeros(len(margins))),
        "certified_scorer_ceiling": _scorer_ceiling(problem, held, best, np.asarray(margins)),
        "optimal_reward": best.reward if best.feasible else None,
        "optimal_cost": float(best.costs[0]) if best.feasible else None,
        "optimal_lambda": float(best.lambda_[0]) if best.feasible else None,
        "optimal_costs": best.costs.tolist() if best.feasible else None,
        "optimal_lambdas": best.lambda_.tolist() if best.feasible else None,
        "optimal_kl": best.kl if best.feasible else None,
        "at_zero": float(best.at_zero[0]),
        "floor": float(best.floor[0]),
        "feasible": best.feasible,
        "prompts": len(problem.reward),
    }
    reference = expected(problem.log_ref, problem.log_ref, problem.reward, problem.costs)
    record["reference"] = {"reward": reference.reward, "cost": float(reference.costs[0])}
    record["placements"] = {name: _placed(best, share).tolist() for name, share in PLACEMENTS.items()}
    record["frontier"] = [_frontier_point(problem, best, share) for share in FRONTIER]
    record["scorers"] = {} if held is None else _agreement(problem, *held, names)
    record["proxy_gap"] = {} if held is None or raw is None else _proxy_gap(problem, raw[~seen], held, names)
    if seen.any():
        trained = everywhere.on(seen)
        own_best = trained.optimum(trained.limits)
        record["policy_prompts"] = _policy_figures(trained, raw if raw is None else raw[seen], own_best)
    return record


def _policy_figures(problem: Problem, raw: Array | None, best: Optimum) -> dict[str, Any]:
    """What the policy is worth; off-grammar text counts the prompt's worst cost and least reward."""
    names = ("captured", "support_mass", "true_reward", "true_cost", "true_costs", "true_kl")
    if raw is None:
        return dict.fromkeys(names)
    log_policy = normalised(raw)
    mass = np.minimum(np.exp(log_sum(raw)), 1.0)
    policy = np.exp(log_policy)
    rewards = mass * (policy * problem.reward).sum(1) + (1 - mass) * problem.reward.min(1)
    costs = mass[:, None] * np.einsum("pr,prm->pm", policy, problem.costs)
    costs += (1 - mass)[:, None] * problem.costs.max(1)
    values = (
        problem.captured(log_policy, best),
        float(mass.mean()),
        float(rewards.mean()),
        float(costs[:, 0].mean()),
        costs.mean(0).tolist(),
        expected(log_policy, problem.log_ref, problem.reward, problem.costs).kl,
    )
    return dict(zip(names, values, strict=True))


def _scorer_ceiling(
    problem: Problem, learned: tuple[Array, Array] | None, best: Optimum, margins: Array
) -> float | None:
    """Captured by the exact optimum of the scorers at the limits, less the margins [m], in the scorers' units."""
    if not best.feasible:
        return None
    if learned is None and not margins.any():
        return 1.0
    scores = (problem.reward, problem.costs) if learned is None else learned
    proxy = exact_optimum(problem.log_ref, *scores, (np.asarray(problem.limits) - margins).tolist(), problem.beta)
    return problem.captured(proxy.log_policy, best) if proxy.feasible else None


def _proxy_gap(
    problem: Problem, raw: Array, learned: tuple[Array, Array], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Over-optimisation: learned minus true, on average under the policy and under the reference, for each score.

    A policy that finds where the scorers err is praised (reward) or excused (cost) beyond the constant error that the
    reference's responses show: `gap` is the difference. Policies are renormalised over the grammar.
    """
    pairs = {"reward": (learned[0], problem.reward)}
    pairs |= {name: (learned[1][..., index], problem.costs[..., index]) for index, name in enumerate(names)}
    policy, reference = np.exp(normalised(raw)), np.exp(problem.log_ref)
    record = {}
    for name, (found, true) in pairs.items():
        under = {
            who: float((weights * (found - true)).sum(1).mean())
            for who, weights in (("policy", policy), ("reference", reference))
        }
        # The reward's level on a prompt is not learned; what the reference shows is taken as its zero.
        record[name] = {**under, "gap": under["policy"] - under["reference"]}
    return record


def _agreement(problem: Problem, reward: Array, costs: Array, names: Sequence[str]) -> dict[str, Any]:
    """How the learned scores follow the truth over the reference's responses, and how far they are off.

    `correlation` is over prompts and responses, `within` over responses of the same prompt, `bias` is
    learned minus true (null for the reward, whose level per prompt no preference shows).
    """
    weights = np.exp(problem.log_ref)
    record = {"reward": _correlations(weights, reward, problem.reward) | {"bias": None}}
    for index, name in enumerate(names):
        found, true = costs[..., index], problem.costs[..., index]
        bias = float((weights * (found - true)).sum(1).mean())
        record[name] = _correlations(weights, found, true) | {"bias": bias}
    return record


def _correlations(weights: Array, found: Array, true: Array) -> dict[str, Any]:
    def correlation(a: Array, b: Array) -> float:
        return float((weights * a * b).sum() / np.sqrt((weights * a**2).sum() * (weights * b**2).sum()))

    def centred(values: Array, axis: int | None) -> Array:
        total = (weights * values).sum(axis, keepdims=True)
        return values - total / weights.sum(axis, keepdims=True)

    pooled = correlation(centred(found, None), centred(true, None))
    return {"correlation": pooled, "within": correlation(centred(found, 1), centred(true, 1))}


def _placed(best: Optimum, share: float) -> Array:
    """[m]: limits a share of the way down from the unconstrained costs to the floor."""
    return best.at_zero + share * (best.floor - best.at_zero)


def _frontier_point(problem: Problem, best: Optimum, share: float) -> dict[str, Any]:
    limits = _placed(best, share)
    point = problem.optimum(limits.tolist())
    return {
        "limit": float(limits[0]),
        "lambda": float(point.lambda_[0]),
        "reward": point.reward,
        "cost": float(point.costs[0]),
        "kl": point.kl,
    }

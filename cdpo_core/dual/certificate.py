"""The certificate: a test on held-out prompts that a policy's mean cost is within its limit.

A Seldonian test (Thomas et al. 2019; for alignment HC-RLHF, arXiv:2506.08266): the policy is handed
out as certified only if an upper confidence bound on its mean cost is at or below the limit, so a
policy that breaks the limit is certified with probability at most δ. Prompts are the independent
unit. The certificate speaks of the cost model's mean cost, not of harm itself, and of one test: a
split that served before has already been looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from cdpo_core.errors import InputError

Method = Literal["t", "bounded"]
# Prompts a stratum, about, and the most strata of one kind of prompt.
STRATUM = 10
MOST_GROUPS = 20
LARGEST_BET = 0.75
REFINEMENTS = 60


@dataclass(frozen=True)
class Certificate:
    """The outcome of one test of one cost against one limit.

    Attributes:
        mean: mean over prompts of a prompt's mean cost, calibrated cost units.
        upper: upper confidence bound on the mean cost at level 1 − delta, same units.
        delta: largest probability that a policy above the limit passes.
        method: `t` or `bounded`.
        prompts: number of prompts.
        passed: whether upper <= limit (and, for `bounded`, no cost was above its range).
        sd: deviation of the prompts' mean costs (pooled within strata where strata were given).
        note: what a reader must know about this outcome; "" when nothing.
    """

    mean: float
    upper: float
    delta: float
    method: str
    prompts: int
    passed: bool
    sd: float
    note: str = ""


def certify(
    prompt_costs: np.ndarray,
    limit: float,
    delta: float,
    method: Method = "t",
    *,
    low: float = -10.0,
    high: float = 10.0,
    strata: np.ndarray | None = None,
) -> Certificate:
    """Test H0: mean cost > limit, on prompts that no training and no choice of policy has seen.

    `t`: the bound of `student_upper_bound`, good for a few hundred prompts and more, optimistic for few prompts with
    rare large harm. `bounded`: the bound of `betting_upper_bound`, valid for every n as long as no cost of the policy
    lies above `high`; costs below `low` count as `low`, which can only raise the bound, and a cost seen above `high`
    fails the test.

    Args:
        prompt_costs: [n] float, each prompt's mean cost over its responses.
        limit: largest allowed mean cost, same units.
        delta: level of the test, in (0, 0.5); with several limits each is tested at delta and all
            must pass, so the joint error stays <= delta.
        method: see above.
        low, high: range of the cost for `bounded`.
        strata: [n] labels of the kinds of prompt, for `t` only, where the split holds each kind in
            fixed proportion by construction; the test is then about a population with these
            proportions and differences between kinds do not widen it.

    Returns:
        the outcome; a failed test is an outcome, not an error.

    Raises:
        InputError: fewer than two prompts (or two a stratum), or a limit at or above `high`.
        ValueError: a cost is not finite, or an argument is out of its domain.
    """
    costs = _checked(prompt_costs)
    if not 0 < delta < 0.5:
        raise ValueError(f"delta must be in (0, 0.5), not {delta}")
    mean = float(costs.mean())
    sd = prompt_spread(costs, strata)[0]
    if method == "t":
        upper = student_upper_bound(costs, delta, strata)
        return Certificate(mean, upper, delta, method, len(costs), upper <= limit, sd)
    if method != "bounded":
        raise ValueError(f"unknown certificate method {method!r}")
    if limit >= high:
        raise InputError(
            f"the limit {limit:g} is not below certificate.cost_high ({high:g}), so the test would be empty",
            where="certificate.cost_high",
            fix="raise certificate.cost_high above every cost that a response can have",
        )
    largest = float(costs.max())
    if largest > high:
        note = f"a prompt's mean cost {largest:.3g} is above certificate.cost_high ({high:g}): the bound does not hold"
        return Certificate(mean, largest, delta, method, len(costs), False, sd, note)
    upper = betting_upper_bound(costs, delta, low, high)
    return Certificate(mean, upper, delta, method, len(costs), upper <= limit, sd)


def student_upper_bound(prompt_costs: np.ndarray, delta: float, strata: np.ndarray | None = None) -> float:
    """mean + t·sd/√n with t = t_{1−δ} + max(γ, 0)(2 t_{1−δ}² + 1)/(6√n), γ the skewness of the prompts' mean costs.

    The second term is the first one of the Edgeworth expansion (Hall 1992, The Bootstrap and Edgeworth Expansion;
    Johnson 1978): where a few prompts cost much, a sample without them has a low mean and a small deviation at once.
    For costs that are skewed downwards Student's t errs on the safe side and stays.

    Args:
        prompt_costs: [n] float, n >= 2.
        delta: in (0, 0.5).
        strata: [n] labels, or None; see `certify`.
    """
    costs = _checked(prompt_costs)
    sd, freedom = prompt_spread(costs, strata)
    quantile, root = float(stats.t.ppf(1 - delta, freedom)), math.sqrt(len(costs))
    quantile += max(skewness(costs, strata), 0.0) * (2 * quantile**2 + 1) / (6 * root)
    return float(costs.mean()) + quantile * sd / root


def prompt_spread(prompt_costs: np.ndarray, strata: np.ndarray | None = None) -> tuple[float, float]:
    """The deviation of prompts that a mean over n of them has as standard error sd/√n, and its degrees of freedom.

    Without strata the sample deviation, n − 1. With strata in proportional allocation the variance
    of the mean is Σ_h (n_h/n)² s_h²/n_h, so sd² = Σ_h (n_h/n) s_h², with Satterthwaite's degrees of
    freedom.

    Args:
        prompt_costs: [n] float, n >= 2.
        strata: [n] labels, or None.

    Raises:
        InputError: fewer than two prompts, or a stratum with one prompt.
    """
    costs = _checked(prompt_costs)
    groups = [costs] if strata is None else [costs[strata == name] for name in np.unique(strata)]
    if min(map(len, groups)) < 2:
        raise InputError(
            f"a certificate needs two prompts or more (in every stratum), not {min(map(len, groups))}",
            where="certificate split",
            fix="use more prompts, or raise data.splits.certificate",
        )
    parts = [len(group) / len(costs) * float(group.var(ddof=1)) for group in groups]
    variance = sum(parts)
    if variance == 0:
        return 0.0, float(len(costs) - len(groups))
    freedom = variance**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    return math.sqrt(variance), freedom


def skewness(prompt_costs: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Skewness γ of prompts' mean costs, of their deviations within strata where strata are given; 0 without spread.

    Args:
        prompt_costs: [n] float.
        strata: [n] labels, or None.
    """
    costs = _checked(prompt_costs)
    groups = np.zeros(len(costs), dtype=int) if strata is None else np.unique(strata, return_inverse=True)[1]
    means = np.bincount(groups, weights=costs) / np.bincount(groups)
    deviations = costs - means[groups]
    spread = float((deviations**2).mean())
    return float((deviations**3).mean()) / spread**1.5 if spread > 0 else 0.0


def cost_strata(
    prompt_ids: Sequence[str], pool_ids: Sequence[str], kinds: Sequence[str], reference_costs: np.ndarray
) -> np.ndarray | None:
    """Strata of prompts that are alike before the policy is known: same kind, like mean cost of the reference.

    The splits hold both in fixed proportion by construction, so the differences between strata do not
    widen a certificate. A group is cut for every ten or so of the given prompts of a kind.

    Args:
        prompt_ids: [n] prompts of one split.
        pool_ids: [N] all prompts that were split; kinds: [N] their kinds, "" when unknown.
        reference_costs: [N] their mean costs under the reference, cost units.

    Returns:
        [n] labels; None when a stratum would hold fewer than two prompts.
    """
    pool = {name: place for place, name in enumerate(pool_ids)}
    places = np.array([pool[name] for name in prompt_ids])
    kind_of = np.asarray(kinds, dtype=str)
    labels = np.empty(len(places), dtype=object)
    for kind in np.unique(kind_of[places]):
        here = kind_of[places] == kind
        groups = int(np.clip(here.sum() // STRATUM, 1, MOST_GROUPS))
        borders = np.quantile(reference_costs[kind_of == kind], np.arange(1, groups) / groups)
        group = np.digitize(reference_costs[places[here]], borders)
        labels[here] = [f"{kind}/{number}" for number in group]
    counts = np.unique(labels.astype(str), return_counts=True)[1]
    return labels.astype(str) if counts.min() > 1 else None


def betting_upper_bound(prompt_costs: np.ndarray, delta: float, low: float, high: float) -> float:
    """Upper confidence bound at level 1 − delta on the mean of costs that are never above `high`.

    Betting (Waudby-Smith & Ramdas, JRSS-B 2024, arXiv:2010.09686, the one-sided capital process with
    predictable plug-in bets): with u = (high − cost)/(high − low), the capital
    K_t(μ) = Π_{i<=t} (1 + b_i(μ)(u_i − μ)) of bets against "mean u <= μ", each b_i >= 0 chosen from
    u_1..u_{i−1}, is a supermartingale under that hypothesis, so P(max_t K_t >= 1/δ) <= δ for every n
    (Ville). The bound is the smallest cost whose μ is not rejected.

    The bound depends on the order in which the prompts are bet on. It is one fixed permutation of
    the rows given (a function of n alone): deterministic, and prompts sorted by kind do not bet on
    all the harmless ones first, which would break the test. Give the rows in an order that no cost
    decides, such as by prompt id.

    Args:
        prompt_costs: [n] float, none above `high`; values below `low` count as `low`.
        delta: in (0, 1).
        low, high: range of the cost; `high` must bound every cost of the policy.

    Returns:
        the bound, cost units, at most `high`.

    Raises:
        ValueError: a cost is not finite or above `high`, or low >= high.
    """
    costs = _checked(prompt_costs)
    if not low < high or costs.max() > high:
        raise ValueError(f"costs must not be above high = {high:g} (largest {costs.max():g}), low must be below it")
    order = np.random.default_rng(len(costs)).permutation(len(costs))
    values = ((high - np.maximum(costs, low)) / (high - low))[order]
    bets = _plug_in_bets(values, delta)
    rejected, kept = 0.0, 1.0  # the capital falls in μ, so the rejected means are an interval from 0
    for _ in range(REFINEMENTS):
        middle = (rejected + kept) / 2
        capital = np.cumsum(np.log1p(np.minimum(bets, LARGEST_BET / middle) * (values - middle)))
        if capital.max() >= -math.log(delta):
            rejected = middle
        else:
            kept = middle
    return float(high - (high - low) * rejected)


def _plug_in_bets(values: np.ndarray, delta: float) -> np.ndarray:
    """√(2 log(1/δ)/(n σ̂²_{t−1})) for each t: the bet that is best at n prompts of the variance seen so far."""
    count = np.arange(1, len(values) + 1)
    mean = (0.5 + np.cumsum(values)) / (count + 1)
    variance = (0.25 + np.cumsum((values - mean) ** 2)) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    return np.sqrt(-2 * math.log(delta) / (len(values) * before))


def expected_half_width(
    sd: float, prompts: int, delta: float, method: Method = "t", *, low: float = -10.0, high: float = 10.0
) -> float:
    """How far a certificate's upper bound is likely to lie above the mean, for planning.

    `t`: t_{1−δ,n−1}·sd/√n. `bounded`, with L = log(1/δ): the root of the squares of 0.87·√(2L)·sd/√n
    (the plug-in bets' rate; 0.87 is what the running maximum saves) and of 0.6·(high − low)·L/n (the
    price of not knowing the deviation); both factors are fitted to simulations, n = 20 to 5,000.

    Args:
        sd: deviation of the prompts' mean costs, cost units.
        prompts: n >= 2.
        delta, method, low, high: as in `certify`.
    """
    if method == "t":
        return float(stats.t.ppf(1 - delta, prompts - 1)) * sd / math.sqrt(prompts)
    nats = -math.log(delta)
    return math.hypot(0.87 * math.sqrt(2 * nats / prompts) * sd, 0.6 * (high - low) * nats / prompts)


def planned_margin(
    sd: float,
    prompts: int,
    delta: float,
    power: float,
    method: Method = "t",
    *,
    selection_error: float = 0.0,
    low: float = -10.0,
    high: float = 10.0,
) -> float:
    """How far below the limit to aim so that a policy found on target is certified with probability `power`.

    The expected half-width of the bound plus z_power·√(sd²/n + selection_error²): chance enters by the
    draw of the certificate's prompts and by how well the policy's mean cost was known when it was chosen.

    Args:
        sd: deviation of the prompts' mean costs, cost units (see `prompt_spread`).
        prompts: number of certificate prompts, >= 2.
        delta, method, low, high: as in `certify`.
        power: in (0, 1).
        selection_error: standard error of the mean cost that was measured when the policy was chosen,
            with all that should count as such (the error of the cost model's units).

    Returns:
        cost units; the training target is limit − margin.
    """
    chance = float(stats.norm.ppf(power)) * math.hypot(sd / math.sqrt(prompts), selection_error)
    return max(expected_half_width(sd, prompts, delta, method, low=low, high=high) + chance, 0.0)


def _checked(prompt_costs: np.ndarray) -> np.ndarray:
    costs = np.asarray(prompt_costs, dtype=np.float64)
    if costs.ndim != 1 or len(costs) == 0 or not np.isfinite(costs).all():
        raise ValueError(f"costs must be one finite number for each prompt, not of shape {costs.shape}")
    return costs

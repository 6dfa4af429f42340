"""Figures of merit of a policy, each with an interval that counts prompts and not responses.

The responses to one prompt share its difficulty, so they are one observation: every interval here is
clustered by prompt. Where prompts are near duplicates of each other their unit (`data.near_duplicates`) is the
observation, and its label is given in place of the prompt's. Pure functions of numpy float64 arrays, one row
a response.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2


def prompt_means(values: np.ndarray, prompt_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over each prompt's responses.

    Args:
        values: [N] or [N, m] float.
        prompt_ids: [N] labels.

    Returns:
        (prompts [n] sorted, means [n] or [n, m] in that order).

    Raises:
        ValueError: no rows, sizes disagree, or a value is not finite.
    """
    values, prompt_ids = np.asarray(values, dtype=np.float64), np.asarray(prompt_ids)
    if len(values) == 0 or len(values) != len(prompt_ids) or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} values for {len(prompt_ids)} rows, or one is not finite")
    prompts, rows, counts = np.unique(prompt_ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(prompts), *values.shape[1:]))
    np.add.at(sums, rows, values)
    return prompts, sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def cluster_mean(values: np.ndarray, prompt_ids: np.ndarray) -> Estimate:
    """The mean over prompts of each prompt's mean, with Student's interval on n − 1 degrees of freedom.

    Args:
        values: [N] float.
        prompt_ids: [N] labels; prompts count equally, however many responses they have.

    Returns:
        the estimate.

    Raises:
        ValueError: fewer than two prompts, which leave no interval.
    """
    means = prompt_means(values, prompt_ids)[1]
    if len(means) < 2:
        raise ValueError("an interval needs two prompts or more")
    mean = float(means.mean())
    half_width = _student(len(means) - 1) * float(means.std(ddof=1)) / math.sqrt(len(means))
    return Estimate(mean, mean - half_width, mean + half_width)


def cluster_share(flags: np.ndarray, prompt_ids: np.ndarray) -> Estimate:
    """A share in [0, 1] with Wilson's interval at the effective sample size of the clustered rows.

    The effective size is p(1 − p)/se², se clustered by prompt, and at most the number of rows; where
    all rows agree it is the number of prompts, so that 20 prompts without harm do not read as
    "100 %, surely".

    Args:
        flags: [N] bool, or a float share in [0, 1] a row (a tie is 0.5).
        prompt_ids: [N] labels.
    """
    means = prompt_means(flags, prompt_ids)[1]
    share, prompts = float(means.mean()), len(means)
    variance = float(means.var(ddof=1)) / prompts if prompts > 1 else 0.0
    size = float(prompts)
    if variance > 0:
        size = min(share * (1 - share) / variance, float(len(flags)))
    z2 = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) ** 2 / size
    centre = (share + z2 / 2) / (1 + z2)
    half_width = math.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return Estimate(share, max(centre - half_width, 0.0), min(centre + half_width, 1.0))


def safe_rate(costs: np.ndarray, prompt_ids: np.ndarray) -> Estimate:
    """Share of responses with every cost at or below 0, the calibrated border of safe. Args: costs [N, m]."""
    return cluster_share(np.all(np.asarray(costs) <= 0, axis=1), prompt_ids)


def win_rate(
    reward: np.ndarray,
    prompt_ids: np.ndarray,
    rival: np.ndarray,
    rival_ids: np.ndarray,
    units: Mapping[str, str] | None = None,
) -> Estimate:
    """Probability that a response has a larger reward than a rival policy's to the same prompt (tie: half).

    Every response is compared with every rival response of its prompt.

    Args:
        reward: [N] float; prompt_ids: [N].
        rival: [M] float; rival_ids: [M].
        units: of the prompts, which are the observations; each prompt is its own by default.

    Raises:
        ValueError: the two policies share no prompt.
    """
    reward, rival = np.asarray(reward, dtype=np.float64), np.asarray(rival, dtype=np.float64)
    shared = np.intersect1d(prompt_ids, rival_ids)
    if len(shared) == 0:
        raise ValueError("the two policies share no prompt")
    wins = []
    for prompt in shared:
        difference = reward[prompt_ids == prompt][:, None] - rival[rival_ids == prompt]
        wins.append(float((difference > 0).mean() + 0.5 * (difference == 0).mean()))
    return cluster_share(np.asarray(wins), shared if units is None else np.array([units[name] for name in shared]))


def kl_divergence(log_prob: np.ndarray, ref_log_prob: np.ndarray, prompt_ids: np.ndarray) -> Estimate:
    """KL(π‖π_ref) in nats: the mean of log π − log π_ref over the policy's own samples (temperature 1).

    Args:
        log_prob: [N] log π(y) of responses drawn from π.
        ref_log_prob: [N] log π_ref(y).
        prompt_ids: [N].
    """
    return cluster_mean(np.asarray(log_prob, dtype=np.float64) - np.asarray(ref_log_prob, dtype=np.float64), prompt_ids)


def paired_mean(policy_costs: np.ndarray, reference_costs: np.ndarray, reference_mean: float) -> Estimate:
    """A policy's mean cost over a population of prompts, from few of them and the reference as control variate.

    Most of the spread of prompts' mean costs is between prompts, and the reference has much the same
    spread on the same prompts. The regression estimator
    mean(z) + b (reference_mean − mean(x)), b = cov(z, x)/var(x), leaves only what the reference does
    not explain: its variance is that of the residuals. The reference's mean over the population is
    taken as known, so the interval is about the policy's mean cost *on that population of prompts*.
    Take the population without the certificate's prompts: a λ tuned to the very prompts of the test
    would not be tested by them. With splits stratified by the reference's cost the adjustment is
    small, and the gain is an interval that says so. Without spread in x, or with fewer than four
    prompts, it is the plain mean.

    Args:
        policy_costs: [n] float, z: each selection prompt's mean cost under the policy.
        reference_costs: [n] float, x: the same prompts' mean cost under the reference.
        reference_mean: mean cost of the reference over the population of prompts.

    Returns:
        the estimate, Student's interval on n − 2 degrees of freedom.

    Raises:
        ValueError: sizes disagree, a value is not finite, or there are fewer than two prompts.
    """
    z, x = np.asarray(policy_costs, dtype=np.float64), np.asarray(reference_costs, dtype=np.float64)
    if z.shape != x.shape or z.ndim != 1 or not np.isfinite([*z, *x, reference_mean]).all():
        raise ValueError(f"policy {z.shape} and reference {x.shape} costs must be one finite number for each prompt")
    spread = float(((x - x.mean()) ** 2).sum())
    if len(z) < 4 or spread <= 0:
        return cluster_mean(z, np.arange(len(z)))
    slope = float(((x - x.mean()) * z).sum()) / spread
    shift = reference_mean - float(x.mean())
    mean = float(z.mean()) + slope * shift
    residual = z - z.mean() - slope * (x - x.mean())
    variance = float((residual**2).sum()) / (len(z) - 2)
    half_width = _student(len(z) - 2) * math.sqrt(variance * (1 / len(z) + shift**2 / spread))
    return Estimate(mean, mean - half_width, mean + half_width)


def within_prompt_covariance(costs: np.ndarray, prompt_ids: np.ndarray) -> np.ndarray:
    """E_x[Cov_{y~π(·|x)}(c)], unbiased over prompts with two responses or more.

    Divided by β it is the Hessian of the dual. Pooling the responses of all prompts instead would
    add the covariance between prompts, which λ cannot move.

    Args:
        costs: [N, m] float.
        prompt_ids: [N] labels.

    Returns:
        [m, m] float64, cost units squared.

    Raises:
        ValueError: no prompt has two responses.
    """
    costs = np.asarray(costs, dtype=np.float64)
    means = prompt_means(costs, prompt_ids)[1]
    _, rows, counts = np.unique(prompt_ids, return_inverse=True, return_counts=True)
    if counts.max() < 2:
        raise ValueError("a covariance within prompts needs two responses or more of some prompt")
    weights = np.where(counts > 1, 1 / np.maximum(counts - 1, 1), 0.0)[rows]
    deviations = costs - means[rows]
    return np.einsum("n,ni,nj->ij", weights, deviations, deviations) / int((counts > 1).sum())


def _student(freedom: int) -> float:
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom))

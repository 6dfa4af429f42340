"""What a scorer's held-out labels say of it: its units, its accuracy, whether it may rank at random."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize, special, stats

from cdpo_core.evaluation.metrics import cluster_mean

CHANCE = 0.5
BINS = 10


def calibration(
    scores: np.ndarray, higher: np.ndarray, unsafe: np.ndarray, sharpness: float
) -> tuple[np.ndarray, np.ndarray]:
    """The affine map of each head's raw scores s to calibrated units, fitted to held-out labels.

    A cost: P(unsafe) = σ(sharpness·(a·s + b)), a logistic regression of the flags; with no flags of
    both kinds, the scale of its pairs and shift 0. A reward: P(better) = σ(sharpness·a·Δs) on the
    pairs, and b such that its mean over the held-out responses is 0. Labels count as Platt (1999)
    has them, a little less than certain, so that a scorer without a mistake gets a finite scale.

    Args:
        scores: [N, 2, heads] float64, raw.
        higher: [N, heads], which response the label says scores higher, -1 unknown.
        unsafe: [N, heads, 2], flags, -1 unknown.
        sharpness: log-odds of a label per calibrated unit.

    Returns:
        (a [heads], b [heads]) float64, a > 0; a is 1 where the labels give no positive scale.
    """
    scale, shift = np.ones(scores.shape[2]), np.zeros(scores.shape[2])
    for head in range(scores.shape[2]):
        flags, values = unsafe[:, head].reshape(-1), scores[:, :, head].reshape(-1)
        known = flags >= 0
        if set(flags[known]) == {0, 1}:
            design = np.stack([values[known], np.ones(known.sum())], axis=1)
            slope, intercept = _logistic(design, flags[known] == 1) / sharpness
            if slope > 0:
                scale[head], shift[head] = slope, intercept
            continue
        labelled = higher[:, head] >= 0
        if labelled.any():
            gaps = (scores[:, 1, head] - scores[:, 0, head])[labelled, None] * (2 * higher[labelled, head, None] - 1)
            slope = _logistic(gaps, np.ones(len(gaps), dtype=bool))[0] / sharpness
            scale[head] = slope if slope > 0 else 1.0
        if not known.any() and len(values):
            shift[head] = -scale[head] * values.mean()
    return scale, shift


def _logistic(design: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Coefficients of P(label) = σ(design · coefficients) by maximum likelihood of Platt's softened labels.

    Args:
        design: [N, k] float64.
        labels: [N] bool.
    """
    positives, negatives = labels.sum(), (~labels).sum()
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # Columns of unit size let one tolerance serve every scale of scores.
    size = np.sqrt((design**2).mean(0)).clip(1e-12)

    def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds = (design / size) @ coefficients
        value = np.logaddexp(0, log_odds) - target * log_odds
        gradient = (special.expit(log_odds) - target) @ (design / size)
        return float(value.mean()), gradient / len(labels)

    return optimize.minimize(loss, np.zeros(design.shape[1]), jac=True, method="BFGS", tol=1e-8).x / size


def scorer_report(
    scores: np.ndarray,
    higher: np.ndarray,
    unsafe: np.ndarray,
    prompt_ids: np.ndarray,
    sharpness: float,
    units: np.ndarray | None = None,
) -> dict[str, Any]:
    """A scorer's figures on held-out labels.

    Args:
        scores: [N, 2] float64, calibrated.
        higher: [N], which response the label says scores higher, -1 unknown.
        unsafe: [N, 2], flags, -1 unknown.
        prompt_ids: [N], the prompts.
        sharpness: log-odds of a label per calibrated unit.
        units: [N], the prompts' units (`data.near_duplicates`), which are the observations; the prompts by default.

    Returns:
        accuracy on the labelled pairs (ties count half) with its 95 % interval low .. high, null
        where there are too few; pairs, prompts, units; `warning`, "" if there is nothing to warn of; for a
        cost with flags also flag_accuracy, flag_auc, `calibration_error` and `reliability`: bins of
        predicted probability of unsafe, each {predicted, observed, count}.
    """
    labelled = higher >= 0
    gap = (scores[:, 1] - scores[:, 0])[labelled] * (2 * higher[labelled].astype(int) - 1)
    units = prompt_ids if units is None else units
    correct, clusters = (gap > 0) + 0.5 * (gap == 0), units[labelled]
    counts = {"prompts": len(set(prompt_ids[labelled])), "units": len(set(clusters))}
    report: dict[str, Any] = {"pairs": int(labelled.sum()), **counts}
    accuracy = low = high = None
    if report["units"] > 1:
        estimate = cluster_mean(correct, clusters)
        accuracy, low, high = estimate.mean, max(estimate.low, 0.0), min(estimate.high, 1.0)
    report |= {"accuracy": accuracy, "low": low, "high": high, "warning": _warning(accuracy, low, high)}
    known = unsafe.reshape(-1) >= 0
    if known.any():
        flags, ids = unsafe.reshape(-1)[known] == 1, np.repeat(units, 2)[known]
        report |= _flag_report(scores.reshape(-1)[known], flags, sharpness)
        report["calibration_error"] = calibration_error(scores.reshape(-1)[known], flags, ids, sharpness)
    return report


def calibration_error(scores: np.ndarray, unsafe: np.ndarray, prompt_ids: np.ndarray, sharpness: float) -> float:
    """Standard error of the calibrated shift, the prompts (or their units) being the observations (Huber's sandwich).

    Where costs have their zero is learned from the flags of the held-out prompts alone, so every mean
    cost is off by about this much, the same way for all policies.

    Args:
        scores: [N] float64, calibrated.
        unsafe: [N] bool.
        prompt_ids: [N], or the labels of their units.
        sharpness: log-odds of a flag per calibrated unit.

    Returns:
        calibrated units.
    """
    probability = special.expit(sharpness * scores)
    groups = np.unique(prompt_ids, return_inverse=True)[1]
    residuals = np.bincount(groups, weights=unsafe - probability)
    return float(np.sqrt((residuals**2).sum()) / max(sharpness * (probability * (1 - probability)).sum(), 1e-12))


def _warning(accuracy: float | None, low: float | None, high: float | None) -> str:
    if accuracy is None or low is None or high is None:
        return "too few held-out prompts carry this label to say whether it ranks better than chance"
    interval = f"held-out accuracy {accuracy:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    if high < CHANCE:
        return f"it ranks against its labels ({interval}): check the sign"
    return f"it may rank no better than chance ({interval})" if low <= CHANCE else ""


def _flag_report(scores: np.ndarray, unsafe: np.ndarray, sharpness: float) -> dict[str, Any]:
    probability = special.expit(sharpness * scores)
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    bins = [
        {"predicted": float(probability[inside].mean()), "observed": float(unsafe[inside].mean()), "count": len(inside)}
        for inside in (np.flatnonzero(place == number) for number in range(BINS))
        if len(inside)
    ]
    positives = int(unsafe.sum())
    auc = None
    if 0 < positives < len(unsafe):
        ranks = stats.rankdata(scores)[unsafe].sum()
        auc = float((ranks - positives * (positives + 1) / 2) / (positives * (len(unsafe) - positives)))
    accuracy = float(((scores > 0) == unsafe).mean())
    return {"flags": len(unsafe), "flag_accuracy": accuracy, "flag_auc": auc, "reliability": bins}

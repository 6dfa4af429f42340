"""Upper confidence bounds on a mean of independent costs: by betting, for every n, and Student's."""

from __future__ import annotations

import math

import numpy as np
from scipy import special, stats

# A bet may lose this share of the capital at the worst cost: all of it would end the test at one bad prompt.
LARGEST_LOSS = 0.95
# Prompts that the deviation foreseen before the test counts for beside those seen.
PRIOR_PROMPTS = 10
# Candidates for the bound in one refinement, and refinements: the bound is found to about 1e-6 of the costs' range.
CANDIDATES, REFINEMENTS = 64, 3
# A share of the distance to the range's upper end below which no deviation is believed.
LEAST_SD = 1e-3


def betting_passes(
    costs: np.ndarray, mean: np.ndarray | float, delta: float, high: np.ndarray | float, sd: np.ndarray | float
) -> np.ndarray:
    """Whether bets against "the costs' mean is `mean` or more" multiply their stake by 1/δ.

    The capital is W_t = Π (1 + b_i (mean − cost_i)), each bet b_i >= 0 chosen before cost_i is seen and at most
    LARGEST_LOSS/(high − mean), so that it stays positive: under the hypothesis a supermartingale, which reaches 1/δ
    with probability at most δ for every n and every distribution of costs that are at most `high` (Ville;
    Waudby-Smith & Ramdas, JRSS-B 2024, arXiv:2010.09686). The bets are the hedge of an option that pays 1/δ: with W
    the capital, k prompts left and a deviation σ, b = φ(q)/(δW σ√k), Φ(q) = δW. Recalculated from the capital at each
    step (STaR-Bets, arXiv:2505.22422), they lead to the power of the z-test as n grows.

    Args:
        costs: [..., n] float, each at most `high`, in an order that no cost decides.
        mean: [...] the mean tested, below `high`.
        delta: in (0, 1).
        high: [...] upper end of the costs' range.
        sd: [...] deviation of the costs, foreseen without them; it moves the power, not the level.

    Returns:
        [...] bool.
    """
    count = costs.shape[-1]
    shape = np.broadcast_shapes(costs.shape[:-1], np.shape(mean), np.shape(high), np.shape(sd))
    most = LARGEST_LOSS / (np.asarray(high, dtype=float) - mean)
    least = LEAST_SD * LARGEST_LOSS / most
    prior = PRIOR_PROMPTS * np.asarray(sd, dtype=float) ** 2
    capital, won = np.ones(shape), np.zeros(shape, dtype=bool)
    total, squares = np.zeros(costs.shape[:-1]), np.zeros(costs.shape[:-1])
    for seen in range(count):
        variance = (prior + np.maximum(squares - total**2 / max(seen, 1), 0.0)) / (PRIOR_PROMPTS + seen)
        deviation = np.maximum(np.sqrt(variance), least)
        share = np.clip(delta * capital, 1e-300, 1 - 1e-12)
        quantile = special.ndtri(share)
        density = np.exp(-(quantile**2) / 2) / math.sqrt(2 * math.pi)
        bet = np.minimum(density / (share * deviation * math.sqrt(count - seen)), most)
        cost = costs[..., seen]
        capital = np.where(won, capital, capital * (1 + bet * (mean - cost)))
        won |= capital >= (1 - 1e-12) / delta
        total, squares = total + cost, squares + cost**2
    return won


def betting_upper_bound(costs: np.ndarray, delta: float, high: float, sd: float, limit: float | None = None) -> float:
    """The least candidate mean that `betting_passes` rejects together with all larger ones: a 1 − δ upper bound.

    Args:
        costs: [n] float, none above `high`, in an order that no cost decides.
        delta: in (0, 1).
        high: upper end of the costs' range.
        sd: see `betting_passes`.
        limit: a mean that is among the candidates, so that the bound is at most it iff it is rejected with all above.

    Returns:
        cost units, between the costs' mean and `high`.

    Raises:
        ValueError: a cost is not finite or above `high`.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if not np.isfinite(costs).all() or costs.max() > high:
        raise ValueError(f"costs must be finite and not above high = {high:g} (largest {costs.max():g})")
    kept, bound = min(float(costs.mean()), high), high
    if kept == high:
        return high
    for step in range(REFINEMENTS):
        # Denser near the mean, where the bound of a good number of prompts lies.
        places = (np.arange(CANDIDATES) / CANDIDATES) ** (3 if step == 0 else 1)
        means = kept + (bound - kept) * places
        if step == 0 and limit is not None and kept < limit < high:
            means = np.sort(np.append(means, limit))
        refused = np.flatnonzero(~betting_passes(costs[None], means, delta, high, sd))
        last = int(refused[-1]) if len(refused) else -1
        bound = float(means[last + 1]) if last + 1 < len(means) else bound
        kept = float(means[last]) if last >= 0 else bound
    return bound


def student_upper_bound(costs: np.ndarray, delta: float) -> float:
    """mean + t·sd/√n with t = t_{1−δ} + max(γ, 0)(2 t_{1−δ}² + 1)/(6√n), γ the skewness of the costs.

    The second term is the first one of the Edgeworth expansion (Hall 1992, The Bootstrap and Edgeworth Expansion;
    Johnson 1978): where a few prompts cost much, a sample without them has a low mean and a small deviation at once.
    For costs that are skewed downwards Student's t errs on the safe side and stays.

    Args:
        costs: [n] float, n >= 2.
        delta: in (0, 0.5).
    """
    quantile, root = float(stats.t.ppf(1 - delta, len(costs) - 1)), math.sqrt(len(costs))
    quantile += max(skewness(costs), 0.0) * (2 * quantile**2 + 1) / (6 * root)
    return float(costs.mean()) + quantile * float(costs.std(ddof=1)) / root


def skewness(costs: np.ndarray) -> float:
    """Skewness γ of costs [n]; 0 without spread."""
    deviations = costs - costs.mean()
    spread = float((deviations**2).mean())
    return float((deviations**3).mean()) / spread**1.5 if spread > 0 else 0.0

"""The choice of policy: which round goes to the certificate."""

from __future__ import annotations

from dataclasses import dataclass

from cdpo_core.dual.certificate import Method, expected_half_width


@dataclass(frozen=True)
class Candidate:
    """A round's figures on the selection prompts.

    Attributes:
        reward: mean reward.
        cost: [m] mean costs.
        sd: [m] deviations of the prompts' mean costs.
        met: whether its costs are on target (`dual.ascent.meets_target`).
    """

    reward: float
    cost: tuple[float, ...]
    sd: tuple[float, ...]
    met: bool = False


def select_round(
    candidates: list[Candidate],
    limits: tuple[float, ...],
    prompts: int,
    delta: float,
    method: Method = "t",
    *,
    low: float = -10.0,
    high: float = 10.0,
) -> int:
    """The round whose policy goes to the certificate.

    The bound that the certificate would give is foreseen as selection mean + its half-width at the
    certificate's number of prompts. A round on target is what the margin was planned for, and goes
    first. Else, among the rounds whose bounds are all within the limits, the highest reward; if none
    is, the round whose largest excess over a limit is least. Ties go to the earlier round.

    Args:
        candidates: one a round; their costs may come from `paired_mean`.
        limits: [m].
        prompts: number of certificate prompts.
        delta, method, low, high: as in `certify`.

    Returns:
        index of the round.

    Raises:
        ValueError: no candidates, or sizes disagree.
    """
    if not candidates:
        raise ValueError("there is no round to choose from")
    met = [i for i, candidate in enumerate(candidates) if candidate.met]
    if met:
        return max(met, key=lambda i: candidates[i].reward)
    excesses = []
    for candidate in candidates:
        rows = zip(candidate.cost, candidate.sd, limits, strict=True)
        excesses.append(
            max(
                cost + expected_half_width(sd, prompts, delta, method, low=low, high=high) - limit
                for cost, sd, limit in rows
            )
        )
    within = [i for i, excess in enumerate(excesses) if excess <= 0]
    if within:
        return max(within, key=lambda i: candidates[i].reward)
    return min(range(len(candidates)), key=lambda i: excesses[i])

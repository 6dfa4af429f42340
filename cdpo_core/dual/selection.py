"""The choice of policy: which round goes to the certificate."""

from __future__ import annotations

from dataclasses import dataclass

from cdpo_core.dual.certificate import Foreseen


@dataclass(frozen=True)
class Candidate:
    """A round's figures on the selection prompts.

    Attributes:
        reward: mean reward.
        cost: [m] mean costs; they may come from `paired_mean`.
        foreseen: [m] what they promise of the certificate.
        met: whether its costs are on target (`dual.ascent.meets_target`).
    """

    reward: float
    cost: tuple[float, ...]
    foreseen: tuple[Foreseen, ...]
    met: bool = False

    @property
    def upper(self) -> tuple[float, ...]:
        """[m] the bounds that the certificate is likely to give."""
        return tuple(cost + item.half_width for cost, item in zip(self.cost, self.foreseen, strict=True))


def select_round(candidates: list[Candidate], limits: tuple[float, ...]) -> int:
    """The round whose policy goes to the certificate.

    A round on target is what the margin was planned for, and goes first. Else, among the rounds whose foreseen bounds
    are all within the limits, the highest reward; if none is, the round whose largest excess over a limit is least.
    Ties go to the earlier round.

    Args:
        candidates: one a round.
        limits: [m].

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
    excesses = [max(bound - limit for bound, limit in zip(item.upper, limits, strict=True)) for item in candidates]
    within = [i for i, excess in enumerate(excesses) if excess <= 0]
    if within:
        return max(within, key=lambda i: candidates[i].reward)
    return min(range(len(candidates)), key=lambda i: excesses[i])

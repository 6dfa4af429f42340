"""Whether the instrument of a certificate measures at all, asked before its figure is believed.

A certificate bounds what the cost model says of what was sampled. A cost model that gives every response one cost
passes any limit above that cost; one that ranks by chance, or whose zero is known worse than the distance it is to
show, says nothing of harm; and of responses that were all cut before their end it scores fragments. None of this shows
in the bound, so a policy is certified only if no check here fails. Pure functions of figures; none can pass a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cdpo_core.evaluation.cuts import MANY
from cdpo_core.evaluation.metrics import Estimate

CHANCE = 0.5
# Calibrated units (or a ready model's own): what is below it is rounding.
LEAST_SPREAD = 1e-5
# More than every second response without an end, as surely as an interval says: what was certified are fragments.
MOST_UNFINISHED = 0.5
# An interval of 95 % in standard errors.
ERRORS = 1.96


@dataclass(frozen=True)
class Failure:
    """An instrument that does not measure.

    Attributes:
        cost: the constraint whose certificate it takes away; "" for all.
        check: `spread`, `chance`, `units` or `unfinished`.
        what: what is wrong, with its figures, as the end of a sentence.
        fix: what to do.
        figures: the figures by name.
    """

    cost: str
    check: str
    what: str
    fix: str
    figures: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As the result lists it."""
        return asdict(self)

    def concerns(self, cost: str) -> bool:
        """Whether it takes away this constraint's certificate."""
        return self.cost in ("", cost)


def failed_spread(name: str, spread: float | None) -> Failure | None:
    """A cost model must tell responses to the same prompt apart.

    Args:
        name: the constraint's.
        spread: deviation of the costs of different responses within prompts (`Measured.spread`); None where no prompt
            has two different ones, which leaves nothing to ask.
    """
    if spread is None or spread > LEAST_SPREAD:
        return None
    return Failure(
        name,
        "spread",
        f"the {name} model gives all responses to a prompt the same cost",
        "look at what it learned from: whether its labels differ, and whether policy.max_prompt_tokens and "
        "policy.max_response_tokens leave the responses' differences in",
        {"spread": spread},
    )


def failed_chance(name: str, report: Mapping[str, Any]) -> Failure | None:
    """A cost model must rank held-out pairs better than chance, by its interval.

    Where fewer than two held-out prompts carry the label there is no interval and nothing fails (`unchecked` says so).

    Args:
        name: the constraint's.
        report: of the scorer (`calibration.scorer_report`), {} for the truth.
    """
    accuracy, low = report.get("accuracy"), report.get("low")
    if accuracy is None or low is None or low > CHANCE:
        return None
    how = "against its labels" if report["high"] < CHANCE else "no better than chance, as far as can be told"
    return Failure(
        name,
        "chance",
        f"the {name} model ranks {how}: accuracy {accuracy:.3f} [{low:.3f}, {report['high']:.3f}] on "
        f"{report['pairs']} held-out pairs of {report['prompts']} prompts",
        "give it more or cleaner labels, a larger data.held_out, or a better base; a ready model may need sign: safe",
        {"accuracy": accuracy, "low": low, "high": report["high"]},
    )


def failed_units(
    name: str, report: Mapping[str, Any], limit: float, upper: float, others: Sequence[float]
) -> Failure | None:
    """Where a cost has its zero must be known better than the distance that the certificate shows.

    That distance is from the bound up to the limit, or up to the policies that were made without the limit, whichever
    is farther: what the certificate tells apart from a policy that breaks the limit. The error of the zero
    (`calibration.calibration_error`) shifts all costs alike. Where its 95 % interval is wider than that distance, the
    labels allow a zero at which the certified policy breaks the limit by as much as all that was gained on it. A bound
    above the limit certifies nothing, and nothing is asked of it.

    Args:
        name: the constraint's.
        report: of the scorer; without `calibration_error` (the truth, or a ready model without labels) nothing fails.
        limit: on the mean cost.
        upper: the certificate's bound.
        others: mean costs of policies made without the limit (the reference, λ = 0).
    """
    error = report.get("calibration_error")
    if error is None or upper > limit:
        return None
    half_width, distance = ERRORS * error, max([limit, *others]) - upper
    if half_width <= distance:
        return None
    return Failure(
        name,
        "units",
        f"where the {name} model's cost is 0 is known to ± {half_width:.2f} only, and the bound lies {distance:.2f} "
        "below the limit or what was made without it",
        "label more held-out pairs: a larger data.held_out, a larger data.splits.preferences, or more data",
        {"half_width": half_width, "distance": distance},
    )


def failed_ends(unfinished: Estimate | None, longest: int) -> Failure | None:
    """Most responses must end by themselves: else the costs are those of fragments.

    Args:
        unfinished: share of the certified responses that were cut, with its interval; None where it is not known.
        longest: the length they were cut at, tokens.
    """
    if unfinished is None or unfinished.low <= MOST_UNFINISHED:
        return None
    return Failure(
        "",
        "unfinished",
        f"{100 * unfinished.mean:.0f} % of the responses never end: they were cut at {longest} tokens, and what was "
        "measured are fragments",
        "raise policy.max_response_tokens, and see that the model ends its turns with a token that its "
        "generation_config names (eos_token_id)",
        {"unfinished": unfinished.mean, "low": unfinished.low, "high": unfinished.high},
    )


def unchecked(name: str, report: Mapping[str, Any]) -> list[str]:
    """What could not be asked of a learned or ready cost model, in words.

    Args:
        name: the constraint's.
        report: of the scorer; empty for the truth, of which there is nothing to ask.
    """
    if not report:
        return []
    missing = []
    if report.get("accuracy") is None:
        missing.append("ranks better than chance")
    if report.get("calibration_error") is None:
        missing.append("has its zero at the border of safe")
    if not missing:
        return []
    return [f"{name}: not checked whether its model {' and '.join(missing)}: too few held-out prompts carry its labels"]


def same_tokens_warning(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for the preference pairs that a scorer could not tell apart (`preference.tell_apart`).

    Args:
        reports: of the scorers, by name.
    """
    counts = {(report.get("same_tokens") or 0, report.get("all_pairs")): name for name, report in reports.items()}
    return [
        f"{same} of {pairs} pairs are the same tokens to the {name} model once they are cut, and were set aside: "
        "raise policy.max_response_tokens"
        for (same, pairs), name in counts.items()
        if same
    ]


def unfinished_warning(label: str, unfinished: Estimate | None) -> list[str]:
    """A line where more than 5 % of a measurement's responses were cut.

    Args:
        label: whose responses: `the reference`.
        unfinished: the share, or None where it is not known.
    """
    if unfinished is None or unfinished.mean <= MANY:
        return []
    return [
        f"{100 * unfinished.mean:.0f} % of {label}'s responses were cut before they ended: their rewards and costs are "
        "those of fragments; raise policy.max_response_tokens"
    ]


def words(failures: Sequence[Mapping[str, Any]]) -> str:
    """What failed, in one line; "" without failures."""
    return "; ".join(item["what"] for item in failures)

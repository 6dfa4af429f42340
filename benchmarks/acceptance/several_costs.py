"""Two costs at once, harm and dishonesty: both limits binding, and the second one slack."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from acceptance.lab import Lab, Ran
from acceptance.row import Row

PRESET = "testbed_two_costs"
SEEDS = range(10)
# Of all seeds, those in which every true cost must be within its limit; and what the slack limit is.
SHARE, SLACK_LIMIT = 0.9, 1.5
MOST_FLIPS = 2
Scorers = Literal["oracle", "learned"]


def run(lab: Lab, seed: int, scorers: Scorers, *, slack: bool) -> Ran:
    """The preset as seed `seed` draws it; the runs of one seed share what they can."""
    arguments = ["run", PRESET, "--seed", str(seed), "--testbed.seed", str(seed), "--testbed.scorers", scorers]
    arguments += ["--constraints.1.limit", str(SLACK_LIMIT)] if slack else []
    name = f"two-costs-{scorers}-{'slack' if slack else 'binding'}-{seed}"
    return lab.run(name, arguments, f"two-costs-{seed}")


def two_costs(lab: Lab) -> Row:
    """Row 17: the truth as scorers."""
    return several_costs(lab)


def several_costs(lab: Lab, number: int = 17, seeds: Sequence[int] = SEEDS, scorers: Scorers = "oracle") -> Row:
    """Two costs: both limits kept and certified; the slack one has λ = 0."""
    binding = [run(lab, seed, scorers, slack=False) for seed in seeds]
    slack = [run(lab, seed, scorers, slack=True) for seed in seeds]
    kept = [sum(map(_keeps, runs)) for runs in (binding, slack)]
    certified = [sum(ran.result.get("status") == "certified" for ran in runs) for runs in (binding, slack)]
    zero = sum(_lambdas(ran)[1:] == [0.0] for ran in slack)
    bind = sum(min(_lambdas(ran), default=0.0) > 0 for ran in binding)
    flips = max(map(_flips, [*binding, *slack]))
    rounds = [[len(ran.result.get("rounds") or []) for ran in runs] for runs in (binding, slack)]
    shares = [_captured(ran, scorers) for ran in binding]
    return Row(
        number,
        f"two costs, {scorers} scorers, seeds {seeds[0]}–{seeds[-1]}; both limits −0.5, and the second {SLACK_LIMIT:g}",
        f"both true costs ≤ limits in {kept[0]} of {len(seeds)} (slack: {kept[1]}); certified {certified[0]} "
        f"(slack: {certified[1]}); both λ > 0 in {bind}; the slack λ = 0 in {zero}; rounds {_list(rounds[0])} (slack: "
        f"{_list(rounds[1])}), sign flips ≤ {flips}; captured / ceiling median {median(shares):.3f}; true costs "
        + "; ".join(_costs(ran) for ran in binding),
        f"≥ {SHARE * len(seeds):g} of {len(seeds)}, the slack λ = 0 in all; sign flips ≤ {MOST_FLIPS}",
        min(kept) >= SHARE * len(seeds) and zero == len(seeds) and flips <= MOST_FLIPS,
    )


def _constraints(ran: Ran) -> list[dict[str, Any]]:
    return ran.result.get("constraints") or []


def _keeps(ran: Ran) -> bool:
    costs = [(item.get("true_cost"), item["limit"]) for item in _constraints(ran)]
    return len(costs) == 2 and all(cost is not None and cost <= limit for cost, limit in costs)


def _lambdas(ran: Ran) -> list[float]:
    return [float(item["lambda"]) for item in _constraints(ran) if item.get("lambda") is not None]


def _flips(ran: Ran) -> int:
    """Sign changes of cost − target from round to round, of the cost with most of them."""
    rounds = ran.result.get("rounds") or []
    counts = [0]
    for index, item in enumerate(_constraints(ran)):
        signs = [done["cost"][index] > item["target"] for done in rounds]
        counts.append(sum(a != b for a, b in pairwise(signs)))
    return max(counts)


def _captured(ran: Ran, scorers: Scorers) -> float:
    """`captured` as a share of what a certified policy can reach, with learned scorers of what these can."""
    oracle = ran.result.get("oracle") or {}
    ceilings = [oracle.get("captured_ceiling"), oracle.get("scorer_ceiling") if scorers == "learned" else 1.0]
    known = [ceiling for ceiling in ceilings if ceiling is not None]
    captured = oracle.get("captured")
    return float(captured) / min(known) if captured is not None and len(known) == 2 else 0.0


def _costs(ran: Ran) -> str:
    costs = [item.get("true_cost") for item in _constraints(ran)]
    return ", ".join("none" if cost is None else f"{cost:.3f}" for cost in costs)


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

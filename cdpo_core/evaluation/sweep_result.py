"""What a sweep's record says, from its children's result records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def frontier_points(children: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point a child: its limit and settings, lambda, test reward and cost, certificate, the truth if known."""
    return [
        {
            "name": child["name"],
            "settings": child["settings"],
            "limit": child["limit"],
            "status": child["status"],
            "certified": child["status"] == "certified",
            "lambda": child["lambda"],
            "reward": (child["test"] or {}).get("reward"),
            "cost": (child["test"] or {}).get("cost"),
            "certificate": child["certificate"]
            and {key: child["certificate"][key] for key in ("mean", "upper", "passed")},
            "true_reward": child["oracle"].get("true_reward"),
            "true_cost": child["oracle"].get("true_cost"),
            "captured": child["oracle"].get("captured"),
        }
        for child in children
    ]


def exact_frontier(children: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[cost, reward] of the exact optimum along the limits on the testbed, from tight to loose; [] elsewhere.

    Of the first child; another combination of settings may have another (`dpo.beta` moves it).
    """
    known = [child["oracle"]["frontier"] for child in children if child["oracle"].get("frontier")]
    return sorted([point["cost"], point["reward"]] for point in known[0]) if known else []


def line_name(settings: Mapping[str, Any]) -> str:
    """What a figure and a table call the children of one combination; "" when nothing varies."""
    return ", ".join(f"{path.split('.')[-1]} {value}" for path, value in settings.items())


def choice_words(result: Mapping[str, Any]) -> str:
    """Which policy was chosen, in a sentence."""
    chosen = result["chosen"]
    if not chosen:
        return "No policy is certified when the error probability is split over all of the sweep"
    settings = line_name(chosen["settings"])
    of = f"limit {chosen['limit']:g}" + (f" ({settings})" if settings else "")
    return f"Chosen: the policy of {of}, certified for the choice among all of the sweep"

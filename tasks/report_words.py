"""What a result means, in plain words: for the report, the run's description in MLflow and the registered model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdpo_core.evaluation.decoding import decoding_words
from cdpo_core.evaluation.instrument import words
from cdpo_core.evaluation.result import confidence, cost_figures, lowest_reached, spending_in_words, tested_on

Record = Mapping[str, Any]

HEADLINES = {"certified": "Certified", "not_certified": "Not certified", "infeasible": "Out of reach"}
STATES = {"certified": "certified", "not_certified": "not certified", "infeasible": "out of reach"}


def limits_text(result: Record) -> str:
    """The limits in one line: `harm ≤ −0.5`."""
    return ", ".join(f"{item['name']} ≤ {signed(item['limit'], 'g')}" for item in result["constraints"])


def headline(result: Record) -> str:
    """The verdict in two or three words and the limits."""
    return f"{HEADLINES[result['status']]}: {limits_text(result)}"


def explained(result: Record) -> list[str]:
    """The outcome in two or three sentences that need no knowledge of the method."""
    return [_outcome(result), *_bought(result)]


def meanings(result: Record) -> list[str]:
    """What the verdict says."""
    certificate = result["certificate"]
    if certificate is None:
        return [
            "No policy was tested, because none of those tried comes near the limit.",
            lowest_reached(result).replace("-", "−"),
        ]
    delta = f"{100 * certificate['delta']:.3g} %"
    tested = f"The policy was tested on {tested_on(certificate)} that no training and no choice has seen."
    spending = list(filter(None, [spending_in_words(certificate)]))
    if failed := result.get("instrument"):
        return [
            "The test's figures say nothing of the policy, good or bad, because an instrument does not measure.",
            *(f"What to do: {item['fix']}." for item in failed),
        ]
    if result["status"] == "certified":
        return [
            tested,
            "Over prompts like these, the mean cost that the cost model gives it is at or below the bound, which is at "
            f"or below the limit. A policy that breaks the limit passes this test with probability at most {delta}.",
            *spending,
        ]
    return [
        tested,
        "The test could not show that the limit is kept. That is no proof that it is broken: where the mean is below "
        "the limit, more held-out prompts may be enough.",
        *spending,
    ]


def limits_of_meaning(result: Record) -> list[str]:
    """What the verdict does not say."""
    certificate = result["certificate"] or {}
    spent, decoding = certificate.get("spent") or 0, certificate.get("decoding")
    lines = [
        "That the cost model is right: the figures are its own, and its errors are shown below.",
        "Anything about one answer: a mean below the limit leaves room for single bad ones.",
        "Anything about other kinds of prompts than the held-out ones, or about people who try to break the policy.",
    ]
    if decoding:
        lines.append(
            f"Anything about other decoding than the one that was tested: {decoding_words(decoding)}. Another "
            "temperature or length is another policy."
        )
    if certificate and certificate.get("spending") != "squares":
        used = f"these held-out prompts had been used for {spent} tests when this was written. " if spent > 1 else ""
        lines.append(f"The same after many tries: {used}δ counts this test alone.")
    elif certificate.get("uses", 1) > 1:
        lines.append("Anything about a policy that somebody made by the figures of an earlier test on these prompts.")
    return lines


def percent(value: Any) -> str:
    """A share in percent; a dash without one."""
    mean = value.get("mean") if isinstance(value, Mapping) else value
    return "–" if mean is None else f"{100 * mean:.0f} %"


def signed(value: Any, spec: str = ".2f") -> str:
    """A number with a true minus sign, several for several constraints; a dash without one."""
    if isinstance(value, (list, tuple)):
        return ", ".join(signed(item, spec) for item in value)
    return "–" if value is None else format(float(value), spec).replace("-", "−")


def interval(figure: Any) -> str:
    """A mean with its 95 % interval; a dash without one."""
    if figure is None:
        return "–"
    return f"{signed(figure['mean'])} [{signed(figure['low'])}, {signed(figure['high'])}]"


def _outcome(result: Record) -> str:
    certificate, names = result["certificate"], [item["name"] for item in result["constraints"]]
    what = " and ".join(names)
    if result["status"] == "infeasible":
        return f"No policy that keeps {limits_text(result)} was found."
    bounds = [item["certificate"]["upper"] for item in result["constraints"]]
    allowed = [item["limit"] for item in result["constraints"]]
    sure = f"with {confidence(certificate['delta'])} confidence"
    if failed := result.get("instrument"):
        return (
            f"Whether {limits_text(result)} is kept could not be measured: {words(failed)}. Do not use the policy "
            "where the limit must hold."
        )
    if result["status"] == "certified":
        return (
            f"On {tested_on(certificate)} the policy's mean {what}, as the cost model measures it, is "
            f"at most {signed(bounds, '.3f')} {sure}; {signed(allowed, 'g')} was allowed."
        )
    means = [item["certificate"]["mean"] for item in result["constraints"]]
    return (
        f"The best policy found has a mean {what} of {signed(means, '.3f')} on {tested_on(certificate)}, "
        f"and {sure} it is at most {signed(bounds, '.3f')}; {signed(allowed, 'g')} was allowed. Do not "
        "use it where the limit must hold."
    )


def _bought(result: Record) -> list[str]:
    """What the policy earns beside the reference and DPO."""
    test = result["test"]
    if not test:
        return []
    rows = {"it": test, **result["baselines"]}
    costs = cost_figures(result).values()

    def figures(row: Record) -> str:
        return f"reward {signed(row['reward']['mean'])} at cost {signed([row[key]['mean'] for key in costs])}"

    others = "; ".join(f"{name}: {figures(row)}" for name, row in rows.items() if name != "it")
    return [f"On test prompts it earns {figures(rows['it'])} ({others})."]

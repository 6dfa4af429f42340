"""The result record of an experiment: one plain object that the command line, MLflow and files share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cdpo_core.evaluation.instrument import words

FIGURES = ("reward", "cost", "safe_rate", "kl", "win_rate")
# What the testbed's exact judge says of each constraint; its record holds the list of them under the plural.
ORACLE_FIGURES = ("true_cost", "optimal_cost", "optimal_lambda")


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome in one sentence, with its figures and what they are about."""
    limits = ", ".join(f"{item['name']} ≤ {item['limit']:g}" for item in result["constraints"])
    if result["status"] == "infeasible":
        return f"Infeasible: {limits} is out of reach. {lowest_reached(result)}"
    bounds = ", ".join(f"{item['name']} ≤ {item['certificate']['upper']:.3f}" for item in result["constraints"])
    certificate = result["certificate"]
    basis = f"with {confidence(certificate['delta'])} confidence, from {tested_on(certificate)}"
    basis += spending_in_short(certificate)
    if decoding := certificate.get("decoding"):
        basis += f", with responses at temperature {decoding['temperature']:g} of at most "
        basis += f"{decoding['max_new_tokens']} tokens"
    if failed := result.get("instrument"):
        return f"Not certified: {limits} could not be measured: {words(failed)}. The bound is {bounds} {basis}."
    notes = "".join(f" Note on {name}: {text}." for name, text in certificate_notes(result))
    if result["status"] == "certified":
        return f"Certified: {limits}. The mean cost, as the cost model measures it, is {bounds} {basis}.{notes}"
    return f"Not certified: {limits} could not be shown; the bound is {bounds} {basis}.{notes}"


def certificate_notes(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know of single certificates (a test that is not offered, a limit that rules nothing out)."""
    found = [(item["name"], (item["certificate"] or {}).get("note") or "") for item in result["constraints"]]
    return [(name, text) for name, text in found if text]


def lowest_reached(result: Mapping[str, Any]) -> str:
    """Of an infeasible result: the lowest cost reached and by what, and the tightest limit that would likely pass."""
    reached = result["reachable"].get("constraints")
    if not reached:
        return f"The lowest mean cost known here is {result['reachable']['floor']:.3f}."
    lowest = ", ".join(f"{item['name']} {item['lowest']:.3f} ({item['lowest_by']})" for item in reached)
    tightest = ", ".join(f"{item['name']} ≤ {item['certifiable']:.2f}" for item in reached)
    return (
        f"The lowest mean cost reached is {lowest}; the tightest limit that would likely be certified here is "
        f"{tightest}{', each by itself' if len(reached) > 1 else ''}."
    )


def reach_records(
    names: Sequence[str],
    margins: Sequence[float],
    rounds: Sequence[Mapping[str, Any]],
    predicted: Sequence[float],
    predicted_by: str,
) -> list[dict[str, Any]]:
    """For each cost how low it came, and what limit a policy there would be likely to be certified at.

    Args:
        names: of the constraints [m].
        margins: [m] distance from a limit at which training aims, planned for a policy there to pass.
        rounds: their records; a measured policy goes before a predicted one.
        predicted: [m] the lowest mean costs that are predicted, where there is no round.
        predicted_by: what predicts them.

    Returns:
        {name, lowest, lowest_by, certifiable} each; `certifiable` is `lowest` and the margin, rounded up.
    """
    records = []
    for index, (name, margin) in enumerate(zip(names, margins, strict=True)):
        lowest, by = float(predicted[index]), predicted_by
        if rounds:
            best = min(rounds, key=lambda item: each(item["cost"])[index])
            lambdas = ", ".join(f"{value:g}" for value in each(best["lambda"]))
            lowest, by = float(each(best["cost"])[index]), f"round {best['round']}, λ = {lambdas}"
        tightest = math.ceil(100 * (lowest + margin)) / 100
        records.append({"name": name, "lowest": lowest, "lowest_by": by, "certifiable": tightest})
    return records


def confidence(delta: float) -> str:
    """1 − δ in percent, never rounded up: `95 %`, `96.9 %`, `99.98 %`."""
    digits = max(0, math.ceil(-math.log10(100 * delta))) + 1
    # A hair more than is lost in 1 − δ, so that 95 stays 95.
    percent = math.floor((100 * (1 - delta) + 1e-9) * 10**digits) / 10**digits
    return f"{percent:.{digits}f}".rstrip("0").rstrip(".") + " %"


def spending_in_short(certificate: Mapping[str, Any]) -> str:
    """What the certificate's confidence is about when its prompts serve more than one test; for the verdict."""
    spent = certificate.get("spent") or 0
    times = f", which have been tested on {spent} times" if spent > 1 else ""
    if certificate.get("spending") == "squares":
        share = f"δ = {certificate['delta']:.3g} is this test's share of {certificate['asked_delta']:g}"
        return f"{times} ({share}; use {certificate['uses']} of them{_divided(certificate)})"
    if certificate.get("spending") == "none":
        return f"{times} (certificate.spending is none: δ holds for this test alone)"
    return times


def spending_in_words(certificate: Mapping[str, Any]) -> str:
    """How δ was spent over all the tests on these prompts; "" for a record from before it was."""
    if "spending" not in certificate:
        return ""
    asked, uses = certificate["asked_delta"], certificate["uses"]
    if certificate["spending"] == "none":
        return (
            f"δ = {asked:g} was spent on this test alone (certificate.spending is none), "
            "whatever else is tested on these prompts."
        )
    return (
        f"δ = {asked:g} was asked for all tests ever made on these held-out prompts together. "
        f"This is use {uses} of them{_divided(certificate)}, and its share is δ = {certificate['delta']:.3g}."
    )


def _divided(certificate: Mapping[str, Any]) -> str:
    tests = certificate["family_tests"]
    return f", divided among {tests} tests" if tests > 1 else ""


def tested_on(certificate: Mapping[str, Any]) -> str:
    """On how many prompts a test rests, and how many units they are where near duplicates count once."""
    prompts, units = certificate["prompts"], certificate.get("units", certificate["prompts"])
    told = f"{prompts} held-out prompts"
    return told if units == prompts else f"{told} ({units} units: near duplicates and groups count once)"


def round_record(number: int, lambda_: Sequence[float], figures: Mapping[str, Any]) -> dict[str, Any]:
    """One round of training as the result lists it.

    `lambda`, `cost`, `cost_half_width` and `cost_upper` are one number, or with several constraints one for each.

    Args:
        number: from 1.
        lambda_: [m] the dual variables it was trained at.
        figures: cost [m], cost_half_width [m] (of its 95 % interval), cost_upper [m], reward, kl, safe_rate, seconds;
            unfinished, where it is known.
    """
    vectors = {"lambda": lambda_, **{name: figures[name] for name in ("cost", "cost_half_width", "cost_upper")}}
    scalars = {name: float(figures[name]) for name in ("reward", "kl", "safe_rate", "seconds")}
    unfinished = figures.get("unfinished")
    if unfinished is not None:
        scalars["unfinished"] = float(unfinished)
    return {"round": number, **{name: _single(values) for name, values in vectors.items()}, **scalars}


def constraint_records(
    names: Sequence[str],
    limits: Sequence[float],
    targets: Sequence[float],
    lambda_: Sequence[float | None],
    costs: Sequence[float | None],
    certificates: Sequence[Mapping[str, Any] | None],
    oracle: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The result's `constraints`: one {name, limit, target, lambda, cost, certificate} each.

    The target is what training aimed at, the limit less the planned margin. With an `oracle` record, also the truth:
    true_cost, and the exact optimum's optimal_cost and optimal_lambda.
    """
    rows = zip(names, limits, targets, lambda_, costs, certificates, strict=True)
    records = [
        {"name": name, "limit": limit, "target": target, "lambda": value, "cost": cost, "certificate": certificate}
        for name, limit, target, value, cost, certificate in rows
    ]
    if oracle:
        for index, record in enumerate(records):
            values = {name: oracle.get(f"{name}s") for name in ORACLE_FIGURES}
            record |= {name: value[index] if value else None for name, value in values.items()}
    return records


def cost_figures(result: Mapping[str, Any]) -> dict[str, str]:
    """By heading, the key of each constraint's cost among the test figures: `cost`, and `cost_<name>` from the second.

    With one constraint its heading is "cost", with several their names.
    """
    names = [item["name"] for item in result["constraints"]]
    if len(names) == 1:
        return {"cost": "cost"}
    return {name: f"cost_{name}" if index else "cost" for index, name in enumerate(names)}


def mean_figures(result: Mapping[str, Any]) -> dict[str, str]:
    """Means: headings, and the names of the figures that the result's methods have under them."""
    heads = {"reward": "reward", **cost_figures(result), "safe rate": "safe_rate", "KL": "kl"}
    is_known = "unfinished" in result["baselines"]["reference"]
    return heads | ({"unfinished": "unfinished"} if is_known else {})


def tail_figures(result: Mapping[str, Any]) -> dict[str, str]:
    """Beyond the mean: headings, and the names of the figures that the result's methods have under them."""
    heads = {
        "worst 10 %": "cvar",
        "unsafe prompts": "unsafe_prompts",
        "over-refusal": "over_refusal",
        "reward where safe": "reward_where_safe",
    }
    kinds = [name for name in result["baselines"]["reference"] if name.startswith("cost/")]
    return heads | {name.replace("/", " "): name for name in kinds}


def each(value: Any) -> list[float]:
    """A round's `lambda` or cost as a list [m], whether it is one number or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _single(values: Sequence[float]) -> Any:
    return float(values[0]) if len(values) == 1 else [float(value) for value in values]

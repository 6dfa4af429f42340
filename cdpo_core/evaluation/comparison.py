"""The comparison's table: methods side by side at each limit, over seeds, with intervals and what each cost.

A record is one method at one limit with one seed. Where the truth is known (testbed) reward and cost are the true ones,
else those that the scorers give on the test prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdpo_core.evaluation.metrics import cluster_mean

FIGURES = ("reward", "objective", "cost", "kl", "captured", "support_mass", "rounds")
COMPUTE = ("updates", "generated_tokens", "cpu_seconds", "tuning_cpu_seconds")
Figures = Mapping[str, float | None]


def figures_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """A record's figures by the names of `FIGURES`; None where there is none.

    `objective` is E[r] − β KL(π‖π_ref), what every method is to make large: reward alone can be bought with KL.
    """
    oracle, test = record.get("oracle") or {}, record.get("test") or {}
    measured = {name: (test.get(name) or {}).get("mean") for name in ("reward", "cost", "kl")}
    true = {name: oracle.get(f"true_{name}") for name in ("reward", "cost", "kl")}
    known = {name: measured[name] if true[name] is None else true[name] for name in measured}
    is_whole = known["reward"] is not None and known["kl"] is not None
    return {
        **known,
        "objective": known["reward"] - record["beta"] * known["kl"] if is_whole else None,
        "captured": oracle.get("captured"),
        "support_mass": oracle.get("support_mass"),
        "rounds": record.get("rounds"),
    }


def levels_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What a record's world alone makes of its figures: the exact optimum's at the limit, and the limit itself of cost.

    Worlds differ by more than methods do. An interval over worlds that is to compare methods leaves this out.
    """
    oracle = record.get("oracle") or {}
    reward, kl = oracle.get("optimal_reward"), oracle.get("optimal_kl")
    levels = {"cost": record["limit"]}
    if reward is not None and kl is not None:
        levels |= {"reward": reward, "kl": kl, "objective": reward - record["beta"] * kl}
    return levels


def comparison_table(records: Sequence[Mapping[str, Any]], ours: str) -> list[dict[str, Any]]:
    """One row for each limit and method, in the order in which they first come up.

    Args:
        records: {method, title, limit_name, limit, seed, beta, rounds, test, oracle, compute}.
        ours: the method the others' reward is set against.

    Returns:
        rows {limit_name, limit (mean over seeds), method, title, seeds, kept (seeds whose cost is within the limit),
        compute {..: mean}, ahead, ahead_objective, and of each figure {mean, low, high} or None}. `ahead` is the mean
        over seeds of our reward minus the method's, on the same worlds, with its interval: above 0 we are ahead;
        `ahead_objective` is the same of the objective. The interval of reward, objective, cost and KL is that of the
        distance to the exact optimum of the same world (cost: to the limit), where it is known: `levels_of`.
    """
    rows = []
    for limit_name in dict.fromkeys(record["limit_name"] for record in records):
        here = [record for record in records if record["limit_name"] == limit_name]
        best = {record["seed"]: figures_of(record) for record in here if record["method"] == ours}
        for method in dict.fromkeys(record["method"] for record in here):
            mine = [record for record in here if record["method"] == method]
            rows.append(_row(mine, best if method != ours else {}))
    return rows


def over_seeds(
    values: Sequence[float | None],
    fallback: Mapping[str, float] | None = None,
    levels: Sequence[float | None] | None = None,
) -> dict[str, float] | None:
    """Mean with Student's 95 % interval over seeds; with one seed `fallback`'s interval, if any, moved to the mean.

    With `levels`, all known, the interval is that of the values less their levels, moved to the mean of the values.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) == 0:
        return None
    mean = float(known.mean())
    if len(known) == 1:
        half = (fallback["high"] - fallback["low"]) / 2 if fallback else 0.0
        return {"mean": mean, "low": mean - half, "high": mean + half}
    is_levelled = levels is not None and None not in levels and len(levels) == len(known)
    level = np.array(levels, dtype=np.float64) if is_levelled else np.zeros(len(known))
    estimate, shift = cluster_mean(known - level, np.arange(len(known))), float(level.mean())
    return {"mean": mean, "low": estimate.low + shift, "high": estimate.high + shift}


def _row(records: Sequence[Mapping[str, Any]], ours: Mapping[int, Figures]) -> dict[str, Any]:
    figures = [figures_of(record) for record in records]
    test = records[0].get("test") or {}
    pairs = list(zip(figures, records, strict=True))
    kept = [item["cost"] is not None and item["cost"] <= record["limit"] for item, record in pairs]
    levels = [levels_of(record) for record in records]
    spent = [record["compute"] for record in records]
    return {
        "limit_name": records[0]["limit_name"],
        "limit": float(np.mean([record["limit"] for record in records])),
        "method": records[0]["method"],
        "title": records[0]["title"],
        "seeds": len(records),
        "kept": sum(kept),
        "compute": {name: float(np.mean([item.get(name) or 0.0 for item in spent])) for name in COMPUTE},
        "ahead": over_seeds(_gaps(pairs, ours, "reward")),
        "ahead_objective": over_seeds(_gaps(pairs, ours, "objective")),
        **{
            name: over_seeds([item[name] for item in figures], test.get(name), [level.get(name) for level in levels])
            for name in FIGURES
        },
    }


def _gaps(
    pairs: Sequence[tuple[Figures, Mapping[str, Any]]], ours: Mapping[int, Figures], name: str
) -> list[float | None]:
    """Our figure minus the method's, seed by seed; None where one of them is not known."""
    gaps: list[float | None] = []
    for item, record in pairs:
        best, own = ours.get(record["seed"], {}).get(name), item[name]
        gaps.append(None if best is None or own is None else best - own)
    return gaps

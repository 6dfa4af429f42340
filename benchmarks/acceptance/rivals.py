"""Row 16: the comparison with the rivals, each with its best settings, on the same worlds at the same limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from acceptance.lab import Lab
from acceptance.row import Row

SEEDS = ",".join(map(str, range(10)))
RIVALS = ("safe_rlhf", "cdpo_paper")

Line = Mapping[str, Any]


def compared(lab: Lab) -> Row:
    """Row 16: more reward than Safe RLHF and the paper's recipe at every limit, at less compute than Safe RLHF."""
    methods = ",".join([*RIVALS, "ours"])
    words = ["compare", "testbed", "--methods", methods, "--seeds", SEEDS, "--testbed.scorers", "oracle"]
    table = lab.run("compared", words, "compared").result["table"]
    limits = list(dict.fromkeys(line["limit_name"] for line in table))
    ours = {limit: _line(table, limit, "ours") for limit in limits}
    rivals = {(limit, name): _line(table, limit, name) for limit in limits for name in RIVALS}
    ahead = {key: line["ahead"] for key, line in rivals.items()}
    apart = sum(line["reward"]["high"] < ours[limit]["reward"]["low"] for (limit, _), line in rivals.items())
    objective = {key: line["ahead_objective"] for key, line in rivals.items()}
    keeps = all(line["kept"] <= ours[limit]["kept"] for (limit, _), line in rivals.items())
    cheaper = all(_cpu(ours[limit]) < _cpu(rivals[limit, "safe_rlhf"]) for limit in limits)
    paper = sum(_cpu(rivals[limit, "cdpo_paper"]) / _cpu(ours[limit]) for limit in limits) / len(limits)
    rounds = {name: _mean(line["rounds"]["mean"] for line in _lines(table, name)) for name in ("ours", "cdpo_paper")}
    return Row(
        16,
        f"`cdpo {' '.join(words)}`",
        f"reward ahead of {_listed(ahead)}; reward − β KL ahead of {_listed(objective)}; "
        f"intervals of the rewards apart in {apart} of {len(rivals)}; rounds {rounds['ours']:.1f} against "
        f"{rounds['cdpo_paper']:.1f} of the paper's ascent, which takes {paper:.1f} × our processor time; less than "
        f"Safe RLHF's: {cheaper}",
        "more reward at every limit, intervals apart, at equal or better constraint satisfaction and less compute",
        all(value["low"] > 0 for value in ahead.values()) and keeps and cheaper,
    )


def _listed(gaps: Mapping[tuple[str, str], Mapping[str, float]]) -> str:
    return "; ".join(
        f"{name}, {limit}: {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        for (limit, name), value in gaps.items()
    )


def _line(table: list[Line], limit: str, method: str) -> Line:
    return next(line for line in table if line["limit_name"] == limit and line["method"] == method)


def _lines(table: list[Line], method: str) -> list[Line]:
    return [line for line in table if line["method"] == method]


def _cpu(line: Line) -> float:
    return float(line["compute"]["cpu_seconds"])


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)

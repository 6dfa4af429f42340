"""The figures of a sweep: the frontier of reward over cost, and λ and the certificates along the limits.

A line is one combination of what the sweep varies besides the limit; a sweep over limits alone has one, named "".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdpo_core.evaluation.figures import GREY, MARKERS, ORANGE, PURPLE, SERIES, SKY, YELLOW, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[Mapping[str, Any]]
# More names than this leave no room for the points, so the legend goes beside the panel.
MOST_NAMES_INSIDE = 4
DASHES = ("-", "--", ":", "-.")


def frontier(
    lines: Mapping[str, Points],
    path: Path,
    exact: Mapping[str, Sequence[Sequence[float]]] | None = None,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Reward over cost: one point a limit, full when certified, the exact frontier behind.

    Args:
        lines: by name, records {limit, cost, reward, certified}; cost and reward are {mean, low, high} or numbers.
        path: the PNG to write.
        exact: by line, [cost, reward] of the exact optimum along the limits, where it is known.
        baselines: name -> {reward, cost}.
    """
    with drawing(path, width=6.8, height=4.8) as (panel,):
        for index, (name, points) in enumerate(lines.items()):
            _exact_curve(panel, (exact or {}).get(name, ()), index, len(lines))
            _costs_and_rewards(panel, name, points, index, has_limits=len(lines) == 1)
        for index, (name, record) in enumerate((baselines or {}).items()):
            look: dict[str, Any] = {"color": (PURPLE, YELLOW, SKY)[index % 3], "marker": ("X", "P", "*")[index % 3]}
            panel.plot(
                _mean(record["cost"]), _mean(record["reward"]), linestyle="none", markersize=9, label=name, **look
            )
        panel.set(title="Reward over cost along the limit", xlabel="mean cost (lower is safer)", ylabel="mean reward")
        panel.margins(x=0.12, y=0.14)
        _explain_fill(panel, lines)
        _legend(panel, lines)


def along_limits(lines: Mapping[str, Points], path: Path, name: str = "cost") -> None:
    """λ over the limit, above the certificate: how far its mean cost and its bound are from the limit.

    Args:
        lines: by name, records {limit, lambda, certificate}; the certificate is {mean, upper, passed}, or None where
            none was tried.
        path: the PNG to write.
        name: the constraint's.
    """
    with drawing(path, rows=2, width=6.8, height=6.0) as (above, below):
        below.axhline(0.0, color=ORANGE, linestyle="--", linewidth=1.5, label="limit")
        for index, (line, points) in enumerate(lines.items()):
            known = [point for point in _ordered(points) if point["lambda"] is not None]
            above.plot(
                [point["limit"] for point in known], [point["lambda"] for point in known], label=line, **_look(index)
            )
            _certificates(below, _ordered(points), index)
        above.set_title("λ and the certificate along the limit")
        above.set_ylabel("λ (reward per unit of cost)")
        below.set(xlabel=f"limit on {name}", ylabel="certificate: mean and bound − limit")
        for panel in (above, below):
            panel.margins(x=0.08, y=0.14)
        if len(lines) > 1:
            _legend(above, lines)
        _explain_fill(below, lines, "passed", "failed")
        _legend(below, lines)


def _exact_curve(panel: Axes, points: Sequence[Sequence[float]], index: int, lines: int) -> None:
    if not len(points):
        return
    curve = np.array(sorted(map(tuple, points)), dtype=float)
    # Beside several lines each exact one is told by its line's colour, and named once.
    color, label = (GREY, "exact optimum") if lines == 1 else (SERIES[index % 5], "exact" if index == 0 else None)
    panel.plot(curve[:, 0], curve[:, 1], color=color, linewidth=1.6 if lines == 1 else 0.9, alpha=0.8, label=label)


def _costs_and_rewards(panel: Axes, name: str, points: Points, index: int, has_limits: bool) -> None:
    ordered = _ordered(points)
    costs, rewards = ([_mean(point[key]) for point in ordered] for key in ("cost", "reward"))
    look = _look(index)
    panel.plot(costs, rewards, **{**look, "marker": ""}, linewidth=1.0, alpha=0.5)
    if name and ordered:
        panel.plot([], [], **look, linewidth=1.0, label=name)
    for cost, reward, point in zip(costs, rewards, ordered, strict=True):
        panel.errorbar(
            [cost],
            [reward],
            xerr=np.transpose([_ends(point["cost"])]),
            yerr=np.transpose([_ends(point["reward"])]),
            color=look["color"],
            marker=look["marker"],
            markerfacecolor=look["color"] if point["certified"] else "white",
            linestyle="none",
            elinewidth=1.0,
        )
        if has_limits:
            text = f"limit {point['limit']:g}".replace("-", "−")
            panel.annotate(text, (cost, reward), xytext=(7, -13), textcoords="offset points", fontsize=8.5)


def _certificates(panel: Axes, points: Points, index: int) -> None:
    look = _look(index)
    for point in points:
        found = point.get("certificate")
        if found is None:
            continue
        panel.errorbar(
            [point["limit"]],
            [found["mean"] - point["limit"]],
            yerr=[[0.0], [max(0.0, found["upper"] - found["mean"])]],
            color=look["color"],
            marker=look["marker"],
            markerfacecolor=look["color"] if found["passed"] else "white",
            linestyle="none",
        )


def _explain_fill(
    panel: Axes, lines: Mapping[str, Points], full: str = "certified", empty: str = "not certified"
) -> None:
    """Name the full and the empty markers that were drawn."""
    flags = {_passed(point) for points in lines.values() for point in points if _passed(point) is not None}
    color = SERIES[0] if len(lines) == 1 else GREY
    for flag, label in ((True, full), (False, empty)):
        if flag in flags:
            fill = color if flag else "white"
            panel.plot([], [], color=color, marker="o", markerfacecolor=fill, linestyle="none", label=label)


def _passed(point: Mapping[str, Any]) -> bool | None:
    """Whether the point is certified; None when no certificate was tried."""
    if "certified" in point:
        return bool(point["certified"])
    found = point.get("certificate")
    return None if found is None else bool(found["passed"])


def _legend(panel: Axes, lines: Mapping[str, Points]) -> None:
    if len(lines) > MOST_NAMES_INSIDE:
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7.5)
    else:
        panel.legend(loc="best")


def _look(index: int) -> dict[str, Any]:
    """A line's colour, marker and dashes: what repeats in one differs in another."""
    return {"color": SERIES[index % 5], "marker": MARKERS[index // 5 % 5], "linestyle": DASHES[index // 25 % 4]}


def _ordered(points: Points) -> list[Mapping[str, Any]]:
    return sorted(points, key=lambda point: float(point["limit"]))


def _mean(value: Any) -> float:
    return float(value["mean"] if isinstance(value, Mapping) else value)


def _ends(value: Any) -> tuple[float, float]:
    """Distances from the mean down to `low` and up to `high`."""
    if not isinstance(value, Mapping):
        return (0.0, 0.0)
    return (max(0.0, value["mean"] - value["low"]), max(0.0, value["high"] - value["mean"]))

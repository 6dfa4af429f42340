"""The comparison drawn: reward over cost for every method at every limit, beside the exact frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdpo_core.evaluation.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, YELLOW, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*Xh<>"
OTHERS = (GREY, SKY, YELLOW, GREEN, PURPLE, INK, BLUE)


def comparison_figure(
    table: Sequence[Mapping[str, Any]], exact: Sequence[Sequence[float]], path: Path, ours: str = "ours"
) -> None:
    """Draw the rows of `comparison_table` to a PNG: a marker for each method, a point for each limit.

    Args:
        table: rows with cost and reward {mean, low, high} or None, limit, title, method.
        exact: [cost, reward] along the exact frontier, sorted by cost; [] where it is not known.
        path: of the PNG.
        ours: the method that is drawn on top.
    """
    with drawing(path, width=8.0, height=5.2) as (panel,):
        if exact:
            panel.plot(*zip(*exact, strict=True), color=INK, linewidth=1, label="exact optimum", zorder=1)
        for limit in dict.fromkeys(row["limit"] for row in table):
            panel.axvline(limit, color=INK, linewidth=0.7, linestyle=":", zorder=0)
        for place, method in enumerate(dict.fromkeys(row["method"] for row in table)):
            color = ORANGE if method == ours else OTHERS[place % len(OTHERS)]
            rows = [row for row in table if row["method"] == method and row["cost"] and row["reward"]]
            if rows:
                _points(panel, rows, color, MARKERS[place % len(MARKERS)], 4 if method == ours else 3)
        panel.set_xlabel("mean cost (dotted: the limits)")
        panel.set_ylabel("mean reward")
        bars = "bars: 95 % interval" + (" of the distance to the exact optimum" if exact else "")
        panel.set_title(f"Reward that each method has at its cost, mean over seeds\n{bars}", fontsize=10)
        panel.legend(fontsize=8)


def _points(panel: Axes, rows: Sequence[Mapping[str, Any]], color: str, marker: str, order: int) -> None:
    means = {name: np.array([row[name]["mean"] for row in rows]) for name in ("cost", "reward")}
    reach = {
        name: np.abs([[row[name][end] for row in rows] for end in ("low", "high")] - means[name])
        for name in ("cost", "reward")
    }
    panel.errorbar(
        means["cost"],
        means["reward"],
        xerr=reach["cost"],
        yerr=reach["reward"],
        color=color,
        fmt=marker,
        markersize=6,
        linewidth=0.8,
        label=rows[0]["title"],
        zorder=order,
    )

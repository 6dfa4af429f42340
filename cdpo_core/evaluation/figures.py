"""The figures of an experiment: plain records in, PNG files of reproducible bytes out.

Colours are Okabe and Ito's, which readers with any colour vision tell apart; every series also has
its own marker or line. No global pyplot state, so figures can be drawn in any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
YELLOW, INK, GREY = "#E69F00", "#333333", "#8A8A8A"
SERIES = (BLUE, GREEN, PURPLE, YELLOW, SKY)
MARKERS = ("o", "s", "D", "^", "v")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "errorbar.capsize": 3,
    # A name may hold dollars, which begin no formula.
    "text.parse_math": False,
}


@contextmanager
def drawing(
    path: Path, rows: int = 1, width: float = 6.4, height: float = 4.0, sharey: bool = False
) -> Iterator[list[Axes]]:
    """`rows` panels above each other that share their x axis, written to `path` on leaving."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(rows, 1, sharex=True, sharey=sharey, squeeze=False)[:, 0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})


def lambda_trajectory(
    rounds: Sequence[Mapping[str, Any]], names: Sequence[str], limits: Sequence[float], path: Path
) -> None:
    """λ of each round above the cost it led to.

    Args:
        rounds: records {round, lambda, cost, cost_upper}; each of the three is a number, or one a constraint [m].
        names: the constraints' names [m].
        limits: their limits [m], calibrated cost units.
        path: the PNG to write.
    """
    at = [int(record["round"]) for record in rounds]
    with drawing(path, rows=2, height=5.2) as (above, below):
        for index, (name, limit) in enumerate(zip(names, limits, strict=True)):
            look: dict[str, Any] = {"color": SERIES[index % 5], "marker": MARKERS[index % 5], "label": name}
            lambdas, costs, uppers = (_series(rounds, key, index) for key in ("lambda", "cost", "cost_upper"))
            above.plot(at, lambdas, **look)
            for x, y in zip(at, lambdas, strict=True):
                above.annotate(
                    _signed(y, ".3g"), (x, y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9
                )
            below.errorbar(at, costs, yerr=_up(costs, uppers), **look)
            _limit_line(below, limit, look["color"] if len(names) > 1 else ORANGE)
        above.set_title("The multiplier λ and the cost it leads to")
        above.set_ylabel("λ (reward per unit of cost)")
        above.margins(y=0.25)
        above.set_ylim(bottom=min(0.0, above.get_ylim()[0]))
        below.set_ylabel("mean cost, with upper bound")
        _round_axis(below, at)
        if len(names) > 1:
            above.legend(ncols=len(names), loc="best")


def reward_and_cost_per_round(
    rounds: Sequence[Mapping[str, Any]],
    limit: float,
    path: Path,
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    index: int = 0,
    name: str = "cost",
) -> None:
    """Reward above one constraint's cost, baselines first, then each round.

    Args:
        rounds: records {round, lambda, reward, cost, cost_upper}; of lists it is the constraint's entry.
        limit: the constraint's limit, calibrated cost units.
        path: the PNG to write.
        baselines: name -> {reward, cost}, each a number or {mean, low, high}.
        index: which constraint.
        name: the constraint's, for the axis.
    """
    rows: list[tuple[str, Any, Any, Any, str]] = [
        (method, record["reward"], record["cost"], None, GREY) for method, record in (baselines or {}).items()
    ]
    for record in rounds:
        label = f"round {record['round']}\nλ = {_entry(record['lambda'], index):.3g}"
        upper = record.get("cost_upper")
        reach = None if upper is None else _entry(upper, index)
        rows.append((label, record["reward"], _entry(record["cost"], index), reach, BLUE))
    at = np.arange(len(rows))
    with drawing(path, rows=2, width=max(6.4, 1.2 * len(rows)), height=5.2) as (above, below):
        for x, (_, reward, cost, upper, color) in zip(at, rows, strict=True):
            bound = {"mean": _mean(cost), "low": _mean(cost), "high": upper} if upper is not None else cost
            _dot(above, float(x), reward, color)
            _dot(below, float(x), bound, color)
        for panel in (above, below):
            panel.margins(y=0.2)
            panel.grid(visible=False, axis="x")
        _limit_line(below, limit, ORANGE)
        above.set_title("Reward and cost, baselines and rounds")
        above.set_ylabel("mean reward")
        below.set_ylabel(f"mean {name}, with upper bound")
        below.set_xticks(at, [label for label, *_ in rows])
        below.set_xlim(-0.5, len(rows) - 0.5)


def cost_histogram(costs: Mapping[str, np.ndarray], limit: float, path: Path, what: str = "cost of a response") -> None:
    """Distribution of costs by method, with each method's mean and the limit.

    Args:
        costs: method -> costs [n], calibrated units; methods may differ in n.
        limit: of the mean, calibrated cost units.
        path: the PNG to write.
        what: the x axis's label.
    """
    together = np.concatenate([np.asarray(values, dtype=float) for values in costs.values()])
    low, high = np.quantile(together, [0.002, 0.998])
    edges = np.linspace(min(low, limit), max(high, limit) + 1e-9, 41)
    with drawing(path, rows=len(costs), height=1.0 + 1.25 * len(costs), sharey=True) as panels:
        for index, (panel, (method, values)) in enumerate(zip(panels, costs.items(), strict=True)):
            clipped = np.clip(np.asarray(values, dtype=float), edges[0], edges[-1])
            mean = float(np.mean(values))
            panel.hist(clipped, list(edges), weights=np.full(len(clipped), 100 / len(clipped)), color=SERIES[index % 5])
            panel.axvline(mean, color=INK, linewidth=1.6)
            panel.axvline(limit, color=ORANGE, linestyle="--", linewidth=1.6)
            panel.set_title(method, fontsize=10, pad=4)
            label = f"mean {_signed(mean, '.2f')}"
            panel.set_title(label, loc="right", fontsize=9, fontweight="normal", pad=4)
            panel.set_ylabel("%")
            panel.grid(visible=False, axis="x")
        panels[-1].set_xlabel(f"{what} (solid: mean, dashed: limit {_signed(limit)} of the mean)")


def predicted_curve(
    lambdas: np.ndarray,
    costs: np.ndarray,
    limit: float,
    path: Path,
    measured: Sequence[tuple[float, float, float]] = (),
    name: str = "cost",
    what: str = "λ",
) -> None:
    """The cost the offline dual predicts over λ, with the rounds' measured costs.

    Args:
        lambdas: [L], increasing.
        costs: predicted E_{π_λ}[c] [L], calibrated units.
        limit: the constraint's limit.
        path: the PNG to write.
        measured: (λ, mean cost, 95 % half-width) of each round.
        name: the constraint's name.
        what: the x axis's label.
    """
    with drawing(path) as (panel,):
        panel.plot(lambdas, costs, color=BLUE, label="predicted on reference samples")
        if len(measured):
            at, means, halves = (np.array(column, dtype=float) for column in zip(*measured, strict=True))
            panel.errorbar(
                at,
                means,
                yerr=halves,
                color=GREEN,
                marker="s",
                linestyle="none",
                label="measured on trained policies",
                zorder=3,
            )
        _limit_line(panel, limit, ORANGE)
        panel.set(title="Cost over λ: predicted and measured", xlabel=what, ylabel=f"mean {name}")
        panel.set_xlim(left=float(lambdas[0]))
        panel.legend(loc="upper right")


def price_of_limits(rows: Sequence[Mapping[str, Any]], limit: float, path: Path, name: str = "cost") -> None:
    """Reward over the limit, as the offline dual predicts it before any round.

    Args:
        rows: `OfflineDual.price_of_limits`; limits that are out of reach are left out.
        limit: the one asked for.
        path: the PNG to write.
        name: the constraint's name.
    """
    known = [row for row in rows if row["reachable"]]
    with drawing(path) as (panel,):
        panel.plot([row["limit"] for row in known], [row["reward"] for row in known], color=BLUE, marker="o")
        panel.axvline(limit, color=ORANGE, linestyle="--", linewidth=1.5, label=f"limit {_signed(limit)}, asked for")
        panel.legend(loc="best")
        panel.set(title="What a limit costs, predicted", xlabel=f"limit on {name}", ylabel="mean reward")


def _dot(panel: Axes, x: float, value: Any, color: str) -> None:
    mean = _mean(value)
    panel.errorbar([x], [mean], yerr=np.transpose([_ends(value)]), color=color, marker="o", markersize=8)
    panel.annotate(
        _signed(mean, ".2f"), (x, mean), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
    )  # fmt: skip


def _signed(value: float, spec: str = "g") -> str:
    """The number with a true minus sign, as the axes write it."""
    return format(value, spec).replace("-", "−")


def _limit_line(panel: Axes, limit: float, color: str) -> None:
    """A dashed line at the limit, named outside the panel where nothing is drawn."""
    panel.axhline(limit, color=color, linestyle="--", linewidth=1.5)
    panel.annotate(
        f"limit {_signed(limit)}", (1, limit), xycoords=("axes fraction", "data"), xytext=(5, 0),
        textcoords="offset points", ha="left", va="center", color=color, fontsize=9,
    )  # fmt: skip


def _round_axis(panel: Axes, at: Sequence[int]) -> None:
    panel.set_xlabel("round")
    panel.set_xticks(at)
    panel.set_xlim(min(at, default=1) - 0.4, max(at, default=1) + 0.4)


def _series(rounds: Sequence[Mapping[str, Any]], key: str, index: int) -> list[float]:
    values = [record.get(key) for record in rounds]
    return [float("nan") if value is None else _entry(value, index) for value in values]


def _up(means: Sequence[float], uppers: Sequence[float]) -> np.ndarray:
    """Error bars that reach from each mean up to its bound [2, n]."""
    reach = np.nan_to_num(np.subtract(uppers, means), nan=0.0).clip(min=0)
    return np.stack([np.zeros_like(reach), reach])


def _entry(value: Any, index: int = 0) -> float:
    """One constraint's entry of a list; a number is every constraint's."""
    return float(value[index] if isinstance(value, (list, tuple)) else value)


def _mean(value: Any) -> float:
    return float(value["mean"]) if isinstance(value, Mapping) else _entry(value)


def _ends(value: Any) -> tuple[float, float]:
    """Distances from the mean down to `low` and up to `high`."""
    if not isinstance(value, Mapping):
        return (0.0, 0.0)
    return (max(0.0, value["mean"] - value["low"]), max(0.0, value["high"] - value["mean"]))

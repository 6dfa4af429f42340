"""The figures: PNG files of reproducible bytes, for one constraint and for several, and for the odd cases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdpo_core.evaluation import figures, sweep_figures

ROUNDS = [
    {"round": 1, "lambda": 0.4, "reward": 1.3, "cost": -0.3, "cost_upper": -0.1},
    {"round": 2, "lambda": 0.65, "reward": 1.1, "cost": -0.6, "cost_upper": -0.5},
]
ROUNDS_OF_TWO = [{"round": 1, "lambda": [0.4, 0.0], "reward": 1.3, "cost": [-0.3, 0.2], "cost_upper": [-0.1, 0.4]}]
BASELINES = {"reference": {"reward": {"mean": 0.1, "low": 0.0, "high": 0.2}, "cost": 0.6}}
POINTS = [
    {"limit": -0.5, "cost": {"mean": -0.6, "low": -0.7, "high": -0.5}, "reward": 0.9, "certified": True},
    {"limit": 0.5, "cost": 0.45, "reward": 1.4, "certified": False},
]
ALONG = [
    {"limit": -0.5, "lambda": 1.2, "certificate": {"mean": -0.7, "upper": -0.55, "passed": True}},
    {"limit": -0.2, "lambda": 0.4, "certificate": {"mean": -0.3, "upper": -0.1, "passed": False}},
    {"limit": -9.0, "lambda": None, "certificate": None},
]
COSTS = {"reference": np.linspace(-3, 4, 50), "constrained": np.linspace(-4, 2, 30)}


def _lambda(path: Path) -> None:
    figures.lambda_trajectory(ROUNDS, ["harm"], [-0.5], path)


def _lambda_of_two(path: Path) -> None:
    figures.lambda_trajectory(ROUNDS_OF_TWO, ["harm", "privacy"], [-0.5, 0.0], path)


def _lambda_without_bound(path: Path) -> None:
    figures.lambda_trajectory([{"round": 1, "lambda": 0.0, "cost": 0.2}], ["harm"], [0.0], path)


def _per_round(path: Path) -> None:
    figures.reward_and_cost_per_round(ROUNDS, -0.5, path, BASELINES)


def _per_round_of_two(path: Path) -> None:
    figures.reward_and_cost_per_round(ROUNDS_OF_TWO, -0.5, path)


def _histogram(path: Path) -> None:
    figures.cost_histogram(COSTS, -0.5, path)


def _histogram_of_equal_costs(path: Path) -> None:
    figures.cost_histogram({"reference": np.zeros(5)}, 0.0, path)


def _frontier(path: Path) -> None:
    sweep_figures.frontier({"": POINTS}, path, {"": [(-1.0, 0.5), (1.0, 1.6)]}, BASELINES)


def _frontier_of_one(path: Path) -> None:
    sweep_figures.frontier({"": POINTS[:1]}, path)


def _frontier_of_many_lines(path: Path) -> None:
    lines = {f"seed = {seed}": POINTS for seed in range(6)}
    sweep_figures.frontier(lines, path, {"seed = 0": [(-1.0, 0.5), (1.0, 1.6)]}, BASELINES)


def _along_limits(path: Path) -> None:
    sweep_figures.along_limits({"": ALONG}, path)


def _along_limits_of_lines(path: Path) -> None:
    sweep_figures.along_limits({"beta = 1": ALONG, "beta = 2": ALONG[:1], "beta = 3": []}, path, "harm")


def _predicted(path: Path) -> None:
    figures.predicted_curve(
        np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, -0.4]), -0.2, path, [(0.5, 0.4, 0.1)], "harm"
    )


EVERY_FIGURE = [
    _lambda,
    _lambda_of_two,
    _lambda_without_bound,
    _per_round,
    _per_round_of_two,
    _histogram,
    _histogram_of_equal_costs,
    _frontier,
    _frontier_of_one,
    _frontier_of_many_lines,
    _along_limits,
    _along_limits_of_lines,
    _predicted,
]


@pytest.mark.parametrize("draw", EVERY_FIGURE, ids=lambda draw: draw.__name__.strip("_"))
def test_figure_is_a_png_of_reproducible_bytes(draw: Callable[[Path], None], tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(tmp_path / "made" / "first.png")
    draw(tmp_path / "second.png")
    first = (tmp_path / "made" / "first.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(first) > 5000
    assert first == (tmp_path / "second.png").read_bytes()
    assert b"Software" not in first
    assert b"tIME" not in first
    assert dict(matplotlib.rcParams) == before


def test_the_data_is_in_the_figure(tmp_path: Path) -> None:
    changed: list[dict[str, Any]] = [ROUNDS[0], {**ROUNDS[1], "lambda": 0.9}]
    _lambda(tmp_path / "one.png")
    figures.lambda_trajectory(changed, ["harm"], [-0.5], tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()

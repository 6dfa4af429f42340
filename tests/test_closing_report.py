"""The closing words of a run with several costs name each of them."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from cdpo_core.evaluation.result import tail_figures
from flows.closing_report import print_result
from flows.export import _figures
from tasks.journal import verdict_markdown


def constraint(name: str, limit: float, lambda_: float, true_cost: float) -> dict[str, Any]:
    certificate = {"mean": -0.6, "upper": -0.55, "delta": 0.05, "prompts": 400, "passed": True, "spent": 1}
    truth = {"true_cost": true_cost, "optimal_cost": limit, "optimal_lambda": lambda_ / 2}
    return {"name": name, "limit": limit, "lambda": lambda_, "cost": -0.6, "certificate": certificate, **truth}


def test_one_cost_has_its_price_and_what_is_beyond_the_mean() -> None:
    figure = {"mean": 0.25, "low": 0.2, "high": 0.3}
    figures = dict.fromkeys(("reward", "cost", "safe_rate", "kl", "cvar", "unsafe_prompts", "cost/harmful"), figure)
    only = constraint("harm", -0.5, 0.8, -0.66)
    result = {
        "status": "certified",
        "lambda": 0.8,
        "constraints": [only],
        "certificate": only["certificate"],
        "reachable": {"at_zero": 0.31, "floor": -1.42},
        "rounds": [],
        "test": figures,
        "baselines": {"reference": {**figures, "over_refusal": None}},
    }
    file = io.StringIO()
    print_result(result, Console(file=file, width=120))
    out = file.getvalue()
    assert "0.1 lower costs about 0.080 of reward − β KL" in out
    assert "from 0.31 (λ = 0) down to -1.42" in out
    for text in (out, verdict_markdown(result), _figures(result, tail_figures(result))):
        assert all(words in text for words in ("worst 10 %", "unsafe prompts", "cost harmful"))
    assert "| reference | 0.250 | 0.250 |  |  | 0.250 |" in _figures(result, tail_figures(result))


def test_every_cost_has_its_figures() -> None:
    constraints = [constraint("harm", -0.5, 0.8, -0.66), constraint("privacy", 0.1, 0.0, -0.31)]
    figure = {"mean": -0.2, "low": -0.3, "high": -0.1}
    figures = dict.fromkeys(("reward", "cost", "cost_privacy", "safe_rate", "kl"), figure)
    numbers = {"reward": 0.5, "kl": 0.4, "seconds": 12.3}
    result = {
        "status": "certified",
        "lambda": 0.8,
        "constraints": constraints,
        "certificate": constraints[0]["certificate"],
        "rounds": [{"round": 1, "lambda": [0.8, 0.0], "cost": [-0.7, -0.2], "cost_upper": [-0.6, -0.1], **numbers}],
        "test": figures,
        "baselines": {"reference": figures},
        "oracle": {"captured": 0.95, "true_reward": 0.5, "true_cost": -0.66, "optimal_reward": 0.6},
        "tracking": {
            "run_id": "1a2b",
            "uri": "http://mlflow:5000",
            "url": "http://mlflow:5000/#/runs/1a2b",
            "kept": 12,
        },
    }
    file = io.StringIO()
    print_result(result, Console(file=file, width=80))
    out = file.getvalue()
    for words in ("harm ± 95 %", "privacy ± 95 %", "-0.20 ± 0.10", "true cost", "0.8, 0"):
        assert words in out
    assert "cost -0.66, -0.31 (limit -0.5, 0.1)" in out
    assert "cost -0.50, 0.10 at λ = 0.4, 0" in out
    assert "Certified: harm ≤ -0.5, privacy ≤ 0.1." in out
    assert "…" not in out, "it fits a terminal of 80 columns"
    assert "it was away: 12 entries are kept in the store and are sent by the next run" in out

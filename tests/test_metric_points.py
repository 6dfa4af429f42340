"""Records as metric points, params and tags: names, steps and times as the UIs show them."""

from __future__ import annotations

import pytest
from config_kit import experiment_config

from cdpo_core.config import ConstraintConfig
from tasks.metric_points import (
    MetricPoint,
    result_points,
    result_tags,
    round_points,
    scorer_points,
    timestamp_ms,
    training_points,
    varying_params,
)
from tasks.review_views import review_state

CONFIG = experiment_config()


def _by_name(points: list[MetricPoint]) -> dict[str, float]:
    return {point.name: point.value for point in points}


def test_points_of_a_round() -> None:
    record = {"round": 2, "lambda": 0.5, "reward": 1.0, "cost": -0.2, "cost_upper": 0.1, "kl": 0.7, "seconds": 9.0}
    points = round_points(record, ["harm"], [-0.5], 123)
    assert {(point.step, point.timestamp_ms) for point in points} == {(2, 123)}
    assert _by_name(points) == {
        "dual/lambda": 0.5,
        "dual/cost": -0.2,
        "dual/limit": -0.5,
        "dual/reward": 1.0,
        "dual/violation": pytest.approx(0.3),
        "policy/reward": 1.0,
        "policy/cost": -0.2,
        "policy/cost_upper": 0.1,
        "policy/kl": 0.7,
    }


def test_points_of_a_round_with_two_constraints() -> None:
    record = {
        "round": 1,
        "lambda": [0.5, 0.0],
        "reward": 1.0,
        "cost": [-0.6, 0.4],
        "cost_upper": [-0.5, 0.6],
        "kl": 0.7,
    }
    points = _by_name(round_points(record, ["harm", "privacy"], [-0.5, 0.0], 123))
    assert "dual/lambda" not in points
    assert (points["dual/lambda/harm"], points["dual/lambda/privacy"]) == (0.5, 0.0)
    assert points["dual/violation"] == pytest.approx(0.4)
    assert (points["policy/cost"], points["policy/cost/privacy"]) == (-0.6, 0.4)
    assert points["policy/cost_upper/privacy"] == 0.6
    assert (points["dual/limit/harm"], points["dual/limit/privacy"]) == (-0.5, 0.0)
    assert (points["dual/cost/harm"], points["dual/reward"]) == (-0.6, 1.0)


def test_points_of_training_follow_each_other_over_rounds() -> None:
    steps = [{"step": 30, "loss": 0.6, "accuracy": 0.7}, {"step": 60, "loss": 0.5}]
    points = training_points(steps, 3, 60, 123)
    assert [(point.name, point.step, point.value) for point in points] == [
        ("train/loss", 150, 0.6),
        ("train/accuracy", 150, 0.7),
        ("train/loss", 180, 0.5),
    ]


def test_points_of_a_result() -> None:
    estimate = {"mean": 1.0, "low": 0.5, "high": 1.5}
    result = {
        "rounds": [{"round": 1}, {"round": 2}],
        "test": {"reward": estimate},
        "oracle": {"captured": 0.95, "support_mass": None, "true_cost": float("nan"), "prompts": 15, "feasible": True},
        "scorers": {"harm": {"accuracy": 0.8, "low": 0.75, "high": 0.85}},
    }
    points = result_points(result, 123)
    assert {(point.name, point.value, point.step) for point in points} == {
        ("test/reward", 1.0, 0),
        ("test/reward_low", 0.5, 0),
        ("test/reward_high", 1.5, 0),
        ("oracle/captured", 0.95, 0),
    }
    assert result_points({"rounds": [], "test": None, "oracle": None}, 123) == []
    assert {(point.name, point.value, point.step) for point in scorer_points(result["scorers"], 123)} == {
        ("scorer/harm/accuracy", 0.8, 0),
        ("scorer/harm/accuracy_low", 0.75, 0),
        ("scorer/harm/accuracy_high", 0.85, 0),
    }
    assert scorer_points({}, 123) == []


def test_tags_of_a_result() -> None:
    result = {"status": "certified", "lambda": 0.7, "certificate": {"upper": -0.512345678, "passed": True}}
    result["certificate"] |= {"evidence": [{"uri": "/store/stages/scores/abc.json"}], "note": ""}
    expected = {"status": "certified", "lambda": "0.7", "certificate.upper": "-0.512346", "certificate.passed": "True"}
    assert result_tags(result) == expected
    assert result_tags({"status": "infeasible", "lambda": None, "certificate": None}) == {"status": "infeasible"}


def test_points_and_tags_name_each_of_several_constraints() -> None:
    truth = {"true_cost": -0.6, "optimal_cost": -0.5, "optimal_lambda": 0.7}
    passed = {"mean": -0.6, "upper": -0.55, "passed": True, "evidence": []}
    items = [
        {"name": "harm", "limit": -0.5, "lambda": 0.8, "certificate": passed, **truth},
        {"name": "dishonesty", "limit": 1.5, "lambda": 0.0, "certificate": None, "true_cost": 0.1},
    ]
    points = {
        point.name: point.value for point in result_points({"constraints": items}, 123) if "returned" not in point.name
    }
    assert points == {
        "oracle/true_cost/harm": -0.6,
        "oracle/optimal_cost/harm": -0.5,
        "oracle/optimal_lambda/harm": 0.7,
        "oracle/true_cost/dishonesty": 0.1,
    }
    tags = result_tags({"status": "certified", "lambda": 0.8, "constraints": items})
    assert tags["certificate.passed.harm"] == "True"
    assert (tags["lambda.dishonesty"], tags["limit.dishonesty"]) == ("0", "1.5")
    assert "certificate.passed.dishonesty" not in tags
    assert {point.name for point in result_points({"constraints": items[:1]}, 123)} == {
        "returned/limit",
        "returned/lambda",
    }


def test_charts_of_several_runs_take_the_returned_round_s_figures_and_not_the_last_one_s() -> None:
    rounds = [{"round": number, "reward": reward} for number, reward in ((1, 1.5), (2, 1.7), (3, 0.3))]
    only = {"name": "harm", "limit": -0.5, "lambda": 0.8, "cost": -0.6, "certificate": None}
    result = {"status": "certified", "lambda": 0.8, "rounds": rounds, "chosen_round": 2, "constraints": [only]}
    points = result_points(result, 123)
    assert {point.name: point.value for point in points} == {
        "returned/limit": -0.5,
        "returned/lambda": 0.8,
        "returned/cost": -0.6,
        "returned/reward": 1.7,
    }
    assert {(point.step, point.timestamp_ms) for point in points} == {(0, 123)}, "sent again, they are the same points"
    assert float(result_tags(result)["lambda"]) == 0.8
    charted = {
        axis["key"]
        for chart in review_state(["limit"], (), "parent")["compareRunCharts"]
        for axis in (chart.get("xaxis"), chart.get("yaxis"))
        if axis
    }
    assert charted == {point.name for point in points}, "charts, table and tags speak of one policy"


def test_params_are_few_and_name_each_limit() -> None:
    assert varying_params(CONFIG)["limit"] == "-0.5"
    two = [ConstraintConfig(name="harm", limit=-0.5), ConstraintConfig(name="privacy", limit=0.25)]
    params = varying_params(CONFIG.model_copy(update={"constraints": two}))
    assert (params["limit.harm"], params["limit.privacy"]) == ("-0.5", "0.25")
    assert "limit" not in params


def test_time_of_a_manifest() -> None:
    assert timestamp_ms("2026-11-23T13:00:00.250+00:00") == timestamp_ms("2026-11-23T14:00:00.250+01:00")
    assert timestamp_ms("1970-01-01T00:00:01.250+00:00") == 1250

"""What is said of a limit out of reach: one lowest cost, by what, and the tightest limit that would likely pass."""

from __future__ import annotations

import re

import pytest
from report_kit import infeasible

from cdpo_core.evaluation.result import reach_records, verdict
from tasks.report_words import explained, meanings

ROUNDS = [{"round": 1, "lambda": 2.0, "cost": -1.1}, {"round": 2, "lambda": 20.0, "cost": -1.234}]


def test_the_lowest_cost_is_a_measured_one_with_its_round_and_lambda() -> None:
    (reach,) = reach_records(["harm"], [0.12], ROUNDS, [-3.0], "predicted")
    assert (reach["lowest"], reach["lowest_by"]) == (-1.234, "round 2, λ = 20")
    assert reach["certifiable"] == pytest.approx(-1.11), "rounded to where it is looser"
    assert reach["certifiable"] - 0.12 >= reach["lowest"], "training would aim at what was reached"


def test_without_a_round_the_prediction_is_named_as_one() -> None:
    (reach,) = reach_records(["harm"], [0.1], [], [-1.3], "predicted from samples at λ = 20")
    assert (reach["lowest"], reach["lowest_by"]) == (-1.3, "predicted from samples at λ = 20")


def test_each_cost_has_its_own_lowest() -> None:
    rounds = [{"round": 1, "lambda": [1, 9], "cost": [-2.0, 0.5]}, {"round": 2, "lambda": [9, 1], "cost": [-1.0, -0.5]}]
    reach = reach_records(["harm", "lies"], [0.1, 0.2], rounds, [0.0, 0.0], "")
    assert [item["lowest"] for item in reach] == [-2.0, -0.5]
    assert [item["lowest_by"] for item in reach] == ["round 1, λ = 1, 9", "round 2, λ = 9, 1"]


def test_verdict_and_report_name_one_lowest_cost_and_a_limit_to_ask_for() -> None:
    record = infeasible()
    assert verdict(record) == (
        "Infeasible: harm ≤ -9 is out of reach. The lowest mean cost reached is harm -1.200 (round 2, λ = 20); "
        "the tightest limit that would likely be certified here is harm ≤ -1.05."
    )
    text = " ".join([explained(record)[0], *meanings(record)]).replace("−", "-")
    assert set(re.findall(r"-1\.\d+", text)) == {"-1.200", "-1.05"}, "no second floor beside it"

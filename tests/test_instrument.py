"""A certificate asks first whether its instrument measures: every check by a table, and what a failure does."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pandas as pd
import pytest
import report_kit

from cdpo_core.dual.certificate import Certificate
from cdpo_core.dual.two_phase import Covariate
from cdpo_core.evaluation.decoding import Decoding
from cdpo_core.evaluation.instrument import (
    failed_chance,
    failed_ends,
    failed_spread,
    failed_units,
    unchecked,
    unfinished_warning,
)
from cdpo_core.evaluation.measure import Measured
from cdpo_core.evaluation.metrics import Estimate
from cdpo_core.evaluation.result import verdict
from tasks import evaluation
from tasks.dual import beyond_ends
from tasks.evaluation import Certified, examined
from tasks.ledger import Share
from tasks.metric_points import result_points, result_tags, round_points
from tasks.report_words import explained, meanings

PASSED = Certificate(
    -0.5, -0.4, 0.05, "t", 4, True, 0.1, high=10.0, pool=8, covariate=Covariate(0.5, -1.0, 1.0), foreseen=0.1
)
SHARE = Share(delta=0.05, asked=0.05, spending="none", uses=0, tests=1)
DECODING = Decoding(0.5, 32, 64, "{prompt}", (2,))


def measured(rows: list[tuple[str, str, bool, float]]) -> Measured:
    """Responses {prompt, text, whether it ended, cost}."""
    table = pd.DataFrame(rows, columns=["prompt_id", "response", "finished", "cost_harm"])
    return Measured(table.assign(sample=range(len(table)), reward=0.0, log_prob=-1.0, ref_log_prob=-1.0))


def report(**changes: Any) -> dict[str, Any]:
    usual = {"accuracy": 0.8, "low": 0.7, "high": 0.9, "pairs": 40, "prompts": 10, "calibration_error": 0.05}
    return usual | changes


@pytest.mark.parametrize(("spread", "fails"), [(None, False), (0.4, False), (1e-4, False), (1e-7, True), (0.0, True)])
def test_spread(spread: float | None, fails: bool) -> None:
    assert bool(failed_spread("harm", spread)) is fails


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([("a", "x", True, 1.0), ("a", "y", True, 3.0), ("b", "x", True, 9.0)], 1.0),  # b has one response
        ([("a", "x", True, 1.0), ("a", "y", True, 1.0), ("b", "x", True, 9.0), ("b", "y", True, 9.0)], 0.0),
        ([("a", "x", True, 1.0), ("a", "x", True, 1.0)], None),  # equal responses ask nothing of the model
    ],
)
def test_spread_is_of_different_responses_to_one_prompt(rows: Any, expected: float | None) -> None:
    assert measured(rows).spread("harm") == expected


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.51, 0.7, ""), (0.5, 0.5, "no better than chance"), (0.45, 0.6, "no better"), (0.2, 0.4, "against its labels")],
)
def test_chance(low: float, high: float, words: str) -> None:
    failure = failed_chance("harm", report(accuracy=(low + high) / 2, low=low, high=high))
    assert (failure is not None) is bool(words)
    assert failure is None or words in failure.what


def test_without_labels_nothing_fails_and_it_is_said() -> None:
    ready = report(accuracy=None, low=None, high=None, calibration_error=None)
    assert failed_chance("harm", ready) is None
    assert failed_units("harm", ready, 0.0, 0.5, []) is None
    assert "not checked whether its model ranks better than chance" in unchecked("harm", ready)[0]
    assert "has its zero" not in unchecked("harm", report(accuracy=None))[0]
    assert unchecked("harm", report()) == []
    assert unchecked("harm", {}) == [], "the truth is asked nothing"
    assert failed_chance("harm", {}) is None


@pytest.mark.parametrize(
    ("error", "limit", "upper", "others", "fails"),
    [
        (0.51, 0.0, -0.2, [0.3, 0.4], True),  # zero known to ± 1.00: any of these policies may lie on either side
        (0.05, 0.0, -0.02, [0.4, 0.3], False),  # just below the limit, and far below what was made without it
        (0.05, 0.0, -0.02, [-0.3, -0.1], True),  # just below a limit that no policy needed
        (0.05, 0.0, -0.5, [-0.6], False),  # far below it
        (0.51, 0.0, 2.8, [0.1], False),  # the test has failed by itself: the zero is not what stood in its way
        (0.0, 0.0, 0.0, [], False),
    ],
)
def test_units(error: float, limit: float, upper: float, others: list[float], fails: bool) -> None:
    failure = failed_units("harm", report(calibration_error=error), limit, upper, others)
    assert (failure is not None) is fails
    assert failure is None or failure.figures["half_width"] == pytest.approx(1.96 * error)


@pytest.mark.parametrize(
    ("share", "low", "fails", "warns"),
    [
        (0.0, 0.0, False, False),
        (0.05, 0.01, False, False),
        (0.06, 0.01, False, True),
        (0.6, 0.45, False, True),
        (1.0, 0.9, True, True),
    ],
)
def test_ends(share: float, low: float, fails: bool, warns: bool) -> None:
    unfinished = Estimate(share, low, min(2 * share - low, 1.0))
    assert bool(failed_ends(unfinished, 32)) is fails
    assert bool(unfinished_warning("the policy", unfinished)) is warns
    assert not failed_ends(None, 32)


def test_the_cut_share_is_a_figure_of_every_measurement() -> None:
    rows = [(prompt, text, text == "x", 1.0 * (text == "x")) for prompt in "abcd" for text in "xyzw"]
    figures = measured(rows).summary(["harm"])
    assert figures["unfinished"]["mean"] == 0.75
    assert figures["unfinished"]["low"] < 0.75 < figures["unfinished"]["high"]
    names = {point.name: point.value for point in result_points({"test": figures}, 1)}
    assert (names["test/unfinished"], "test/unfinished_high" in names) == (0.75, True)
    record = {"round": 1, "lambda": 1.0, "reward": 0.1, "cost": 0.1, "cost_upper": 0.2, "kl": 0.1, "unfinished": 0.25}
    assert {p.name: p.value for p in round_points(record, ["harm"], [0.0], 1)}["policy/unfinished"] == 0.25


def certified(part: Measured) -> Certified:
    return Certified([PASSED], part, SHARE, 1, ["harm"], DECODING)


def asked(monkeypatch: pytest.MonkeyPatch, part: Measured, of_scorer: dict[str, Any]) -> Certified:
    """What becomes of a passed test whose responses and scorer are these."""
    bench = types.SimpleNamespace(
        names=["harm"], config=types.SimpleNamespace(constraints=[types.SimpleNamespace(name="harm", limit=0.0)])
    )
    monkeypatch.setattr(evaluation, "scorer_reports", lambda *_: {"harm": of_scorer} if of_scorer else {})
    monkeypatch.setattr(evaluation, "measured_from", lambda *_: part)
    anything: Any = types.SimpleNamespace(scorers=[], pool_responses=None, pool_scores=None)
    baselines = {"reference": measured([("a", "x", True, 0.3), ("b", "x", True, 0.5)])}
    return examined(bench, anything, anything, certified(part), baselines)  # type: ignore[arg-type]


GOOD = [(prompt, text, True, cost) for prompt in "abcd" for text, cost in (("x", -1.0), ("y", 0.0))]


def test_a_test_that_was_passed_certifies_only_with_instruments_that_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, measured(GOOD), report()).passed
    assert asked(monkeypatch, measured(GOOD), {}).passed, "the truth"
    constant = [(prompt, text, ended, -0.5) for prompt, text, ended, _ in GOOD]
    cut = [(prompt, text * 9, False, cost) for prompt in "abcdefgh" for text, cost in (("x", -1.0), ("y", 0.0))]
    broken = {
        "spread": (measured(constant), report()),
        "chance": (measured(GOOD), report(low=0.5)),
        "units": (measured(GOOD), report(calibration_error=0.51)),
        "unfinished": (measured(cut), report()),
    }
    for check, (part, of_scorer) in broken.items():
        outcome = asked(monkeypatch, part, of_scorer)
        assert [failure.check for failure in outcome.failures] == [check]
        assert (outcome.passed, outcome.record()["passed"], outcome.certificates[0].passed) == (False, False, True)


def test_the_words_say_which_instrument_failed_and_what_to_do() -> None:
    failure = failed_chance("harm", report(low=0.49))
    assert failure is not None
    result = report_kit.result(status="not_certified", instrument=[failure.record()])
    assert verdict(result).startswith(
        "Not certified: harm ≤ -0.5 could not be measured: the harm model ranks no better"
    )
    assert "accuracy 0.800 [0.490, 0.900]" in explained(result)[0]
    assert any("larger data.held_out" in line for line in meanings(result))
    assert "ranks no better" in result_tags(result)["instrument"]


def test_a_failure_of_one_cost_leaves_the_others_their_certificates() -> None:
    part = measured(GOOD)
    failure = failed_spread("lies", 0.0)
    assert failure is not None
    both = Certified([PASSED, PASSED], part, SHARE, 1, ["harm", "lies"], DECODING, [failure])
    assert [both.record(index)["passed"] for index in (0, 1)] == [True, False]
    assert not both.passed
    assert np.isfinite(both.record(0)["upper"])
    assert both.record(0)["decoding"]["temperature"] == 0.5


@pytest.mark.parametrize("status", ["certified", "not_certified"])
def test_what_a_reader_must_know_of_a_test_is_in_the_verdict(status: str) -> None:
    record = report_kit.result(status=status)
    assert "Note" not in verdict(record)
    record["certificate"]["note"] = "the test is not offered"
    assert verdict(record).endswith(" Note on harm: the test is not offered.")


@pytest.mark.parametrize(("largest", "said"), [(9.9, False), (12.5, True)])
def test_costs_beyond_the_assumed_end_are_warned_of_before_the_training(largest: float, said: bool) -> None:
    table = pd.DataFrame({"cost_harm": [-1.0, largest]})
    config = types.SimpleNamespace(certificate=types.SimpleNamespace(cost_high=10.0))
    bench: Any = types.SimpleNamespace(names=["harm"], config=config, table=lambda ref, name: table)
    scored: Any = types.SimpleNamespace(scorers=[], pool_scores=None)
    lines = beyond_ends(bench, scored)
    assert bool(lines) == said
    assert all("harm 12.5, more than certificate.cost_high (10)" in line for line in lines)

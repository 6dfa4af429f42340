"""Prompts that are near duplicates count as one observation in every interval and test."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cdpo_core.evaluation import result
from cdpo_core.evaluation.measure import Measured, join_scores
from cdpo_core.learning.calibration import calibration_error, scorer_report

SAMPLES = 3
NAMES = ["harm", "other"]


def measured(prompts: int, a_unit: int, seed: int = 0, *, with_units: bool = True) -> Measured:
    """Responses to prompts of which `a_unit` at a time share nearly all that makes them hard."""
    chance = np.random.default_rng(seed)
    level = np.repeat(chance.normal(0, 2, prompts // a_unit), a_unit) + chance.normal(0, 0.1, prompts)
    ids = np.repeat([f"p{number:04d}" for number in range(prompts)], SAMPLES)
    keys = {"prompt_id": ids, "sample": np.tile(np.arange(SAMPLES), prompts)}
    responses = {"response": "Sure.", "finished": True, "log_prob": -1.0, "ref_log_prob": chance.normal(size=len(ids))}
    scores = {"reward": np.repeat(level, SAMPLES) + chance.normal(size=len(ids))}
    if with_units:
        scores["unit"] = np.repeat([f"p{number // a_unit * a_unit:04d}" for number in range(prompts)], SAMPLES)
    scores |= {f"cost_{name}": np.repeat(level, SAMPLES) + chance.normal(size=len(ids)) for name in NAMES}
    return join_scores(pd.DataFrame({**keys, **responses}), pd.DataFrame({**keys, **scores}))


def test_units_of_one_prompt_change_nothing() -> None:
    plain, single = measured(40, 1, with_units=False), measured(40, 1)
    assert plain.summary(NAMES, measured(40, 1, 1)) == single.summary(NAMES, measured(40, 1, 1))
    assert plain.prompt_costs(NAMES).equals(single.unit_costs(NAMES).rename_axis("prompt_id"))
    assert plain.counts() == (40, 40)


def test_a_unit_s_cost_is_the_mean_over_its_prompts_and_every_interval_counts_units() -> None:
    found, rival = measured(200, 5), measured(200, 5, 1)
    costs = found.unit_costs(NAMES)
    assert found.counts() == (200, 40)
    assert costs.shape == (40, 2)
    assert set(costs.index) <= set(found.prompts())
    first = found.table[found.table["prompt_id"] < "p0005"]
    assert costs.loc["p0000", "harm"] == pytest.approx(first["cost_harm"].mean())
    means = costs["harm"].to_numpy()
    assert found.cost("harm").mean == pytest.approx(means.mean())
    assert found.cost("harm").half_width == pytest.approx(stats.t.ppf(0.975, 39) * means.std(ddof=1) / np.sqrt(40))
    blind = Measured(found.table.drop(columns="unit")).summary(NAMES, rival, dict.fromkeys(found.prompts(), "benign"))
    counted = found.summary(NAMES, rival, dict.fromkeys(found.prompts(), "benign"))
    assert blind.keys() == counted.keys()
    for name, wider in (("reward", 1.5), ("cost", 1.5), ("safe_rate", 1.2), ("win_rate", 1.2), ("cvar", 1.2)):
        assert counted[name]["mean"] == pytest.approx(blind[name]["mean"]), name
        assert counted[name]["high"] - counted[name]["low"] > wider * (blind[name]["high"] - blind[name]["low"]), name
    wide, narrow = counted["unsafe_prompts"], blind["unsafe_prompts"]
    assert wide["mean"] == narrow["mean"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_a_scorer_s_accuracy_and_zero_are_known_from_units() -> None:
    chance = np.random.default_rng(0)
    right = np.repeat(chance.random(30) < 0.7, 10)
    scores = np.stack([np.zeros(300), np.where(right, 1.0, -1.0)], axis=1)
    flags = np.repeat(chance.random(30) < 0.5, 10)[:, None].repeat(2, axis=1).astype(int)
    prompts, units = np.array([f"p{n}" for n in range(300)]), np.repeat([f"u{n}" for n in range(30)], 10)
    blind = scorer_report(scores, np.ones(300, dtype=int), flags, prompts, 1.0)
    counted = scorer_report(scores, np.ones(300, dtype=int), flags, prompts, 1.0, units)
    assert (blind["prompts"], blind["units"], counted["prompts"], counted["units"]) == (300, 300, 300, 30)
    assert counted["accuracy"] == blind["accuracy"]
    assert counted["high"] - counted["low"] > 2 * (blind["high"] - blind["low"])
    assert counted["calibration_error"] > 2 * blind["calibration_error"]
    assert counted["calibration_error"] == calibration_error(
        scores.ravel(), flags.ravel() == 1, np.repeat(units, 2), 1.0
    )


@pytest.mark.parametrize("a_template", [5, 10])
def test_false_passes_at_the_limit_keep_delta_with_units_and_not_without(a_template: int) -> None:
    """A policy exactly at its limit, 200 prompts of templates that make most of the cost: Student's test at δ = .05."""
    chance, delta, runs, prompts = np.random.default_rng(a_template), 0.05, 4000, 200
    templates = prompts // a_template
    level = chance.normal(0, 2, (runs, templates))
    costs = level[:, :, None] + chance.normal(0, 2, (runs, templates, a_template))

    def passes(observations: np.ndarray) -> float:
        count = observations.shape[1]
        error = observations.std(axis=1, ddof=1) / np.sqrt(count)
        return float((observations.mean(axis=1) + stats.t.ppf(1 - delta, count - 1) * error <= 0).mean())

    noise = 3 * np.sqrt(delta * (1 - delta) / runs)
    assert passes(costs.mean(axis=2)) <= delta + noise
    assert passes(costs.reshape(runs, -1)) > 2 * delta


def test_words_say_both_numbers_where_they_differ() -> None:
    assert (
        result.tested_on({"prompts": 400}) == result.tested_on({"prompts": 400, "units": 400}) == "400 held-out prompts"
    )
    assert result.tested_on({"prompts": 400, "units": 80}).startswith("400 held-out prompts (80 units")

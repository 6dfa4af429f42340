"""Reward and cost models: what they learn, their units, their report, and scoring with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from learning_kit import (
    HEADS,
    Killed,
    changed,
    digest,
    killed_at,
    scorer_slice,
    sft_slice,
    truth,
    write_data,
)
from scipy.optimize import brentq
from scipy.special import expit

from cdpo_core.errors import InputError, TrainingError
from cdpo_core.evaluation.instrument import same_tokens_warning
from cdpo_core.learning.calibration import calibration, calibration_error, scorer_report
from cdpo_core.learning.preference import load_pairs, tell_apart, train_scorers
from cdpo_core.learning.score import score_responses
from cdpo_core.learning.sft import train_sft
from cdpo_core.models.scorer import load_scorer
from cdpo_core.randomness import numpy_stream
from cdpo_core.stages import Runtime, Slice

GOOD, SOFT, BAD = "Sure, use a tool.", "Well, ask a friend.", "No, wait."


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scorers")
    data = write_data(root / "data", pairs=40)
    train_sft(sft_slice(changed(sft={"steps": 10})), {"data": data}, root / "sft", Runtime())
    return {"data": data, "sft": root / "sft"}


@pytest.fixture(scope="module")
def trained(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train_scorers(scorer_slice(), inputs, out, Runtime())
    return out


def report(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "report.json").read_text())


def random_labels(
    data: Path, out: Path, columns: tuple[str, ...] = ("better", "safer_harm", "unsafe_harm_0", "unsafe_harm_1")
) -> Path:
    """The same data with coin flips as labels."""
    out.mkdir()
    for path in data.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    table = pd.read_parquet(data / "preferences.parquet")
    for column in columns:
        table[column] = np.random.default_rng(7).integers(2, size=len(table)).astype("int8")
    table.to_parquet(out / "preferences.parquet", index=False)
    return out


def test_it_learns_reward_and_cost_in_the_annotators_units(trained: Path) -> None:
    prompts, responses = ["How do I bake cars?", "How do I burn cars?"] * 3, [GOOD, GOOD, BAD, BAD, SOFT, SOFT]
    scores = load_scorer(trained).score(prompts, responses).numpy().reshape(3, 2, 2)
    true = np.array([truth(*pair) for pair in zip(prompts, responses, strict=True)]).reshape(3, 2, 2)
    # Pairs say nothing of what a prompt adds to all its rewards; of costs, the flags do.
    rewards, true_rewards = (values[:, :, 0] - values[:, :, 0].mean(0) for values in (scores, true))
    assert np.corrcoef(rewards.ravel(), true_rewards.ravel())[0, 1] > 0.9
    assert np.corrcoef(scores[:, :, 1].ravel(), true[:, :, 1].ravel())[0, 1] > 0.9
    assert 0.4 < np.polyfit(true[:, :, 1].ravel(), scores[:, :, 1].ravel(), 1)[0] < 1.6


def test_the_report_has_accuracies_with_intervals(trained: Path) -> None:
    for head in ("reward", "harm"):
        figures = report(trained)[head]
        assert figures["pairs"] == 80
        assert figures["prompts"] == 2
        assert figures["low"] <= figures["accuracy"] <= figures["high"]
        assert figures["accuracy"] > 0.7
        assert figures["scale"] > 0
    assert report(trained)["harm"]["flag_auc"] > 0.7
    assert "flag_auc" not in report(trained)["reward"]


def test_a_killed_run_continues_to_the_same_bytes(inputs: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with pytest.raises(Killed):
        train_scorers(scorer_slice(), inputs, tmp_path / "lost", killed_at(23, scratch))
    train_scorers(scorer_slice(), inputs, out, Runtime(scratch=scratch))
    assert digest(out) == digest(trained)


def test_micro_batches_change_nothing_but_rounding(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = scorer_slice(changed(reward={"epochs": 1, "batch": 80}))
    for name, micro_batch in (("whole", 0), ("parts", 7)):
        train_scorers(config, inputs, tmp_path / name, Runtime(micro_batch=micro_batch))
    whole, parts = (json.loads((tmp_path / name / "training.json").read_text())["steps"] for name in ("whole", "parts"))
    assert [step["loss"] for step in parts] == pytest.approx([step["loss"] for step in whole], rel=1e-3)


def test_scratch_draws_other_weights_and_learns_too(inputs: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    train_scorers(scorer_slice(base="scratch"), inputs, tmp_path, Runtime())
    assert report(tmp_path)["reward"]["accuracy"] > 0.7
    assert digest(tmp_path) != digest(trained)


def test_one_head_on_a_loaded_base(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = scorer_slice(changed(reward={"epochs": 1}), base="loaded", heads=HEADS[1:])
    train_scorers(config, {**inputs, "base": inputs["sft"]}, tmp_path, Runtime())
    assert load_scorer(tmp_path).names == ["harm"]
    assert list(report(tmp_path)) == ["harm"]


def test_a_ready_scorer_is_taken_as_it_is_and_may_be_flipped(
    inputs: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    texts = (["How do I burn cars?", "How do I bake cars?"], [GOOD, BAD])
    expected = load_scorer(trained).score(*texts)[:, 1:]
    for sign, factor in (("harmful", 1), ("safe", -1)):
        config = scorer_slice(base="loaded", train=False, sign=sign, heads=HEADS[1:])
        train_scorers(config, {**inputs, "base": trained}, tmp_path / sign, Runtime())
        torch.testing.assert_close(load_scorer(tmp_path / sign).score(*texts), factor * expected)
    assert report(tmp_path / "harmful")["harm"]["accuracy"] == pytest.approx(report(trained)["harm"]["accuracy"])
    assert "check the sign" in report(tmp_path / "safe")["harm"]["warning"]


def test_a_ready_scorer_needs_no_labels(inputs: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    heads = [{"name": "harm", "labels": "violence"}]
    config = scorer_slice(base="loaded", train=False, heads=heads)
    train_scorers(config, {**inputs, "base": trained}, tmp_path, Runtime())
    figures = report(tmp_path)["harm"]
    assert (figures["accuracy"], figures["pairs"]) == (None, 0)
    assert "too few" in figures["warning"]


def test_a_model_without_a_score_head_is_no_ready_scorer(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = scorer_slice(base="loaded", train=False, heads=HEADS[:1])
    with pytest.raises(InputError, match="no score head"):
        train_scorers(config, {**inputs, "base": inputs["sft"]}, tmp_path, Runtime())


def test_a_scorer_that_ranks_at_random_warns_with_its_interval(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = random_labels(inputs["data"], tmp_path / "data")
    config = scorer_slice(changed(reward={"epochs": 1}))
    train_scorers(config, {**inputs, "data": data}, tmp_path / "out", Runtime())
    for figures in report(tmp_path / "out").values():
        assert "no better than chance" in figures["warning"]
        assert f"{figures['low']:.2f}" in figures["warning"]


def test_labels_that_the_data_lacks_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = scorer_slice(heads=[HEADS[0], {"name": "insult", "labels": "insult"}])
    with pytest.raises(InputError, match="no labels 'insult'"):
        train_scorers(config, inputs, tmp_path, Runtime())


def test_labels_that_are_all_missing_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = random_labels(inputs["data"], tmp_path / "data", ())
    table = pd.read_parquet(data / "preferences.parquet")
    table.assign(better=np.int8(-1)).to_parquet(data / "preferences.parquet", index=False)
    with pytest.raises(InputError, match="no pair carries a label for reward"):
        train_scorers(scorer_slice(), {**inputs, "data": data}, tmp_path / "out", Runtime())


def cut_alike(data: Path, out: Path, rows: slice | None, *, held_out: bool = False) -> Path:
    """The same data with responses that differ only beyond the length they are cut at: in these rows, or held out."""
    shutil.copytree(data, out)
    table = pd.read_parquet(out / "preferences.parquet")
    prompts = pd.read_parquet(out / "prompts.parquet").set_index("prompt_id")
    places = table.index[rows] if rows else table.index[prompts.loc[table["prompt_id"], "held_out"] == held_out]
    for side in "01":
        table.loc[places, f"response_{side}"] = f"{GOOD} " * 40 + side
    table.to_parquet(out / "preferences.parquet", index=False)
    return out


def test_pairs_that_cutting_makes_equal_are_counted_and_set_aside(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = cut_alike(inputs["data"], tmp_path / "data", slice(0, 50))
    train_scorers(scorer_slice(), {**inputs, "data": data}, tmp_path / "out", Runtime())
    figures = report(tmp_path / "out")
    held_out, train = load_pairs(data, HEADS, required=True)
    pairs = len(held_out) + len(train)
    assert {(item["same_tokens"], item["all_pairs"]) for item in figures.values()} == {(50, pairs)}
    (line,) = same_tokens_warning(figures)
    assert line.startswith(f"50 of {pairs} pairs are the same tokens")
    kept, encoded, gone = tell_apart(load_scorer(tmp_path / "out"), train)
    assert (len(kept), len(encoded)) == (len(train) - gone, 2 * len(kept))
    assert not any(GOOD + " " + GOOD in first for first, _ in kept.responses)


def test_where_cutting_leaves_no_pair_the_run_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = cut_alike(inputs["data"], tmp_path / "data", None)
    with pytest.raises(InputError, match="the same tokens once they are cut"):
        train_scorers(scorer_slice(), {**inputs, "data": data}, tmp_path / "out", Runtime())


def test_where_cutting_leaves_no_held_out_pair_nothing_is_claimed(inputs: dict[str, Path], tmp_path: Path) -> None:
    data = cut_alike(inputs["data"], tmp_path / "data", None, held_out=True)
    train_scorers(scorer_slice(), {**inputs, "data": data}, tmp_path / "out", Runtime())
    for figures in report(tmp_path / "out").values():
        assert (figures["accuracy"], figures["pairs"]) == (None, 0)


def test_pairs_of_equal_texts_are_the_datas_own(inputs: dict[str, Path], trained: Path) -> None:
    _, train = load_pairs(inputs["data"], HEADS, required=True)
    assert any(first == second for first, second in train.responses)
    assert tell_apart(load_scorer(trained), train)[2] == 0


def test_an_exploding_run_is_a_training_error(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="scorers loss is not finite"):
        train_scorers(scorer_slice(changed(reward={"learning_rate": 1e30})), inputs, tmp_path, Runtime())


def test_a_cost_label_names_the_safer_response(inputs: dict[str, Path]) -> None:
    held_out, train = load_pairs(inputs["data"], HEADS, required=True)
    table = pd.read_parquet(inputs["data"] / "preferences.parquet")
    assert len(held_out) + len(train) == len(table)
    rows = ~table["prompt_id"].isin(held_out.prompt_ids)
    assert (train.higher[:, 0] == table.loc[rows, "better"]).all()
    assert (train.higher[:, 1] == 1 - table.loc[rows, "safer_harm"]).all()
    assert (train.unsafe[:, 1, 1] == table.loc[rows, "unsafe_harm_1"]).all()
    assert (train.unsafe[:, 0] == -1).all()
    assert train.responses[0] == tuple(table.loc[rows, ["response_0", "response_1"]].iloc[0])


def labels_of(scores: np.ndarray, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels of a reward and a cost head, drawn from true scores [N, 2, 2]."""
    random = np.random.default_rng(0)
    gaps = sharpness * (scores[:, 1] - scores[:, 0])
    higher = (random.random(gaps.shape) < expit(gaps)).astype(np.int8)
    unsafe = np.full((len(scores), 2, 2), -1, dtype=np.int8)
    unsafe[:, 1] = random.random((len(scores), 2)) < expit(sharpness * scores[:, :, 1])
    return higher, unsafe


def test_calibration_recovers_the_units() -> None:
    true = np.random.default_rng(1).normal(0.3, 1, (6000, 2, 2))
    higher, unsafe = labels_of(true, 2.0)
    scale, shift = calibration((true - 0.7) / 30, higher, unsafe, 2.0)
    assert scale == pytest.approx([30, 30], rel=0.05)
    assert shift[1] == pytest.approx(0.7, abs=0.05)
    calibrated_rewards = (true[:, :, 0] - 0.7) / 30 * scale[0] + shift[0]
    assert calibrated_rewards.mean() == pytest.approx(0, abs=1e-9)


def test_calibration_of_a_perfect_or_a_useless_scorer_is_finite() -> None:
    scores = np.repeat(np.linspace(-1, 1, 40)[:, None, None], 2, axis=2).repeat(2, axis=1)
    unsafe = np.full((40, 2, 2), -1, dtype=np.int8)
    unsafe[:, 1] = scores[:, :, 1] > 0
    higher = np.full((40, 2), -1, dtype=np.int8)
    scale, shift = calibration(scores, higher, unsafe, 2.0)
    assert 1 < scale[1] < 100
    assert scale[0] == 1
    assert np.isfinite(shift).all()
    against = calibration(-scores, higher, unsafe, 2.0)
    assert (against[0][1], against[1][1]) == (1.0, 0.0)


def test_calibration_without_flags_scales_by_the_pairs() -> None:
    true = np.random.default_rng(1).normal(0, 1, (4000, 2, 1))
    higher = labels_of(np.concatenate([true, true], 2), 2.0)[0][:, :1]
    scale, _ = calibration(true / 5, higher, np.full((4000, 1, 2), -1), 2.0)
    assert scale == pytest.approx([5], rel=0.08)


@pytest.mark.parametrize(
    ("scores", "higher", "accuracy"),
    [((0.0, 1.0), 1, 1.0), ((0.0, 1.0), 0, 0.0), ((1.0, 1.0), 0, 0.5)],
)
def test_report_accuracy_counts_ties_half(scores: tuple[float, float], higher: int, accuracy: float) -> None:
    pairs = np.array([scores, scores])
    figures = scorer_report(pairs, np.array([higher] * 2), np.full((2, 2), -1), np.array(["a", "b"]), 2.0)
    assert figures["accuracy"] == accuracy


def write_responses(folder: Path, rows: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    table = pd.DataFrame({"prompt_id": [row[0] for row in rows], "response": [row[1] for row in rows]})
    table.assign(sample=table.groupby("prompt_id").cumcount()).to_parquet(folder / "responses.parquet", index=False)
    return folder


def test_scores_are_written_in_the_order_of_the_responses(
    inputs: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    rows = [("p03", GOOD), ("p00", BAD), ("p03", GOOD), ("p00", GOOD)]
    responses = write_responses(tmp_path / "responses", rows)
    config = Slice({"constraints": [{"name": "harm", "labels": "harm"}], "oracle": False})
    given = {**inputs, "responses": responses, "scorers_0": trained}
    score_responses(config, given, tmp_path, Runtime())
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert list(table.columns) == ["prompt_id", "sample", "unit", "reward", "cost_harm"]
    assert table["prompt_id"].tolist() == [row[0] for row in rows]
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet").set_index("prompt_id")["prompt"]
    expected = load_scorer(trained).score([prompts[name] for name, _ in rows], [text for _, text in rows])
    assert table[["reward", "cost_harm"]].to_numpy() == pytest.approx(expected.numpy(), abs=1e-5)
    assert table.loc[0, "reward"] == table.loc[2, "reward"]


def test_a_score_that_no_scorer_gives_is_refused(inputs: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    responses = write_responses(tmp_path / "responses", [("p00", GOOD)])
    config = Slice({"constraints": [{"name": "insult", "labels": "insult"}], "oracle": False})
    with pytest.raises(InputError, match="no scorer gives 'insult'"):
        score_responses(config, {**inputs, "responses": responses, "scorers_0": trained}, tmp_path, Runtime())


def test_the_error_of_the_units_is_what_new_prompts_would_show() -> None:
    random = numpy_stream(0, "calibration error")
    shifts = []
    errors = []
    for _ in range(200):
        bias = np.repeat(random.normal(0, 0.5, 60), 20)
        cost = np.repeat(random.normal(0, 1.5, 60), 20) + random.normal(0, 0.7, 1200)
        unsafe = random.random(1200) < expit(2 * (cost + bias))
        ids = np.repeat(np.arange(60).astype(str), 20)
        errors.append(calibration_error(cost, unsafe, ids, 2.0))
        shifts.append(brentq(lambda b, c=cost, u=unsafe: (u - expit(2 * (c + b))).sum(), -3, 3))
    assert np.mean(errors) == pytest.approx(np.std(shifts), rel=0.2)

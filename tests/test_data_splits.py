"""Quarantine, the prepared tables, and splits by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from config_kit import experiment_config, limited

from cdpo_core.config import SplitSizes
from cdpo_core.data.prepare import check_source, prepare_data
from cdpo_core.data.schema import prompt_ids
from cdpo_core.data.splits import (
    DRAWS,
    FITTED,
    HELD_OUT,
    balanced_splits,
    deal,
    make_splits,
    pool_sizes,
    split_preferences,
    split_sizes,
    spread,
)
from cdpo_core.errors import InputError
from cdpo_core.pipeline import DATA, SPLITS
from cdpo_core.randomness import numpy_stream
from cdpo_core.stages import Runtime, pick

KINDS = np.array(["benign", "borderline", "harmful"])


def write_pairs(path: Path, prompts: int = 200) -> Path:
    """Three pairs a prompt; half of the prompts have unsafe answers and a safer label."""
    rows = [
        {
            "prompt": f"How about {prompt}?" if pair else f" How  about\n{prompt}? ",
            "response_0": f"Sure, {prompt} {pair}.",
            "response_1": f"No, {prompt} {min(pair, 1)}.",
            "is_response_0_safe": prompt % 2 == 0,
            "is_response_1_safe": True,
            "better_response_id": pair % 2,
            "safer_response_id": 1 if prompt % 2 else None,
        }
        for prompt in range(prompts)
        for pair in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(path: Path, out: Path, **sections: Any) -> Path:
    config = limited({**sections, "data": {"source": str(path), **sections.get("data", {})}})
    out.mkdir()
    prepare_data(pick(config, DATA.fields), {"source": path}, out, Runtime())
    return out


def test_the_prepared_tables(tmp_path: Path) -> None:
    out = prepared(write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")
    prompts = pd.read_parquet(out / "prompts.parquet")
    preferences = pd.read_parquet(out / "preferences.parquet")
    demonstrations = pd.read_parquet(out / "demonstrations.parquet")
    chosen = prompts[prompts["split"] == "preferences"]
    assert list(prompts.columns) == ["prompt_id", "prompt", "kind", "unit", "split", "held_out"]
    assert (len(prompts), len(chosen), int(chosen["held_out"].sum())) == (200, 50, 10)
    assert not prompts.loc[prompts["split"] == "pool", "held_out"].any()
    assert prompts["prompt_id"].is_unique
    assert preferences["pair_id"].is_unique
    assert set(preferences["prompt_id"]) == set(chosen["prompt_id"])
    assert len(preferences) == 3 * len(chosen)
    labels = ["better", "safer_harm", "unsafe_harm_0", "unsafe_harm_1"]
    assert list(preferences.columns) == ["pair_id", "prompt_id", "response_0", "response_1", *labels]
    assert all(preferences[labels].dtypes == np.int8)
    assert set(demonstrations["prompt_id"]) == set(chosen.loc[~chosen["held_out"], "prompt_id"])
    assert not demonstrations.duplicated(["prompt_id", "response"]).any()
    assert len(demonstrations) == 5 * 40
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["sharpness"], summary["labels"], summary["pairs"]) == (1.0, ["harm"], 600)


def test_both_kinds_of_prompts_reach_every_part(tmp_path: Path) -> None:
    out = prepared(write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")
    preferences = pd.read_parquet(out / "preferences.parquet")
    held_out = preferences["prompt_id"].map(pd.read_parquet(out / "prompts.parquet").set_index("prompt_id")["held_out"])
    for part in (preferences[held_out], preferences[~held_out]):
        assert abs((part["safer_harm"] == 1).mean() - 0.5) <= 0.1


def test_the_same_bytes_whatever_the_file_is_called(tmp_path: Path) -> None:
    first = prepared(write_pairs(tmp_path / "a.jsonl"), tmp_path / "first")
    second = prepared(write_pairs(tmp_path / "b.jsonl"), tmp_path / "second")
    other_seed = prepared(tmp_path / "a.jsonl", tmp_path / "third", seed=1)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert (first / "prompts.parquet").read_bytes() != (other_seed / "prompts.parquet").read_bytes()


def test_quarantine_is_counted_by_reason_and_shown(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["response_0"] = ""
    rows[5]["response_0"] = rows[5]["response_1"]
    rows[7].update(response_0=rows[6]["response_1"], response_1=rows[6]["response_0"], prompt=rows[6]["prompt"])
    rows[10]["prompt"] = "x" * 4001
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = prepared(path, tmp_path / "out")
    record = json.loads((out / "quarantine.json").read_text())
    assert (record["rows"], record["kept"]) == (600, 596)
    assert {(example["row"], example["reason"]) for example in record["examples"]} == {
        (4, "empty response"),
        (6, "the two responses are identical"),
        (8, "duplicate of an earlier pair"),
        (11, "prompt too long"),
    }
    assert record["quarantined"] == {example["reason"]: 1 for example in record["examples"]}
    report = check_source(limited({"data": {"source": str(path)}}))
    assert report.quarantined == record["quarantined"]
    assert any("pairs.jsonl:4: empty response" in line for line in report.lines())
    assert json.dumps(report.as_dict())


def test_prompts_are_told_apart_by_their_normalised_text() -> None:
    ids = prompt_ids(["Is it  so?", " Is it so?\n", "Caf\u00e9", "Cafe\u0301", "is it so?"])
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (2000, {FITTED: 400, HELD_OUT: 100, "policy": 600, "selection": 300, "certificate": 400, "test": 200}),
        (244, {FITTED: 49, HELD_OUT: 12, "policy": 73, "selection": 37, "certificate": 49, "test": 24}),
        (50, {FITTED: 10, HELD_OUT: 2, "policy": 15, "selection": 8, "certificate": 10, "test": 5}),
    ],
)
def test_split_sizes(prompts: int, expected: dict[str, int]) -> None:
    assert split_sizes(prompts, SplitSizes(), 0.2) == expected
    assert sum(expected.values()) == prompts


def test_pool_sizes_always_add_up() -> None:
    for pool in range(200):
        assert sum(pool_sizes(pool, SplitSizes()).values()) == pool


def test_preferences_are_spread_over_the_kinds() -> None:
    kinds = np.repeat(KINDS, [500, 300, 200])
    chosen, held_out = split_preferences(kinds, SplitSizes(), 0.2, seed=3)
    assert (chosen.sum(), held_out.sum(), (held_out & ~chosen).sum()) == (250, 50, 0)
    assert [(kinds[chosen] == kind).sum() for kind in KINDS] == pytest.approx([125, 75, 50], abs=2)
    assert [(kinds[held_out] == kind).sum() for kind in KINDS] == pytest.approx([25, 15, 10], abs=2)
    again, _ = split_preferences(kinds, SplitSizes(), 0.2, seed=3)
    other, _ = split_preferences(kinds, SplitSizes(), 0.2, seed=4)
    assert (chosen == again).all()
    assert not (chosen == other).all()


def test_spread_deals_exact_sizes_and_every_item_anywhere() -> None:
    sizes = {"a": 3, "b": 1, "empty": 0, "c": 6}
    keys = [np.arange(10)[::-1]]
    dealt = np.stack([spread(keys, sizes, np.random.default_rng(seed)) for seed in range(2000)])
    for name, size in sizes.items():
        assert ((dealt == name).sum(axis=1) == size).all()
        np.testing.assert_allclose((dealt == name).mean(axis=0), size / 10, atol=0.17)


def pool_folder(tmp_path: Path, prompts: int, preferences: int, costs: int = 1) -> dict[str, Path]:
    """A data and a scores artifact: kinds with different mean costs, four samples a prompt, a related second cost."""
    generator = np.random.default_rng(0)
    kinds = np.repeat(KINDS, -(-prompts // 3))[:prompts]
    ids = [f"p{number}" for number in generator.permutation(prompts)]
    split = np.where(np.arange(prompts) % (prompts // preferences) == 0, "preferences", "pool")
    frame = pd.DataFrame(
        {"prompt_id": ids, "prompt": ids, "kind": kinds, "unit": ids, "split": split, "held_out": False}
    )
    means = pd.Series(kinds).map({"benign": -2.5, "borderline": 0.0, "harmful": 2.0}).to_numpy()
    means = means + generator.normal(0, 1.5, prompts)
    scores = pd.DataFrame(
        {
            "prompt_id": np.repeat(ids, 4),
            "sample": np.tile(np.arange(4), prompts),
            "reward": 0.0,
            "cost_harm": np.repeat(means, 4) + generator.normal(0, 0.5, 4 * prompts),
        }
    )
    if costs == 2:
        scores["cost_other"] = np.repeat(0.5 * means + generator.normal(0, 2, prompts), 4)
    for name, table in (("prompts", frame), ("scores", scores)):
        table.to_parquet(tmp_path / f"{name}.parquet", index=False)
    return {"data": tmp_path, "scores": tmp_path}


def test_dealing_units_of_one_prompt_is_spreading() -> None:
    """The splits that were made before there were units are made still, to the byte."""
    random = np.random.default_rng(1)
    kinds, costs = random.choice(KINDS, 400), random.normal(size=(400, 1))
    sizes = pool_sizes(400, SplitSizes())
    stream = numpy_stream(5, "splits")
    draws = [spread([kinds, costs[:, 0]], sizes, stream) for _ in range(DRAWS)]
    gaps = [np.ptp([costs[draw == name].mean() for name in sizes]) for draw in draws]
    expected = draws[int(np.argmin(gaps))]
    names = np.array([f"p{number:03d}" for number in random.permutation(400)], dtype=object)
    assert (balanced_splits(kinds, costs, sizes, 5) == expected).all()
    assert (balanced_splits(kinds, costs, sizes, 5, names) == expected).all()


@pytest.mark.parametrize("largest", [2, 6, 40])
def test_no_unit_stands_on_two_sides_and_sizes_are_nearly_met(largest: int) -> None:
    random = np.random.default_rng(largest)
    counts = np.minimum(random.geometric(1 / largest, 900), largest)
    rows = random.permutation(np.repeat(np.arange(900), counts))
    units = np.array([f"u{row:03d}" for row in rows], dtype=object)
    kinds, costs = KINDS[rows % 3], (rows % 3 - 1.0)[:, None] + random.normal(0, 0.1, (len(rows), 1))
    sizes = pool_sizes(len(rows), SplitSizes())
    split = balanced_splits(kinds, costs, sizes, 0, units)
    table = pd.DataFrame({"unit": units, "split": split, "cost": costs[:, 0]})
    assert (table.groupby("unit")["split"].nunique() == 1).all()
    for name, size in sizes.items():
        assert abs((split == name).sum() - size) <= largest
    means = table.groupby(["split", "unit"])["cost"].mean().groupby("split").mean()
    assert np.ptp(means) < 0.05
    chosen, held_out = split_preferences(kinds, SplitSizes(), 0.2, 0, units)
    sides = pd.DataFrame({"unit": units, "side": chosen.astype(int) + held_out}).groupby("unit")["side"].nunique()
    assert (sides == 1).all()
    assert abs(chosen.mean() - 0.25) < 0.02


def test_large_units_go_to_no_part_in_particular() -> None:
    """A part that never gets the large ones would speak for another population than the others."""
    counts, sizes = np.array([30, *[1] * 70]), {"a": 60, "b": 30, "c": 10}
    order = [np.arange(71)]
    dealt = [deal(order, counts, sizes, np.random.default_rng(seed)) for seed in range(1000)]
    shares = pd.Series([draw[0] for draw in dealt]).value_counts(normalize=True)
    np.testing.assert_allclose(shares[["a", "b", "c"]], [0.6, 0.3, 0.1], atol=0.05)
    assert all(counts[draw == "a"].sum() <= 60 for draw in dealt)


def splits_of(inputs: dict[str, Path], out: Path, **sections: Any) -> pd.DataFrame:
    out.mkdir(exist_ok=True)
    make_splits(pick(limited(sections), SPLITS.fields), inputs, out, Runtime())
    return pd.read_parquet(out / "splits.parquet")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("costs", "most"), [(1, 0.01), (2, 0.05)])
def test_splits_agree_in_kind_and_mean_costs(costs: int, most: float, seed: int, tmp_path: Path) -> None:
    inputs = pool_folder(tmp_path, 2000, 500, costs)
    splits = splits_of(inputs, tmp_path / "out", seed=seed)
    prompts, scores = pd.read_parquet(tmp_path / "prompts.parquet"), pd.read_parquet(tmp_path / "scores.parquet")
    assert set(splits["prompt_id"]) == set(prompts.loc[prompts["split"] == "pool", "prompt_id"])
    assert splits["prompt_id"].is_unique
    assert splits["split"].value_counts().to_dict() == {
        "certificate": 400,
        "policy": 600,
        "selection": 300,
        "test": 200,
    }
    joined = splits.merge(prompts.drop(columns="split"), on="prompt_id")
    names = ["cost_harm", "cost_other"][:costs]
    joined = joined.join(scores.groupby("prompt_id")[names].mean(), on="prompt_id")
    means = joined.groupby("split")[names].mean()
    assert (means.max() - means.min()).max() < most
    shares = pd.crosstab(joined["split"], joined["kind"], normalize="index")
    assert (shares.max() - shares.min()).max() < 0.015
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    of_test = means.loc["test"].tolist()
    assert summary["test"] == {
        "prompts": 200,
        "units": 200,
        "mean_cost": pytest.approx(of_test if costs > 1 else of_test[0]),
    }


@pytest.mark.parametrize("seed", range(3))
def test_small_splits_agree_too(seed: int, tmp_path: Path) -> None:
    inputs = pool_folder(tmp_path, 240, 120)
    sections = {
        "data": {"splits": {"preferences": 0.5, "policy": 0.2, "selection": 0.1, "certificate": 0.1, "test": 0.1}}
    }
    splits_of(inputs, tmp_path / "out", seed=seed, **sections)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [summary[name]["prompts"] for name in summary] == [48, 24, 24, 24]
    means = [part["mean_cost"] for part in summary.values()]
    assert max(means) - min(means) < 0.15


def test_splits_depend_on_the_seed_alone(tmp_path: Path) -> None:
    inputs = pool_folder(tmp_path, 400, 100)
    first = splits_of(inputs, tmp_path / "a")
    assert first.equals(splits_of(inputs, tmp_path / "b"))
    assert not first.equals(splits_of(inputs, tmp_path / "c", seed=1))


def test_splits_refuse_a_small_pool_and_missing_scores(tmp_path: Path) -> None:
    inputs = pool_folder(tmp_path, 24, 12)
    with pytest.raises(InputError, match="too few prompts to split: 24 prompts") as caught:
        splits_of(inputs, tmp_path / "out")
    assert "selection 2 (needs 4)" in caught.value.where
    inputs = pool_folder(tmp_path, 400, 100)
    pd.read_parquet(tmp_path / "scores.parquet").iloc[8:].to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="no finite cost_harm"):
        splits_of(inputs, tmp_path / "out")


def test_the_testbed_is_checked_by_its_size() -> None:
    report = check_source(experiment_config())
    assert (report.format, report.prompts, report.splits["certificate"]) == ("testbed", 2000, 400)
    scarce = {"testbed": {"prompts": 50}, "data": {"held_out": 0.05}}
    with pytest.raises(InputError, match=r"preferences \(held out\)"):
        check_source(limited(scarce))


def test_the_xstest_preset_wants_its_source_from_the_command_line() -> None:
    import yaml

    path = Path(__file__).resolve().parents[1] / "configs" / "xstest.yaml"
    config = limited(yaml.safe_load(path.read_text()))
    with pytest.raises(InputError, match="no data is given") as caught:
        check_source(config)
    assert "--data.source" in caught.value.fix
    assert split_sizes(244, config.data.splits, config.data.held_out)["certificate"] == 24

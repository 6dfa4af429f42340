"""The testbed's data set: prompts, demonstrations and labels, equal in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from config_kit import limited

from cdpo_core.artifacts import files_digest, folder_files
from cdpo_core.errors import InputError
from cdpo_core.pipeline import TESTBED_DATA
from cdpo_core.stages import Runtime, pick
from cdpo_core.testbed import grammar
from cdpo_core.testbed.annotators import SLIPS, draw_prompts, label_pairs, make_world
from cdpo_core.testbed.world import KINDS, World

SMALL = {"testbed": {"seed": 3, "prompts": 120, "pairs_per_prompt": 5, "demonstrations": 300}}


def write_data(out: Path) -> None:
    config = limited(SMALL)
    make_world(pick(config, TESTBED_DATA.fields), {}, out, Runtime())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def test_prompts_are_split_with_every_part_labelled() -> None:
    prompts = draw_prompts(7, 2000, 0.25, 0.2)

    assert prompts["prompt_id"].is_unique
    assert prompts["prompt"].is_unique
    counts = prompts.groupby(["split", "kind"]).size()
    assert [counts["preferences", kind] for kind in KINDS] == [220, 70, 210]
    assert [counts["pool", kind] for kind in KINDS] == [660, 210, 630]
    assert prompts["held_out"].sum() == 100
    assert not prompts.loc[prompts["split"] == "pool", "held_out"].any()

    fitted = prompts[(prompts["split"] == "preferences") & ~prompts["held_out"]]
    for name, part in grammar.PARTS.items():
        assert np.bincount(fitted[name], minlength=len(part)).min() >= 8
    assert draw_prompts(7, 2000, 0.25, 0.2).equals(prompts)
    assert not draw_prompts(8, 2000, 0.25, 0.2)["prompt_id"].equals(prompts["prompt_id"])


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="more than the testbed can give") as caught:
        draw_prompts(0, 9000, 0.25, 0.2)
    assert caught.value.where == "testbed.prompts"


def test_the_tables_hold_what_later_stages_read(data: Path) -> None:
    prompts, pairs, demonstrations = (
        pd.read_parquet(data / f"{name}.parquet") for name in ("prompts", "preferences", "demonstrations")
    )
    assert list(prompts) == ["prompt_id", "prompt", "kind", "unit", "split", "held_out", *grammar.PARTS]
    assert (prompts["unit"] == prompts["prompt_id"]).all()
    assert len(prompts) == 120
    assert list(pairs) == [
        *("pair_id", "prompt_id", "response_0", "response_1", "better"),
        *("safer_harm", "unsafe_harm_0", "unsafe_harm_1"),
    ]
    assert len(pairs) == 30 * 5
    assert pairs["pair_id"].is_unique
    assert (pairs["response_0"] != pairs["response_1"]).all()
    assert set(pairs["prompt_id"]) == set(prompts.loc[prompts["split"] == "preferences", "prompt_id"])
    for name in ("better", "safer_harm", "unsafe_harm_0", "unsafe_harm_1"):
        assert pairs[name].dtype == np.int8
        assert set(pairs[name]) == {0, 1}

    assert list(demonstrations) == ["prompt_id", "prompt", "response"]
    assert len(demonstrations) == 300
    assert demonstrations["prompt_id"].is_unique, "far more prompts than demonstrations: none twice"
    assert not set(demonstrations["prompt_id"]) & set(prompts.loc[prompts["split"] == "pool", "prompt_id"])
    assert demonstrations["response"].map(grammar.parse).min() >= 0

    summary = json.loads((data / "summary.json").read_text())
    assert summary["sharpness"] == 2.0
    assert summary["labels"] == ["harm"]
    assert (summary["prompts"], summary["pairs"]) == (120, 150)
    quarantine = json.loads((data / "quarantine.json").read_text())
    assert quarantine == {"rows": 150, "kept": 150, "quarantined": {}, "examples": []}


def test_a_second_cost_adds_its_labels_and_nothing_else(data: Path, tmp_path: Path) -> None:
    config = limited({"testbed": {**SMALL["testbed"], "costs": 2}})
    make_world(pick(config, TESTBED_DATA.fields), {}, tmp_path, Runtime())
    one, two = (pd.read_parquet(folder / "preferences.parquet") for folder in (data, tmp_path))
    assert list(two) == [*one, "safer_dishonesty", "unsafe_dishonesty_0", "unsafe_dishonesty_1"]
    assert two[list(one)].equals(one)
    for name in ("prompts", "demonstrations"):
        assert (tmp_path / f"{name}.parquet").read_bytes() == (data / f"{name}.parquet").read_bytes()
    assert json.loads((tmp_path / "summary.json").read_text())["labels"] == ["harm", "dishonesty"]
    world = World.load(tmp_path / "world.json")
    _, costs = world.score_texts(two["prompt_id"].tolist(), two["response_0"].tolist())
    assert (costs[two["unsafe_dishonesty_0"] == 1, 1].mean() - costs[two["unsafe_dishonesty_0"] == 0, 1].mean()) > 2


def test_annotators_prefer_by_bradley_terry(data: Path) -> None:
    world = World.load(data / "world.json")
    prompts = pd.read_parquet(data / "prompts.parquet")
    pairs = label_pairs(world, prompts, 300, 2.0)
    first = world.score_texts(pairs["prompt_id"].tolist(), pairs["response_0"].tolist())
    second = world.score_texts(pairs["prompt_id"].tolist(), pairs["response_1"].tolist())
    log_odds = {
        "better": 2 * (second[0] - first[0]),
        "safer_harm": 2 * (first[1] - second[1])[:, 0],
        "unsafe_harm_0": 2 * first[1][:, 0],
        "unsafe_harm_1": 2 * second[1][:, 0],
    }
    for name, odds in log_odds.items():
        probability = 1 / (1 + np.exp(-odds))
        for low in np.arange(0.05, 0.95, 0.1):
            here = (probability > low) & (probability < low + 0.1)
            error = pairs[name].to_numpy()[here].mean() - probability[here].mean()
            assert abs(error) < 4 * np.sqrt(0.25 / here.sum()), (name, low)


def test_a_share_of_the_labelled_responses_is_broken_and_judged_so(data: Path) -> None:
    world = World.load(data / "world.json")
    pairs = label_pairs(world, pd.read_parquet(data / "prompts.parquet"), 300, 2.0)
    texts = pd.concat([pairs["response_0"], pairs["response_1"]], ignore_index=True)
    broken = (texts.map(grammar.parse) < 0).to_numpy()
    assert 0.5 * SLIPS < broken.mean() < 1.5 * SLIPS
    assert (texts.str.strip() == texts).all()
    assert texts.str.len().min() > 0
    unsafe = pd.concat([pairs["unsafe_harm_0"], pairs["unsafe_harm_1"]]).to_numpy()
    assert unsafe[broken].mean() > unsafe[~broken].mean() + 0.1
    one = broken.reshape(2, -1).sum(0) == 1
    worse = np.where(broken.reshape(2, -1)[0], pairs["better"], 1 - pairs["better"])[one]
    assert worse.mean() > 0.9


def test_another_process_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from pathlib import Path\nfrom test_testbed_data import write_data\nwrite_data(Path({str(tmp_path)!r}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[1])
    assert files_digest(folder_files(tmp_path)) == files_digest(folder_files(data))

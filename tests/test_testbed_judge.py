"""The judge: what it says of policies whose worth is known, and its two stages on small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from config_kit import limited

from cdpo_core.errors import InputError
from cdpo_core.models.policy import new_policy, save_policy
from cdpo_core.models.scorer import Scorer, ScorerText, save_scorer
from cdpo_core.models.tokenizer import train_tokenizer
from cdpo_core.pipeline import TESTBED_DATA
from cdpo_core.randomness import numpy_stream
from cdpo_core.stages import Runtime, Slice, pick
from cdpo_core.testbed.annotators import draw_prompts, make_world, part_indices
from cdpo_core.testbed.calibration import calibrate
from cdpo_core.testbed.judge import (
    JUDGED_SPLITS,
    enumerate_policy,
    enumerate_reference,
    judge_policy,
    judged_subset,
)
from cdpo_core.testbed.judgement import Problem, judge
from cdpo_core.testbed.oracle import exact_optimum, expected, normalised
from cdpo_core.testbed.world import World

BETA, LIMIT = 1.0, -0.5
NOTHING_SEEN = np.zeros(80, dtype=bool)


def splits_of(prompts: pd.DataFrame) -> pd.DataFrame:
    pool = prompts.loc[prompts["split"] == "pool", "prompt_id"]
    names = np.resize(JUDGED_SPLITS, len(pool))
    return pd.DataFrame({"prompt_id": pool.to_numpy(), "split": names})


@pytest.fixture(scope="module")
def problem() -> Problem:
    prompts = draw_prompts(4, 100, 0.2, 0.2)
    parts = part_indices(prompts[prompts["split"] == "pool"])
    world = calibrate(4, beta=BETA, limit=LIMIT, sharpness=2.0, pool=parts)
    return Problem(world.demonstrator_log_probs(parts), *world.scores(parts), [LIMIT], BETA)


def judged(
    problem: Problem, raw: np.ndarray | None, learned: tuple[np.ndarray, np.ndarray] | None = None, margin: float = 0.2
) -> dict:
    return judge(problem, raw, learned, [margin], NOTHING_SEEN, ["harm"])


def test_the_reference_captures_nothing_and_the_optimum_everything(problem: Problem) -> None:
    best = problem.optimum([LIMIT])
    reference, optimum = judged(problem, problem.log_ref), judged(problem, best.log_policy)

    assert reference["captured"] == pytest.approx(0)
    assert reference["true_kl"] == pytest.approx(0)
    assert optimum["captured"] == pytest.approx(1)
    assert optimum["true_cost"] == pytest.approx(LIMIT, abs=1e-4)
    assert optimum["true_reward"] == pytest.approx(optimum["optimal_reward"])
    assert optimum["support_mass"] == pytest.approx(1)
    assert optimum["optimal_lambda"] == pytest.approx(best.lambda_[0])
    assert (optimum["at_zero"] + optimum["floor"]) / 2 == pytest.approx(LIMIT, abs=1e-4)
    assert optimum["reference"]["cost"] == pytest.approx(reference["true_cost"])
    assert optimum["prompts"] == 80


def test_a_policy_between_captures_a_part(problem: Problem) -> None:
    best = problem.optimum([LIMIT])
    shares = [
        judged(problem, normalised((1 - step) * problem.log_ref + step * best.log_policy))["captured"]
        for step in (0.25, 0.5, 0.75)
    ]
    assert 0 < shares[0] < shares[1] < shares[2] < 1


def test_mass_off_the_grammar_costs_the_worst(problem: Problem) -> None:
    best = problem.optimum([LIMIT])
    record = judged(problem, best.log_policy + np.log(0.9))

    assert record["captured"] == pytest.approx(1), "J compares renormalised policies"
    assert record["support_mass"] == pytest.approx(0.9)
    assert record["true_cost"] == pytest.approx(0.9 * LIMIT + 0.1 * problem.costs.max(1).mean(), abs=1e-4)
    assert record["true_reward"] == pytest.approx(0.9 * best.reward + 0.1 * problem.reward.min(1).mean(), abs=1e-4)
    assert record["true_costs"] == [record["true_cost"]]


def test_ceilings(problem: Problem) -> None:
    assert judged(problem, None, margin=0.0)["captured_ceiling"] == pytest.approx(1, abs=1e-6)
    ceilings = [judged(problem, None, margin=margin)["captured_ceiling"] for margin in (0.1, 0.3, 0.6)]
    assert 1 > ceilings[0] > ceilings[1] > ceilings[2] > 0
    assert judged(problem, None, margin=3.0)["captured_ceiling"] is None, "limit minus margin is below the floor"

    truth = (problem.reward, problem.costs)
    assert judged(problem, None, truth)["scorer_ceiling"] == pytest.approx(1, abs=1e-6)
    noise = numpy_stream(0, "noise").normal(size=problem.reward.shape)
    noisy = (problem.reward + noise, problem.costs + 0.5 * noise[..., None])
    record = judged(problem, None, noisy)
    proxy = exact_optimum(problem.log_ref, *noisy, [LIMIT], BETA)
    assert record["scorer_ceiling"] == pytest.approx(problem.captured(proxy.log_policy, problem.optimum([LIMIT])))
    assert 0 < record["scorer_ceiling"] < 1
    assert record["scorers"]["harm"]["correlation"] > record["scorers"]["harm"]["within"] > 0.5
    assert judged(problem, None)["scorer_ceiling"] == 1.0, "oracle scorers are the truth"
    both = judged(problem, None)
    assert both["certified_scorer_ceiling"] == pytest.approx(both["captured_ceiling"]), "with its margin too"
    assert record["certified_scorer_ceiling"] <= record["scorer_ceiling"] + 1e-6


def test_the_bias_of_a_cost_model_is_shown(problem: Problem) -> None:
    record = judged(problem, None, (3 * problem.reward, problem.costs + 0.4))
    assert record["scorers"]["harm"]["bias"] == pytest.approx(0.4)
    assert record["scorers"]["harm"]["correlation"] == pytest.approx(1)
    assert record["scorers"]["reward"] == {"correlation": pytest.approx(1), "within": pytest.approx(1), "bias": None}


def test_no_policy_and_no_feasible_limit(problem: Problem) -> None:
    without = judged(problem, None)
    assert without["captured"] is without["true_cost"] is without["support_mass"] is None
    assert without["optimal_lambda"] > 0

    below = Problem(problem.log_ref, problem.reward, problem.costs, [-9.0], BETA)
    record = judged(below, problem.log_ref)
    assert not record["feasible"]
    assert (
        record["captured"] is record["optimal_cost"] is record["captured_ceiling"] is record["scorer_ceiling"] is None
    )
    reference = expected(problem.log_ref, problem.log_ref, problem.reward, problem.costs)
    assert record["true_cost"] == pytest.approx(reference.costs[0])


def test_the_frontier_and_the_named_limits_run_from_zero_to_the_floor(problem: Problem) -> None:
    record = judged(problem, None)
    lambdas = [point["lambda"] for point in record["frontier"]]
    costs = [point["cost"] for point in record["frontier"]]

    assert lambdas[0] == pytest.approx(0, abs=1e-3)
    assert lambdas == sorted(lambdas)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(record["at_zero"], abs=1e-4)
    tight, middle, loose = (record["placements"][name][0] for name in ("tight", "middle", "loose"))
    assert record["floor"] < tight < middle < loose < record["at_zero"]
    assert middle == pytest.approx(LIMIT, abs=1e-4)


def test_training_prompts_are_reported_apart(problem: Problem) -> None:
    seen = np.arange(80) < 20
    best = problem.optimum([LIMIT])
    raw = np.where(seen[:, None], best.log_policy, problem.log_ref)
    record = judge(problem, raw, None, [0.2], seen, ["harm"])

    assert record["prompts"] == 60
    assert record["captured"] == pytest.approx(0)
    assert record["policy_prompts"]["captured"] > 0.9


def test_several_limits(problem: Problem) -> None:
    # A second cost that opposes the first a little.
    costs = np.concatenate([problem.costs, -0.3 * problem.costs + problem.reward[..., None] * 0.2], -1)
    both = Problem(problem.log_ref, problem.reward, costs, [LIMIT, 1.0], BETA)
    best = both.optimum(both.limits)
    record = judge(both, best.log_policy, (problem.reward, costs), [0.1, 0.1], NOTHING_SEEN, ["harm", "other"])

    assert record["captured"] == pytest.approx(1)
    assert len(record["true_costs"]) == 2
    assert set(record["scorers"]) == {"reward", "harm", "other"}


@pytest.mark.parametrize("count", [1, 2])
def test_the_judged_prompts_stand_for_their_splits(count: int) -> None:
    prompts = draw_prompts(5, 2000, 0.25, 0.2)
    parts = part_indices(prompts[prompts["split"] == "pool"])
    world = calibrate(5, beta=BETA, limit=LIMIT, sharpness=2.0, pool=parts, costs=count)
    table = prompts.drop(columns="split").merge(splits_of(prompts), on="prompt_id")
    chosen = judged_subset(world, table, Slice({"evaluation": {"judged_prompts": 60}}))
    shuffled = judged_subset(world, table.sample(frac=1, random_state=1), Slice({"evaluation": {"judged_prompts": 60}}))

    assert chosen.equals(shuffled)
    assert chosen["split"].value_counts().to_dict() == dict.fromkeys(JUDGED_SPLITS, 60)

    def optimal_costs(names: pd.Series) -> list[float]:
        reward, costs = world.true_scores(names)
        log_ref = world.demonstrator_log_probs_of(names)
        tilted = np.exp(normalised(log_ref + reward - 0.8 * costs[..., 0]))
        return (tilted[..., None] * costs).sum(1).mean(0).tolist()

    for split in JUDGED_SPLITS:
        whole = table.loc[table["split"] == split]
        part = chosen.loc[chosen["split"] == split]
        assert optimal_costs(part["prompt_id"]) == pytest.approx(optimal_costs(whole["prompt_id"]), abs=0.08)
        shares = whole["kind"].value_counts(normalize=True) - part["kind"].value_counts(normalize=True)
        assert shares.abs().max() < 0.02


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("data", "splits", "reference", "policy", "scorers_0")
    folders = {name: tmp_path_factory.mktemp(name) for name in names}
    config = limited(
        {
            "testbed": {"prompts": 60, "pairs_per_prompt": 2, "demonstrations": 200},
            "policy": {"hidden_size": 16, "layers": 1, "heads": 2},
        }
    )
    make_world(pick(config, TESTBED_DATA.fields), {}, folders["data"], Runtime())
    splits = splits_of(pd.read_parquet(folders["data"] / "prompts.parquet"))
    splits.to_parquet(folders["splits"] / "splits.parquet", index=False)
    texts = pd.read_parquet(folders["data"] / "demonstrations.parquet")
    tokenizer = train_tokenizer([*texts["prompt"], *texts["response"]], 600)
    for seed, name in enumerate(("reference", "policy")):
        save_policy(new_policy(config.policy, tokenizer, seed), folders[name])
    backbone = new_policy(config.policy, tokenizer, 2).model.model
    torch.manual_seed(0)
    text = ScorerText("policy", "{prompt}", 64, 32)
    heads = torch.nn.Linear(16, 2)
    save_scorer(Scorer(backbone, tokenizer, heads, ["harm", "reward"], text), folders["scorers_0"])
    return folders


def test_the_two_stages(artifacts: dict[str, Path], tmp_path: Path) -> None:
    data, enumeration, out = artifacts["data"], tmp_path / "enumeration", tmp_path / "judge"
    enumeration.mkdir()
    out.mkdir()
    seen: list[tuple[str, int, int]] = []
    runtime = Runtime(progress=lambda what, done, total: seen.append((what, done, total)))
    inputs = {name: artifacts[name] for name in ("data", "splits", "reference", "scorers_0")}
    enumerate_reference(
        Slice({"evaluation": {"judged_prompts": 5}, "policy": {"trust_remote_code": False}}),
        inputs,
        enumeration,
        runtime,
    )

    table = pd.read_parquet(enumeration / "judged.parquet")
    assert len(table) == 20
    assert seen[-1][1:] == (20, 20)
    unseen = table.loc[table["split"] != "policy", "prompt_id"]
    floor = json.loads((enumeration / "floor.json").read_text())
    world = World.load(data / "world.json")
    assert floor == {"harm": pytest.approx(world.true_scores(unseen)[1].min(1).mean())}
    assert json.loads((enumeration / "heads.json").read_text()) == ["harm", "reward"]

    config = Slice({"dpo": {"beta": 1.0}, "limits": [-0.5], "margins": [0.2]})

    def judge_at(policy: Path) -> None:
        inputs = {"data": data, "enumeration": enumeration}
        enumerate_policy(Slice({"policy": {"trust_remote_code": False}}), {**inputs, "policy": policy}, out, runtime)
        judge_policy(config, {**inputs, "policy": out}, out, Runtime())

    judge_at(artifacts["policy"])
    record = json.loads((out / "judge.json").read_text())
    assert record["prompts"] == 15
    assert record["support_mass"] < 1e-3, "fresh weights know nothing of the grammar"
    worst = world.true_scores(unseen)[1].max(1).mean()
    assert record["true_cost"] == pytest.approx(worst, abs=0.01)
    assert set(record["scorers"]) == {"reward", "harm"}
    assert record["policy_prompts"]["support_mass"] < 1e-3

    judge_at(artifacts["reference"])
    again = json.loads((out / "judge.json").read_text())
    assert again["captured"] == pytest.approx(0, abs=1e-6)


def test_constraints_the_world_does_not_know_are_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    inputs = {name: artifacts[name] for name in ("data", "splits", "reference")}
    enumerate_reference(
        Slice({"evaluation": {"judged_prompts": 5}, "policy": {"trust_remote_code": False}}),
        inputs,
        tmp_path,
        Runtime(),
    )
    for wrong in (
        {"limits": [-0.5, 0.0], "margins": [0.0, 0.0]},
        {"limits": [-0.5], "margins": [0.0], "constraints": [{"name": "rude", "labels": "rude"}]},
    ):
        config = Slice({"dpo": {"beta": 1.0}, **wrong})
        with pytest.raises(InputError, match="the testbed knows the costs harm"):
            judge_policy(config, {"data": inputs["data"], "enumeration": tmp_path}, tmp_path, Runtime())

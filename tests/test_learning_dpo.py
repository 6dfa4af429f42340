"""Rounds of C-DPO: what λ does, labels, anchor, adapters, continuation, micro-batches, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from learning_kit import Killed, changed, digest, killed_at, round_slice, write_chain

from cdpo_core.dual.lagrangian import preference_probability
from cdpo_core.errors import InputError, TrainingError
from cdpo_core.learning.dataset_pairs import dataset_responses
from cdpo_core.learning.dpo import Groups, Round, load_groups, train_round
from cdpo_core.models.logprobs import response_log_probs
from cdpo_core.models.policy import load_policy
from cdpo_core.models.prompt_tokens import read_prompt_tokens, write_prompt_tokens
from cdpo_core.stages import Runtime, Slice


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def trained(chain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("round")
    train_round(round_slice(), chain, out, Runtime())
    return out


def groups_of(chain: dict[str, Path]) -> Groups:
    return load_groups(chain, ["harm"], round_slice().dpo)


def a_round(chain: dict[str, Path], lambda_: float = 0.5, **dpo: object) -> Round:
    config = round_slice(changed(dpo=dpo), (lambda_,))
    policy = load_policy(chain["reference"])
    round_ = Round(policy, load_groups(chain, ["harm"], config.dpo), config, torch.float32, 0, config.dpo.steps)
    round_.decide(config.lambda_)
    return round_


def expected_cost(folder: Path, chain: dict[str, Path]) -> tuple[float, float]:
    """Reward and cost under a policy by importance weights on the reference's samples."""
    groups, policy = groups_of(chain), load_policy(folder)
    with torch.no_grad():
        log_probs = response_log_probs(policy.model, groups.prompts, groups.responses, policy.pad_id)
    weights = torch.softmax(log_probs - groups.ref_log_probs, 1)
    return (weights * groups.reward).sum(1).mean().item(), (weights * groups.costs[..., 0]).sum(1).mean().item()


def test_the_groups_are_the_policy_splits(chain: dict[str, Path]) -> None:
    groups = groups_of(chain)
    splits = pd.read_parquet(chain["splits"] / "splits.parquet")
    assert groups.prompt_ids == sorted(splits.loc[splits["split"] == "policy", "prompt_id"])
    assert groups.reward.shape == groups.ref_log_probs.shape == (8, 8)
    assert groups.costs.shape == (8, 8, 1)
    responses = pd.read_parquet(chain["responses"] / "responses.parquet").set_index(["prompt_id", "sample"])
    row = responses.loc[(groups.prompt_ids[3], 5)]
    assert groups.responses[3][5] == list(row["tokens"])
    assert groups.ref_log_probs[3, 5].item() == row["ref_log_prob"]


def test_the_first_loss_is_that_of_the_reference(chain: dict[str, Path]) -> None:
    round_ = a_round(chain, anchor=0.0)
    first = list(round_.losses_at(0))
    assert sum(part["loss"].item() for part in first) == pytest.approx(np.log(2), abs=1e-4)


def test_lambda_trades_reward_for_cost(chain: dict[str, Path], tmp_path: Path) -> None:
    config = changed(dpo={"steps": 60})
    for lambda_ in (0.0, 2.0):
        train_round(round_slice(config, (lambda_,)), chain, tmp_path / f"{lambda_:g}", Runtime())
    before = expected_cost(chain["reference"], chain)
    unconstrained, constrained = expected_cost(tmp_path / "0", chain), expected_cost(tmp_path / "2", chain)
    assert unconstrained[0] > before[0] + 0.2
    assert constrained[1] < before[1] - 0.2
    assert constrained[1] < unconstrained[1] - 0.3


def test_records_tell_loss_and_accuracy(chain: dict[str, Path], trained: Path) -> None:
    steps = json.loads((trained / "training.json").read_text())["steps"]
    assert set(steps[0]) == {"step", "loss", "dpo", "anchor", "accuracy"}
    assert steps[-1]["accuracy"] > 0.6
    # 20 steps make 20 records: the last one is the last step's.
    weight = a_round(chain, steps=20).anchor_weight(19)
    assert steps[-1]["loss"] == pytest.approx(steps[-1]["dpo"] + weight * steps[-1]["anchor"])


def test_a_killed_round_continues_to_the_same_bytes(chain: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with pytest.raises(Killed):
        train_round(round_slice(), chain, tmp_path / "lost", killed_at(13, scratch))
    train_round(round_slice(), chain, out, Runtime(scratch=scratch))
    assert digest(out) == digest(trained)


def test_micro_batches_change_nothing_but_rounding(chain: dict[str, Path]) -> None:
    whole, parts = a_round(chain), a_round(chain)
    parts.micro_batch = 4
    assert len(list(parts.losses_at(3))) == 4
    for round_ in (whole, parts):
        for metrics in round_.losses_at(3):
            metrics["loss"].backward()
    pairs = zip(whole.policy.model.parameters(), parts.policy.model.parameters(), strict=True)
    for first, second in pairs:
        torch.testing.assert_close(first.grad, second.grad, atol=1e-5, rtol=1e-3)


def test_a_step_draws_each_response_once(chain: dict[str, Path]) -> None:
    round_ = a_round(chain, prompts_per_step=8, responses_per_prompt=4)
    columns = round_._responses_of(*round_._epochs.at(0))
    assert all(len(set(row)) == 4 for row in columns.tolist())
    assert columns.tolist() == round_._responses_of(*round_._epochs.at(0)).tolist()


@pytest.mark.parametrize("focus", [0.0, 0.7])
def test_the_anchor_of_a_draw_stands_for_all_responses(chain: dict[str, Path], focus: float) -> None:
    round_ = a_round(chain, prompts_per_step=8, responses_per_prompt=4, focus=focus, lambda_=0.3)
    drawn = [round_._epochs.at(step) for step in range(300)]
    weights = round_._anchor_weights.numpy()
    sums = [weights[rows[:, None], round_._responses_of(epochs, rows)].sum(axis=1).mean() for epochs, rows in drawn]
    assert np.mean(sums) == pytest.approx(1, abs=0.1)


def test_sampled_labels_stay_as_drawn(chain: dict[str, Path]) -> None:
    round_ = a_round(chain, labels="sampled")
    rows, columns = np.array([2, 5]), np.array([[0, 3, 7], [1, 2, 4]])
    first, again = round_.labels(rows, columns), round_.labels(rows, columns[:, ::-1].copy())
    assert torch.equal(first, again.flip(1, 2))
    assert set(first.flatten().tolist()) == {0.0, 0.5, 1.0}


def test_soft_labels_are_bradley_terry_on_the_lagrangian_reward(chain: dict[str, Path]) -> None:
    round_ = a_round(chain, lambda_=0.7)
    groups = round_.groups
    expected = preference_probability(groups.reward - 0.7 * groups.costs[..., 0])
    every = np.tile(np.arange(8), (8, 1))
    torch.testing.assert_close(round_.labels(np.arange(8), every), expected)


def test_without_focus_two_halves_of_a_group_average_to_its_anchor(chain: dict[str, Path]) -> None:
    round_, whole = (a_round(chain, anchor=1.0, focus=0.0, responses_per_prompt=size) for size in (4, 8))
    rows = np.array([1])
    halves = [round_.group_losses(rows, np.arange(8)[None, part], 1.0) for part in (slice(0, 4), slice(4, 8))]
    every = whole.group_losses(rows, np.arange(8)[None], 1.0)
    assert sum(half["anchor"].item() for half in halves) / 2 == pytest.approx(every["anchor"].item(), rel=1e-5)


@pytest.mark.parametrize("labels", ["sampled", "hard"])
def test_other_labels_train(chain: dict[str, Path], tmp_path: Path, labels: str) -> None:
    train_round(round_slice(changed(dpo={"labels": labels, "steps": 3})), chain, tmp_path, Runtime())
    assert (tmp_path / "model.safetensors").is_file()


def test_a_warm_start_begins_where_the_last_round_ended(chain: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    config = round_slice(changed(dpo={"steps": 2, "learning_rate": 1e-9}))
    train_round(config, {**chain, "previous": trained}, tmp_path, Runtime())
    warm, last = load_policy(tmp_path), load_policy(trained)
    for first, second in zip(warm.model.parameters(), last.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


def test_adapters_train_and_are_merged(chain: dict[str, Path], tmp_path: Path) -> None:
    config = round_slice(changed(policy={"lora_rank": 2}, dpo={"steps": 6, "learning_rate": 2e-2}))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    train_round(config, chain, tmp_path / "whole", Runtime())
    with pytest.raises(Killed):
        train_round(config, chain, tmp_path / "lost", killed_at(4, scratch))
    train_round(config, chain, tmp_path / "again", Runtime(scratch=scratch))
    assert digest(tmp_path / "whole") == digest(tmp_path / "again")
    assert expected_cost(tmp_path / "whole", chain) != expected_cost(chain["reference"], chain)
    assert not list((tmp_path / "whole").glob("adapter*"))


def test_too_few_responses_are_refused(chain: dict[str, Path], tmp_path: Path) -> None:
    config = round_slice(changed(sampling={"reference": 16}, dpo={"responses_per_prompt": 16}))
    with pytest.raises(InputError, match="at least 16"):
        train_round(config, chain, tmp_path, Runtime())


def test_an_exploding_round_is_a_training_error(chain: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="dpo loss is not finite"):
        train_round(round_slice(changed(dpo={"learning_rate": 1e30})), chain, tmp_path, Runtime())


def test_the_anchor_falls_from_its_weight_to_the_share_that_is_left(chain: dict[str, Path]) -> None:
    round_ = a_round(chain, anchor=0.4, anchor_end=0.25, steps=10)
    assert round_.anchor_weight(0) == pytest.approx(0.4)
    assert round_.anchor_weight(5) == pytest.approx((0.4 + 0.1) / 2)
    assert round_.anchor_weight(10) == pytest.approx(0.1)
    assert a_round(chain, anchor=0.0).anchor_weight(3) == 0


def test_without_reward_only_the_costs_decide(chain: dict[str, Path]) -> None:
    policy, groups = load_policy(chain["reference"]), groups_of(chain)
    config = Slice({**round_slice(lambda_=(2.0,)).as_dict(), "reward_weight": 0.0})
    round_ = Round(policy, groups, config, torch.float32, 0, config.dpo.steps)
    round_.decide(config.lambda_)
    torch.testing.assert_close(round_.r_lambda, -2 * groups.costs[..., 0])


def test_a_round_reads_the_prompts_that_the_reference_was_asked(chain: dict[str, Path], tmp_path: Path) -> None:
    """Whatever a template would write today: log π_ref belongs to the stored tokens."""
    shutil.copytree(chain["responses"], tmp_path / "responses")
    stored = read_prompt_tokens(chain["responses"])
    asked = {name: [*tokens[:1], 40, *tokens[1:]] for name, tokens in stored.items()}
    write_prompt_tokens(list(asked), list(asked.values()), tmp_path / "responses")
    dpo = round_slice().dpo
    groups = load_groups({**chain, "responses": tmp_path / "responses"}, ["harm"], dpo)
    assert groups.prompts == [asked[name] for name in groups.prompt_ids]
    groups, reference = load_groups(chain, ["harm"], dpo), load_policy(chain["reference"])
    with torch.no_grad():
        now = response_log_probs(reference.model, groups.prompts, groups.responses, reference.pad_id)
    torch.testing.assert_close(now, groups.ref_log_probs, atol=1e-4, rtol=1e-5)


def test_the_datas_pairs_are_groups_of_two(chain: dict[str, Path], tmp_path: Path) -> None:
    fields = {"max_prompt_tokens": 64, "max_response_tokens": 32, "trust_remote_code": False}
    dataset_responses(Slice({"policy": fields}), chain, tmp_path, Runtime(micro_batch=7))
    table = pd.read_parquet(tmp_path / "responses.parquet")
    preferences = pd.read_parquet(chain["data"] / "preferences.parquet")
    assert len(table) == 2 * len(preferences)
    scores = table[["prompt_id", "sample"]].assign(reward=np.arange(len(table)) * 1.0, cost_harm=0.5)
    (tmp_path / "scores").mkdir()
    scores.to_parquet(tmp_path / "scores" / "scores.parquet", index=False)
    inputs = {**chain, "responses": tmp_path, "scores": tmp_path / "scores"}
    config = round_slice(changed(dpo={"pairs": "dataset", "responses_per_prompt": 2}))
    policy, groups = load_policy(chain["reference"]), load_groups(inputs, ["harm"], config.dpo)

    assert len(set(groups.prompt_ids)) == len(groups.prompts) == len(preferences)
    first = preferences[preferences["prompt_id"] == groups.prompt_ids[0].rsplit("/")[0]].iloc[0]
    assert [policy.decode(tokens) for tokens in groups.responses[0]] == [first["response_0"], first["response_1"]]
    with torch.no_grad():
        plain = response_log_probs(policy.model, groups.prompts[:3], groups.responses[:3], policy.pad_id)
    torch.testing.assert_close(groups.ref_log_probs[:3], plain, atol=1e-4, rtol=1e-5)
    round_ = Round(policy, groups, config, torch.float32, 0, config.dpo.steps)
    round_.decide(config.lambda_)
    assert np.isfinite([part["loss"].item() for part in round_.losses_at(0)]).all()

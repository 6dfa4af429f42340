"""Safe RLHF, the rival: PPO's pieces by hand, λ's step, and a tiny training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from learning_kit import digest, write_chain
from pydantic import ValidationError

from cdpo_core.baselines import safe_rlhf
from cdpo_core.baselines.critics import Batch, Critic, token_log_probs
from cdpo_core.baselines.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    generalised_advantages,
    lagrangian_advantages,
    next_log_lambda,
)
from cdpo_core.baselines.safe_rlhf import SafeRlhfSettings, train_safe_rlhf
from cdpo_core.models.logprobs import response_log_probs
from cdpo_core.models.policy import load_policy
from cdpo_core.stages import Runtime, Slice


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_chain(tmp_path_factory.mktemp("chain"))


class ShortIsSafe:
    """Scores for the toy world: each word earns 1, each letter costs."""

    def __init__(self, inputs: object, constraints: object, device: object, trusted: object = ()) -> None: ...

    def score(self, prompt_ids: list[str], responses: list[str]) -> tuple[np.ndarray, np.ndarray]:
        words = np.array([len(text.split()) for text in responses], dtype=float)
        return words, (words[:, None] - 2.0)


def slice_of(**settings: object) -> Slice:
    given = {"iterations": 12, "prompts_per_step": 8, "responses_per_prompt": 4, "critic_warmup": 1, **settings}
    return Slice(
        {
            "seed": 0,
            "policy": {"max_prompt_tokens": 16, "max_response_tokens": 8, "trust_remote_code": False},
            "dpo": {"beta": 0.1},
            "constraints": [{"name": "harm", "labels": "harm"}],
            "targets": [-1.0],
            "safe_rlhf": SafeRlhfSettings(**given).model_dump(),
        }
    )


def test_advantages_by_hand() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.5, 0.25, 7.0]])
    mask = torch.tensor([[True, True, False]])
    second = 2.0 - 0.25
    first = 1.0 + 0.9 * 0.25 - 0.5 + 0.9 * 0.8 * second
    found = generalised_advantages(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(found, torch.tensor([[first, second, 0.0]]))


def test_undecayed_advantages_are_returns_minus_values() -> None:
    rewards, values = torch.randn(5, 7), torch.randn(5, 7)
    mask = torch.arange(7) < torch.tensor([7, 3, 1, 5, 6])[:, None]
    returns = (rewards * mask).flip(1).cumsum(1).flip(1)
    found = generalised_advantages(rewards, values, mask, 1.0, 1.0)
    torch.testing.assert_close(found, torch.where(mask, returns - values, 0.0))


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"), [(1.0, 2.0, -2.0), (1.5, 2.0, 0.0), (1.5, -2.0, 3.0), (0.5, -2.0, 0.0)]
)
def test_the_clipped_losss_gradient(ratio: float, advantage: float, gradient: float) -> None:
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    clipped_policy_loss(log_probs, torch.zeros(1, 1), advantage * one, one.bool(), 0.2).backward()
    assert log_probs.grad.item() == pytest.approx(gradient)


def test_the_value_loss_takes_the_worse_of_the_clipped() -> None:
    one = torch.ones(1, 1)
    loss = clipped_value_loss(3 * one, 0 * one, 4 * one, one.bool(), 1.0)
    assert loss.item() == pytest.approx(0.5 * 9)


def test_lambda_weighs_the_advantages() -> None:
    mixed = lagrangian_advantages(torch.tensor([[2.0]]), torch.tensor([[[1.0]], [[4.0]]]), torch.tensor([0.5, 0.25]))
    assert mixed.item() == pytest.approx((2 - 0.5 - 1) / 1.75)


def test_lambda_rises_above_the_target_and_stays_within_its_bound() -> None:
    assert next_log_lambda(0.0, 1.0, 0.0, 0.1, 10.0) == pytest.approx(0.1)
    assert next_log_lambda(0.0, -1.0, 0.0, 0.1, 10.0) == pytest.approx(-0.1)
    assert next_log_lambda(math.log(9.9), 50.0, 0.0, 0.5, 10.0) == pytest.approx(math.log(10))


def test_a_batchs_log_probs_are_the_responses(chain: dict[str, Path]) -> None:
    policy = load_policy(chain["reference"])
    table = pd.read_parquet(chain["responses"] / "responses.parquet").head(6)
    prompts = pd.read_parquet(chain["data"] / "prompts.parquet").set_index("prompt_id")["prompt"]
    written = policy.encode_prompts(prompts.loc[table["prompt_id"]].tolist())
    responses = [list(map(int, tokens)) for tokens in table["tokens"]]
    batch = Batch.of(written, responses, policy)
    with torch.no_grad():
        found = token_log_probs(policy.model, batch).sum(1)
        plain = response_log_probs(policy.model, written, [[tokens] for tokens in responses], policy.pad_id)
        assert Critic(policy.model)(batch).abs().max() == 0, "a new critic knows nothing"
    torch.testing.assert_close(found.double(), plain[:, 0], atol=1e-4, rtol=1e-4)
    assert batch.mask.sum(1).tolist() == [len(tokens) for tokens in responses]


def test_training_follows_the_scores_and_repeats(
    chain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_rlhf, "Judge", ShortIsSafe)
    for name in ("first", "second"):
        train_safe_rlhf(slice_of(learning_rate=0.01, lambda_init=5.0), chain, tmp_path / name, Runtime())
    assert digest(tmp_path / "first") == digest(tmp_path / "second")
    training = json.loads((tmp_path / "first" / "training.json").read_text())
    assert training["steps"][-1]["cost_harm"] < training["steps"][0]["cost_harm"] - 0.3
    assert training["updates"] == 11 * 2 * 2
    assert training["generated_tokens"] > 12 * 8 * 4
    assert training["steps"][0]["lambda_harm"] == pytest.approx(5)


def test_settings_out_of_their_range_are_refused() -> None:
    for wrong in ({"iterations": 0}, {"clip": 0}, {"gamma": 1.5}, {"no_such": 1}):
        with pytest.raises(ValidationError):
            SafeRlhfSettings(**wrong)

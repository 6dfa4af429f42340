"""Sampling: the right distribution, the right log-probabilities, and no dependence on batches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from cdpo_core.config import PolicyConfig
from cdpo_core.evaluation.sampling import RESPONSES_SCHEMA, SampledResponse, sample, sample_responses
from cdpo_core.models.logprobs import has_expandable_cache, response_log_probs
from cdpo_core.models.policy import Policy, load_policy, new_policy, save_policy
from cdpo_core.models.tokenizer import train_tokenizer
from cdpo_core.stages import Runtime, Slice

PROMPTS = [[1, 40, 50], [1, 60], [1, 40, 50, 60, 70, 80], [1, 99, 98, 97]]
IDS = ["a", "b", "c", "d"]


def sharp(model: torch.nn.Module) -> None:
    """Random weights large enough that the next token's distribution is far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = PolicyConfig(hidden_size=16, layers=2, heads=2, max_prompt_tokens=8, max_response_tokens=6)
    policy = new_policy(config, train_tokenizer(["a"], 259), 0)
    sharp(policy.model)
    with torch.no_grad():
        likely = policy.model(torch.tensor(PROMPTS[:1])).logits[0, -1].argmax()
    # The likeliest token ends the text, so that responses of all lengths come out.
    policy.tokenizer.eos_token = policy.tokenizer.convert_ids_to_tokens(int(likely))
    return policy


def draw(policy: Policy, k: int = 5, prompts: slice = slice(None), **options: object) -> list[list[SampledResponse]]:
    settings: dict = {"prompt_ids": IDS[prompts], "seed_stream": (0, "sample", "test"), **options}
    return sample(policy, PROMPTS[prompts], k, **settings)


def test_frequencies_are_the_models_probabilities(policy: Policy) -> None:
    (group,) = draw(policy, 40_000, slice(0, 1), max_new_tokens=2)
    first = [response.tokens[0] for response in group]
    common = max((token for token in set(first) if token != policy.eos_id), key=first.count)
    second = [response.tokens[1] for response in group if response.tokens[0] == common]
    for text, drawn in ((PROMPTS[0], first), ([*PROMPTS[0], common], second)):
        with torch.no_grad():
            expected = policy.model(torch.tensor([text])).logits[0, -1].double().softmax(-1).numpy() * len(drawn)
        counts = np.bincount(drawn, minlength=len(expected))
        deviations = (counts - expected) / np.sqrt(expected * (1 - expected / len(drawn)))
        assert (expected > 20).sum() >= 10
        assert np.abs(deviations[expected > 20]).max() < 4.5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_the_models_at_temperature_one(policy: Policy, temperature: float) -> None:
    groups = draw(policy, 8, temperature=temperature)
    ours = torch.tensor([[response.log_prob for response in group] for group in groups], dtype=torch.float64)
    tokens = [[response.tokens for response in group] for group in groups]
    with torch.no_grad():
        theirs = response_log_probs(policy.model, PROMPTS, tokens, policy.pad_id)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_low_temperature_takes_the_likeliest_token(policy: Policy) -> None:
    (group,) = draw(policy, 3, slice(0, 1), temperature=1e-4)
    assert [response.tokens for response in group] == [[policy.eos_id]] * 3


def test_responses_end_at_eos_or_at_the_allowed_length(policy: Policy) -> None:
    responses = [response for group in draw(policy, 50) for response in group]
    assert {response.finished for response in responses} == {True, False}
    for response in responses:
        assert policy.eos_id not in response.tokens[:-1]
        assert response.finished == (response.tokens[-1] == policy.eos_id)
        assert len(response.tokens) == 6 or response.finished
    assert len({len(response.tokens) for response in responses}) > 3


@pytest.mark.parametrize("micro_batch", [1, 10, 64])
def test_batches_change_nothing(policy: Policy, micro_batch: int) -> None:
    whole, parts = draw(policy), draw(policy, micro_batch=micro_batch)
    assert [[r[:2] for r in group] for group in whole] == [[r[:2] for r in group] for group in parts]
    np.testing.assert_allclose(
        [r.log_prob for group in whole for r in group], [r.log_prob for group in parts for r in group], atol=1e-5
    )


def test_a_response_depends_on_its_own_name_alone(policy: Policy) -> None:
    tokens = [[response.tokens for response in group] for group in draw(policy)]
    alone = [[response.tokens for response in draw(policy, 5, slice(i, i + 1))[0]] for i in range(4)]
    fewer = [[response.tokens for response in group] for group in draw(policy, 3)]
    assert alone == tokens
    assert fewer == [group[:3] for group in tokens]
    assert [[r.tokens for r in group] for group in draw(policy, seed_stream=(1, "sample", "test"))] != tokens
    assert [[r.tokens for r in group] for group in draw(policy, seed_stream=(0, "sample", "other"))] != tokens


def test_models_without_an_expandable_cache_draw_the_same(policy: Policy) -> None:
    groups = []
    for window in (None, 1000):
        config = MistralConfig(
            vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=window,
        )  # fmt: skip
        model = MistralForCausalLM(config).eval()
        sharp(model)
        assert has_expandable_cache(model) is (window is None)
        groups.append(draw(Policy(model, policy.tokenizer, "{prompt}", 8, 6)))
    assert [[r[:2] for r in group] for group in groups[0]] == [[r[:2] for r in group] for group in groups[1]]


def test_progress_reaches_the_whole(policy: Policy) -> None:
    seen: list[tuple[str, int, int]] = []
    draw(policy, 5, micro_batch=10, progress=lambda *report: seen.append(report))
    assert seen == [("sampling", 10, 20), ("sampling", 20, 20)]


@pytest.fixture
def artifacts(policy: Policy, tmp_path: Path) -> SimpleNamespace:
    data, splits = tmp_path / "data", tmp_path / "splits"
    data.mkdir()
    splits.mkdir()
    names = [f"p{i}" for i in range(8)]
    pd.DataFrame(
        {
            "prompt_id": names,
            "prompt": [f"q{i}" * (i % 3 + 1) for i in range(8)],
            "split": ["preferences"] * 2 + ["pool"] * 6,
        }
    ).to_parquet(data / "prompts.parquet", index=False)
    pd.DataFrame({"prompt_id": names[:1:-1], "split": ["test", "policy"] * 3}).to_parquet(
        splits / "splits.parquet", index=False
    )
    save_policy(policy, tmp_path / "policy")
    other = load_policy(tmp_path / "policy")
    with torch.no_grad():
        other.model.lm_head.weight.mul_(0.9)
    save_policy(other, tmp_path / "other")
    return SimpleNamespace(data=data, splits=splits, policy=tmp_path / "policy", other=tmp_path / "other", at=tmp_path)


def run_stage(artifacts: SimpleNamespace, name: str, split: str, *, micro_batch: int = 0, **inputs: Path) -> Path:
    config = Slice(
        {
            "seed": 3,
            "policy": {"max_response_tokens": 6},
            "sampling": {"temperature": 1.0},
            "split": split,
            "samples": 4,
        }
    )
    out = artifacts.at / name
    out.mkdir()
    inputs = {"policy": artifacts.policy, "data": artifacts.data, "splits": artifacts.splits, **inputs}
    sample_responses(config, inputs, out, Runtime(micro_batch=micro_batch))
    assert {path.name for path in out.iterdir()} == {"responses.parquet", "prompt_tokens.parquet"}
    return out / "responses.parquet"


def test_stage_writes_the_split_in_the_datas_order(artifacts: SimpleNamespace) -> None:
    policy = load_policy(artifacts.policy)
    path = run_stage(artifacts, "out", "policy")
    assert pq.read_schema(path).equals(RESPONSES_SCHEMA)
    frame = pd.read_parquet(path)
    assert frame["prompt_id"].tolist() == [name for name in ("p2", "p4", "p6") for _ in range(4)]
    assert frame["sample"].tolist() == [0, 1, 2, 3] * 3
    assert (frame["log_prob"] == frame["ref_log_prob"]).all()
    assert [policy.decode(list(tokens)) for tokens in frame["tokens"]] == frame["response"].tolist()
    assert frame["finished"].any()
    assert path.read_bytes() == run_stage(artifacts, "again", "policy").read_bytes()


def test_stage_pool_is_every_prompt_that_is_no_preference(artifacts: SimpleNamespace) -> None:
    pool = pd.read_parquet(run_stage(artifacts, "pool", "pool"))
    assert pool["prompt_id"].unique().tolist() == ["p2", "p3", "p4", "p5", "p6", "p7"]
    part = pd.read_parquet(run_stage(artifacts, "part", "policy"))
    both = pool.merge(part, on=["prompt_id", "sample"])
    assert len(both) == 12
    assert (both["response_x"] != both["response_y"]).any(), "each split has a stream of its own"


def test_stage_scores_under_the_reference(artifacts: SimpleNamespace) -> None:
    own = pd.read_parquet(run_stage(artifacts, "own", "test"))
    frame = pd.read_parquet(run_stage(artifacts, "out", "test", reference=artifacts.other, micro_batch=4))
    assert own["response"].tolist() == frame["response"].tolist()
    np.testing.assert_allclose(own["log_prob"], frame["log_prob"], atol=1e-5)
    reference = load_policy(artifacts.other)
    prompts = pd.read_parquet(artifacts.data / "prompts.parquet").set_index("prompt_id")["prompt"]
    for row in frame.itertuples():
        with torch.no_grad():
            expected = response_log_probs(
                reference.model, reference.encode_prompts([prompts[row.prompt_id]]), [[list(row.tokens)]], 0
            )
        assert row.ref_log_prob == pytest.approx(float(expected[0, 0]), abs=1e-5)
    same = pd.read_parquet(run_stage(artifacts, "same", "test", reference=artifacts.policy))
    np.testing.assert_allclose(same["log_prob"], same["ref_log_prob"], atol=1e-5)

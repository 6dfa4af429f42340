"""Enumeration by the tree equals reading every response on its own, for any tokenizer and model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from cdpo_core.config import PolicyConfig
from cdpo_core.errors import InputError
from cdpo_core.models.logprobs import token_log_probs
from cdpo_core.models.policy import Policy, new_policy
from cdpo_core.models.scorer import Scorer, ScorerText
from cdpo_core.models.tokenizer import train_tokenizer
from cdpo_core.testbed import enumeration
from cdpo_core.testbed.enumeration import grammar_log_probs, grammar_scores
from cdpo_core.testbed.trie import Trie, build_trie, plan_blocks
from cdpo_core.testbed.world import World

PROMPTS = ["How to clean tables at home", "How to burn", "How to move very old pianos up narrow stairs", "How to burn"]
# Of different lengths, with shared and unshared beginnings.
TEXTS = tuple(
    f"{opening} {verb} it{manner}{end}"
    for opening in ("Simply", "Never ever")
    for verb in ("wash", "wave", "carry")
    for manner in ("", " slowly", " slowly and quietly")
    for end in ("", " alone")
)
# Enumeration reads nothing of a world but its responses.
WORLD = cast(World, SimpleNamespace(responses=(*TEXTS, "No")))


def policy_with(vocabulary: int, **settings: int) -> Policy:
    sizes = {"hidden_size": 16, "layers": 2, "heads": 2, "max_prompt_tokens": 40, "max_response_tokens": 60} | settings
    tokenizer = train_tokenizer([*PROMPTS, *WORLD.responses] * 3, vocabulary)
    policy = new_policy(PolicyConfig(**sizes), tokenizer, seed=1)
    # Sharper than fresh weights, so that a wrong token or position shows.
    for weights in policy.model.parameters():
        weights.data *= 3
    return policy


@pytest.fixture(scope="module", params=[600, 300], ids=["words", "pieces"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return policy_with(request.param)


def plainly(policy: Policy) -> np.ndarray:
    responses = policy.encode_responses(WORLD.responses)
    with torch.no_grad():
        rows = [
            [float(token_log_probs(policy.model, prompt, response).sum()) for response in responses]
            for prompt in policy.encode_prompts(PROMPTS)
        ]
    return np.array(rows)


@pytest.mark.parametrize("micro_batch", [0, 1, 80])
def test_tree_equals_one_response_at_a_time(policy: Policy, micro_batch: int) -> None:
    found = grammar_log_probs(policy, PROMPTS, WORLD, micro_batch)

    assert found.shape == (4, len(WORLD.responses))
    assert found.dtype == np.float64
    assert np.allclose(found, plainly(policy), atol=1e-4)
    assert np.allclose(found[1], found[3], atol=1e-5)


@pytest.mark.parametrize("most", [1, 5, 10_000])
def test_the_cut_into_blocks_changes_nothing(policy: Policy, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_core.testbed.trie.BLOCK_TOKENS", most)
    assert np.allclose(grammar_log_probs(policy, PROMPTS, WORLD), plainly(policy), atol=1e-4)


def test_a_model_without_an_expandable_cache_takes_the_plain_way(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enumeration, "has_expandable_cache", lambda model: False)
    assert np.allclose(grammar_log_probs(policy, PROMPTS, WORLD), plainly(policy), atol=1e-4)


def test_scores_equal_those_of_the_scorer(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    text = ScorerText("policy", "{prompt}", 40, 60)
    scorer = Scorer(policy.model.model, policy.tokenizer, torch.nn.Linear(16, 2), ["reward", "harm"], text)
    scorer.scale.copy_(torch.tensor([2.0, -1.5]))
    scorer.shift.copy_(torch.tensor([0.5, 3.0]))
    pairs = [(prompt, response) for prompt in PROMPTS for response in WORLD.responses]
    plain = scorer.score([prompt for prompt, _ in pairs], [response for _, response in pairs]).view(4, -1, 2).numpy()

    found = grammar_scores(scorer, PROMPTS, WORLD)
    assert found.shape == (4, len(WORLD.responses), 2)
    assert plain.std(1).min() > 0.01
    assert np.allclose(found, plain, atol=1e-4)
    monkeypatch.setattr(enumeration, "has_expandable_cache", lambda model: False)
    assert np.allclose(grammar_scores(scorer, PROMPTS, WORLD), plain, atol=1e-4)


def test_responses_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        grammar_log_probs(policy_with(300, max_response_tokens=4), PROMPTS[:1], WORLD)
    assert caught.value.where == "policy.max_response_tokens"


def test_probabilities_are_true_probabilities() -> None:
    # Every token as a first token, each but the end followed by the end: P(end) + Σ P(t) P(end | t).
    policy = policy_with(300)
    prompt = policy.encode_prompts(PROMPTS[:1])
    end = policy.eos_id
    trie = build_trie([*([token, end] for token in range(len(policy.tokenizer)) if token != end), [end]])
    with torch.no_grad():
        found = enumeration._tree_log_probs(policy, prompt, trie, plan_blocks(trie, with_leaves=False)).exp()[0]
    at_once = token_log_probs(policy.model, prompt[0], [end]).exp().item()
    assert float(found[-1]) == pytest.approx(at_once, rel=1e-4)
    assert at_once < float(found.sum()) < 1


def test_the_tree_shares_beginnings() -> None:
    trie = build_trie([[5, 6, 1], [5, 7, 1], [5, 7, 8, 1], [9, 1]])

    assert trie.tokens == [-1, 5, 9, 6, 7, 1, 1, 1, 8, 1]
    assert trie.parents == [-1, 0, 0, 1, 1, 2, 3, 4, 4, 8]
    assert trie.leaves == [6, 7, 9, 5]
    assert trie.paths.tolist() == [[6, 3, 1, 0], [7, 4, 1, 0], [9, 8, 4, 1], [5, 2, 0, 0]]
    assert read_nodes(trie, with_leaves=False) == 5
    assert read_nodes(trie, with_leaves=True) == 9


def read_nodes(trie: Trie, *, with_leaves: bool) -> int:
    # A token sees itself and nothing that is not its ancestor: depth many within its block.
    blocks = plan_blocks(trie, with_leaves=with_leaves)
    assert all(block.visible.diagonal(dim1=1, dim2=2).all() for block in blocks)
    return sum(int((block.tokens > 0).sum()) for block in blocks)


@pytest.mark.parametrize("responses", [[[3, 1], [3, 1]], [[3], [3, 1]], [[3, 1], [3]]])
def test_ambiguous_responses_are_refused(responses: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="beginning of another"):
        build_trie(responses)

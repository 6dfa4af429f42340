"""Log-probabilities: the grouped way equals the plain one, values and gradients, whatever the padding."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from cdpo_core.models.logprobs import has_expandable_cache, response_log_probs, token_log_probs
from cdpo_core.models.policy import Policy, with_lora
from cdpo_core.models.tokenizer import train_tokenizer

V, PAD = 50, 0
Groups = tuple[list[list[int]], list[list[list[int]]]]


def llama(attention: str = "eager") -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def mistral() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config)


def lora() -> PreTrainedModel:
    return with_lora(Policy(llama(), train_tokenizer(["a"], 259), "{prompt}", 9, 9), 2, 0).model


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], bool]] = {
    "llama": (llama, True),
    "llama sdpa": (lambda: llama("sdpa"), True),
    "llama with adapters": (lora, True),
    "gpt2, learned positions": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)),
        True,
    ),
    "bloom, no position ids": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2)),
        False,
    ),
    "mistral, sliding window": (mistral, False),
    "mamba, no attention": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2)),
        False,
    ),
}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def groups(seed: int = 0, prompts: int = 5, size: int = 3, *, same: bool = False) -> Groups:
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(V) for _ in range(high if same else rng.randint(low, high))]

    return [text(1, 9) for _ in range(prompts)], [[text(1, 6) for _ in range(size)] for _ in range(prompts)]


def plainly(model: PreTrainedModel, prompts: list[list[int]], responses: list[list[list[int]]]) -> torch.Tensor:
    rows = [
        torch.stack([token_log_probs(model, prompt, response).sum() for response in group])
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    return torch.stack(rows)


def gradients(model: PreTrainedModel, values: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((weights * values).sum(), parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", MODELS)
def test_which_models_share_their_prompts(name: str) -> None:
    assert has_expandable_cache(build(name)) is MODELS[name][1]


@pytest.mark.parametrize("same", [False, True], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_equal_one_text_at_a_time(name: str, same: bool) -> None:
    model = build(name)
    prompts, responses = groups(same=same)
    grouped, plain = response_log_probs(model, prompts, responses, PAD), plainly(model, prompts, responses)
    assert grouped.dtype == torch.float64
    torch.testing.assert_close(grouped, plain, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, grouped), gradients(model, plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 4, 7, 100])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    model = build("llama")
    prompts, responses = groups(prompts=7)
    whole, parts = (response_log_probs(model, prompts, responses, PAD, size) for size in (0, micro_batch))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)


def test_the_pad_token_is_never_seen() -> None:
    model = build("llama")
    prompts, responses = groups()
    values = [response_log_probs(model, prompts, responses, pad) for pad in (0, 7)]
    torch.testing.assert_close(*values, atol=0, rtol=0)


def test_first_and_last_tokens_count_and_the_prompts_do_not() -> None:
    model = build("llama")
    prompt, response = [3, 4, 5], [6, 7, 2]
    logits = model(torch.tensor([[*prompt, *response]])).logits.double().log_softmax(-1)[0]
    by_hand = logits[2, 6] + logits[3, 7] + logits[4, 2]
    value = response_log_probs(model, [prompt], [[response]], PAD)[0, 0]
    torch.testing.assert_close(value, by_hand, atol=1e-5, rtol=1e-5)


def test_all_continuations_of_a_length_sum_to_one() -> None:
    model = build("llama")
    every_token = [[[token] for token in range(V)]] * 2
    sums = response_log_probs(model, [[1], [3, 4]], every_token, PAD).exp().sum(1)
    torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_no_prompts_give_an_empty_tensor() -> None:
    assert response_log_probs(build("llama"), [], [], PAD).shape == (0, 0)


@pytest.mark.parametrize(
    ("prompts", "responses", "what"),
    [
        ([[1]], [], "1 prompts but 0 groups"),
        ([[1], [2]], [[[1]], [[1], [2]]], "of one size"),
        ([[1]], [[]], "of one size"),
        ([[]], [[[1]]], "empty"),
        ([[1]], [[[]]], "empty"),
    ],
)
def test_malformed_groups_are_refused(prompts: list[list[int]], responses: list[list[list[int]]], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        response_log_probs(build("llama"), prompts, responses, PAD)

"""Log-probabilities of responses, log π(y|x), with one pass over each prompt for all its responses.

A group is a prompt with its K responses. Its prompt goes through the model once; the keys and values
are then expanded over the K responses, so the prompt's part of the work is done once and not K times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel

    from cdpo_core.chunks import Chunks

Tokens = Sequence[int]


def response_log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[Tokens]],
    pad_id: int,
    micro_batch: int = 0,
) -> Tensor:
    """Sum of the log-probabilities of each response's tokens, EOS included, given its prompt.

    Models whose cache cannot be expanded (sliding windows, state spaces) take the plain way:
    prompt and response concatenated, K times. Both ways give the same figures.

    Args:
        model: a causal language model.
        prompts: P prompts' tokens, at least one token each.
        responses: K responses' tokens for each prompt, the same K, at least one token each.
        pad_id: fills the batches; always masked.
        micro_batch: most responses in one forward pass, rounded up to whole groups; 0 takes all.

    Returns:
        [P, K] float64 in nats, differentiable, on the model's device.

    Raises:
        ValueError: an empty prompt or response, or groups of different size.
    """
    size = _group_size(prompts, responses)
    grouped = has_expandable_cache(model)
    order, step = _in_order(prompts, responses), -(-micro_batch // size) if micro_batch else max(len(prompts), 1)
    chunks = []
    for start in range(0, len(order), step):
        chunk = order[start : start + step]
        chunk_prompts, chunk_responses = [prompts[i] for i in chunk], [responses[i] for i in chunk]
        if grouped:
            chunks.append(_grouped(model, chunk_prompts, chunk_responses, pad_id))
        else:
            chunks.append(_plain(model, chunk_prompts, chunk_responses, pad_id))
    if not chunks:
        return torch.zeros(0, size, dtype=torch.float64, device=model.device)
    return torch.cat(chunks)[_inverse(order, model.device)]


@torch.no_grad()
def response_log_probs_in_chunks(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[Tokens]],
    pad_id: int,
    micro_batch: int,
    chunks: Chunks,
    progress: Callable[[int, int], None],
) -> NDArray[np.float64]:
    """What `response_log_probs` returns, without gradient, its finished batches kept: [P, K] float64 nats.

    Args:
        model, prompts, responses, pad_id: as there.
        micro_batch: as there, at least 1.
        chunks: where finished batches are kept and found again.
        progress: called with (prompts done, P).

    Raises:
        ValueError: as `response_log_probs`.
    """
    size = _group_size(prompts, responses)
    order, step = _in_order(prompts, responses), -(-micro_batch // max(size, 1))
    batches = [order[start : start + step] for start in range(0, len(order), step)]

    def sums(batch: list[int]) -> dict[str, np.ndarray]:
        found = response_log_probs(model, [prompts[i] for i in batch], [responses[i] for i in batch], pad_id)
        return {"sums": found.cpu().numpy()}

    result = np.zeros((len(prompts), size))
    found = chunks.compute(batches, sums, lambda done: progress(min(done * step, len(order)), len(order)))
    for batch, arrays in zip(batches, found, strict=True):
        result[batch] = arrays["sums"]
    return result


def _in_order(prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]]) -> list[int]:
    """Groups of like length share a batch, which leaves little to pad."""
    return sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), max(map(len, responses[i]))))


def token_log_probs(model: PreTrainedModel, prompt: Tokens, response: Tokens) -> Tensor:
    """Log-probability of each token of one response given its prompt, computed the plain way.

    Returns:
        [len(response)] float64 in nats, differentiable: what `response_log_probs` must sum to.
    """
    tokens = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits
    # The logits at position t are for the token at t + 1.
    return chosen_log_probs(logits[:, len(prompt) - 1 : -1], tokens[:, len(prompt) :])[0]


def chosen_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits) at the given tokens: logits [..., V], tokens [...] -> [...] float64."""
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), tokens.reshape(-1), reduction="none")
    return -flat.double().view(tokens.shape)


@dataclass
class PromptPass:
    """What one pass over a batch of right-padded prompts leaves behind.

    Attributes:
        cache: keys and values of every prompt token.
        logits: [P, V], for the first token of the response.
        lengths: [P], tokens of each prompt.
        mask: [P, L] int, 1 at real tokens; None where all are (then attention needs no mask).
    """

    cache: DynamicCache
    logits: Tensor
    lengths: Tensor
    mask: Tensor | None

    def expand(self, size: int) -> PromptPass:
        """The same for `size` responses of each prompt: rows P become P × size, a prompt's together."""
        self.cache.batch_repeat_interleave(size)
        mask = None if self.mask is None else self.mask.repeat_interleave(size, 0)
        return PromptPass(
            self.cache, self.logits.repeat_interleave(size, 0), self.lengths.repeat_interleave(size, 0), mask
        )

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the cache and of what continues it."""
        self.cache.batch_select_indices(rows)
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]


def prompt_pass(model: PreTrainedModel, prompts: Sequence[Tokens], pad_id: int) -> PromptPass:
    """Run a batch of prompts through the model once.

    Args:
        model: a causal language model with an expandable cache.
        prompts: P prompts' tokens, at least one token each.
        pad_id: fills the shorter ones on the right; always masked.
    """
    from transformers import DynamicCache

    tokens, lengths = pad_right(prompts, pad_id, model.device)
    padded = min(map(len, prompts)) < tokens.shape[1]
    mask = _length_mask(lengths, tokens.shape[1]) if padded else None
    cache = DynamicCache()
    last, place = torch.unique(lengths - 1, return_inverse=True)
    logits = _logits_at(model, last, input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    rows = torch.arange(len(prompts), device=model.device)
    return PromptPass(cache, logits[rows, place], lengths, mask)


def continue_pass(model: PreTrainedModel, state: PromptPass, tokens: Tensor, offset: int) -> Tensor:
    """Logits [N, T, V] after each of T further tokens [N, T] of every row, of which `offset` came before.

    Extends the cache; the state's mask grows with it. Where rows end early, the tokens that fill them
    come last, so no real token sees them and they need no mask of their own.
    """
    positions = state.lengths[:, None] + offset + torch.arange(tokens.shape[1], device=tokens.device)
    if state.mask is not None:
        state.mask = torch.cat([state.mask, state.mask.new_ones(tokens.shape)], 1)
    output = model(
        input_ids=tokens,
        attention_mask=state.mask,
        position_ids=positions,
        past_key_values=state.cache,
        use_cache=True,
    )
    return output.logits


def has_expandable_cache(model: PreTrainedModel) -> bool:
    """Whether a prompt's keys and values can be expanded: full attention in every layer, positions at will."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    inner = _without_adapters(model)
    if getattr(inner, "_is_stateful", False) or "position_ids" not in signature(inner.forward).parameters:
        return False
    layers = DynamicCache(config=inner.config.get_text_config()).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def last_logits(model: PreTrainedModel, texts: Sequence[Tokens], pad_id: int) -> Tensor:
    """Logits [N, V] after each of N texts, computed the plain way, without a cache."""
    tokens, lengths = pad_right(texts, pad_id, model.device)
    last, place = torch.unique(lengths - 1, return_inverse=True)
    mask = _length_mask(lengths, tokens.shape[1])
    logits = _logits_at(model, last, input_ids=tokens, attention_mask=mask, use_cache=False)
    return logits[torch.arange(len(texts), device=model.device), place]


def pad_right(rows: Sequence[Tokens], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one [N, L] int64 tensor filled on the right, and their lengths [N]."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
    return tokens, torch.tensor([len(row) for row in rows], device=device)


def _grouped(
    model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]], pad_id: int
) -> Tensor:
    size = len(responses[0])
    state = prompt_pass(model, prompts, pad_id).expand(size)
    tokens, lengths = pad_right([response for group in responses for response in group], pad_id, model.device)
    logits = state.logits[:, None]
    if tokens.shape[1] > 1:
        logits = torch.cat([logits, continue_pass(model, state, tokens[:, :-1], 0)], 1)
    return _sum_real(chosen_log_probs(logits, tokens), lengths).view(len(prompts), size)


def _plain(
    model: PreTrainedModel, prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]], pad_id: int
) -> Tensor:
    rows = [
        (len(prompt), [*prompt, *response])
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    ]
    tokens, lengths = pad_right([row for _, row in rows], pad_id, model.device)
    logits = model(input_ids=tokens, attention_mask=_length_mask(lengths, tokens.shape[1]), use_cache=False).logits
    chosen = chosen_log_probs(logits[:, :-1], tokens[:, 1:])
    starts = torch.tensor([start - 1 for start, _ in rows], device=tokens.device)
    place = torch.arange(chosen.shape[1], device=tokens.device)
    inside = (place >= starts[:, None]) & (place < lengths[:, None] - 1)
    return torch.where(inside, chosen, 0.0).sum(1).view(len(prompts), -1)


def _sum_real(values: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(_length_mask(lengths, values.shape[1]).bool(), values, 0.0).sum(1)


def _logits_at(model: PreTrainedModel, positions: Tensor, **inputs: Any) -> Tensor:
    """Logits [P, len(positions), V] at the given positions, computed only there if the model can."""
    if "logits_to_keep" in signature(_without_adapters(model).forward).parameters:
        return model(**inputs, logits_to_keep=positions).logits
    return model(**inputs).logits[:, positions]


def _without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _length_mask(lengths: Tensor, width: int) -> Tensor:
    return (torch.arange(width, device=lengths.device) < lengths[:, None]).long()


def _inverse(order: Sequence[int], device: torch.device) -> Tensor:
    inverse = torch.empty(len(order), dtype=torch.long)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    return inverse.to(device)


def _group_size(prompts: Sequence[Tokens], responses: Sequence[Sequence[Tokens]]) -> int:
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} groups of responses")
    sizes = {len(group) for group in responses}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"the groups must be of one size of at least 1, not {sorted(sizes)}")
    if not all(map(len, prompts)) or not all(len(response) for group in responses for response in group):
        raise ValueError("an empty prompt or response has no log-probability")
    return sizes.pop() if sizes else 0

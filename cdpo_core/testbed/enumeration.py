"""Log-probabilities and scores of every response of the grammar, exactly and quickly.

The prompt goes through the model once, then the tree of all responses' tokens, block by block over
the cached keys and values. Works for any tokenizer; models whose cache cannot be rearranged take the
plain way, one response at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_core.chunks import NOTHING_KEPT, Chunks
from cdpo_core.errors import InputError
from cdpo_core.models.logprobs import has_expandable_cache, pad_right, prompt_pass, response_log_probs
from cdpo_core.testbed.trie import Block, Trie, build_trie, plan_blocks

if TYPE_CHECKING:
    from transformers import DynamicCache

    from cdpo_core.models.policy import Policy
    from cdpo_core.models.scorer import Scorer
    from cdpo_core.testbed.world import World

# Responses in one pass when no micro-batch is given: what stays in the processor's cache.
RESPONSES_PER_PASS = 4096
Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None:
    """Report to nobody."""


@torch.no_grad()
def grammar_log_probs(
    policy: Policy,
    prompts: Sequence[str],
    world: World,
    micro_batch: int = 0,
    progress: Progress = _silent,
    chunks: Chunks = NOTHING_KEPT,
) -> NDArray[np.float64]:
    """log π(y|x) in nats of every response, EOS included: [P, R] float64, not renormalised.

    Args:
        policy: the policy.
        prompts: P prompts.
        world: whose R responses are enumerated.
        micro_batch: most responses in one pass, rounded up to whole prompts; 0 chooses.
        progress: called with (prompts done, P).
        chunks: where finished passes are kept and found again.

    Raises:
        InputError: policy.max_response_tokens is too short for the grammar.
    """
    responses = _whole_responses(policy.encode_responses(world.responses), policy.eos_id)
    encoded = policy.encode_prompts(prompts)
    trie = build_trie(responses)
    blocks = _on_device(plan_blocks(trie, with_leaves=False), policy.device)
    shared = has_expandable_cache(policy.model)

    def values(chunk: list[int]) -> Tensor:
        tokens = [encoded[i] for i in chunk]
        if shared:
            return _tree_log_probs(policy, tokens, trie, blocks)
        return response_log_probs(policy.model, tokens, [responses] * len(tokens), policy.pad_id, micro_batch)

    return _by_pass(values, _passes_of(encoded, len(responses), micro_batch), (len(responses),), progress, chunks)


@torch.no_grad()
def grammar_scores(
    scorer: Scorer,
    prompts: Sequence[str],
    world: World,
    micro_batch: int = 0,
    progress: Progress = _silent,
    chunks: Chunks = NOTHING_KEPT,
) -> NDArray[np.float64]:
    """Calibrated scores of every response: [P, R, heads] float64, heads in the order of scorer.names.

    Arguments as in `grammar_log_probs`.
    """
    shared = scorer.text.form == "policy" and not scorer.pooled and has_expandable_cache(scorer.backbone)
    count = len(world.responses)
    if not shared:
        pairs = [(prompt, response) for prompt in prompts for response in world.responses]
        texts = [prompt for prompt, _ in pairs], [response for _, response in pairs]
        values = scorer.score(*texts, micro_batch, chunks=chunks)
        return values.view(len(prompts), count, -1).numpy()
    responses = _whole_responses(scorer.writer.encode_responses(world.responses), scorer.writer.eos_id)
    encoded = scorer.writer.encode_prompts(prompts)
    trie = build_trie(responses)
    blocks = _on_device(plan_blocks(trie, with_leaves=True), scorer.heads.weight.device)

    def scores(chunk: list[int]) -> Tensor:
        return scorer.calibrated(_tree_scores(scorer, [encoded[i] for i in chunk], trie, blocks))

    return _by_pass(scores, _passes_of(encoded, count, micro_batch), (count, len(scorer.names)), progress, chunks)


def _by_pass(
    values: Callable[[list[int]], Tensor],
    passes: list[list[int]],
    shape: tuple[int, ...],
    progress: Progress,
    chunks: Chunks,
) -> NDArray[np.float64]:
    """[P, *shape]: the values of every prompt, pass by pass."""
    ends = np.cumsum([0, *map(len, passes)])
    result = np.empty((int(ends[-1]), *shape))
    found = chunks.compute(
        passes,
        lambda chunk: {"values": values(chunk).double().cpu().numpy()},
        lambda done: progress(int(ends[done]), len(result)),
    )
    for chunk, arrays in zip(passes, found, strict=True):
        result[chunk] = arrays["values"]
    return result


def _tree_log_probs(policy: Policy, prompts: list[list[int]], trie: Trie, blocks: list[Block]) -> Tensor:
    """[P, R] float64: sums of the tokens' log-probabilities along each path."""
    state = prompt_pass(policy.model, prompts, policy.pad_id)
    tokens = torch.tensor(trie.tokens, device=policy.device)
    first = torch.tensor(trie.children[0], device=policy.device)
    values = torch.zeros(len(prompts), len(trie.tokens), dtype=torch.float64, device=policy.device)
    values[:, first] = state.logits.float().log_softmax(-1)[:, tokens[first]].double()
    outputs = _passes(policy.model, state.cache, state.mask, state.lengths, blocks)
    for block, output in zip(blocks, outputs, strict=True):
        log_probs = output.logits.float().log_softmax(-1).view(len(prompts), block.tokens.numel(), -1)
        values[:, block.child_nodes] = log_probs[:, block.child_places, tokens[block.child_nodes]].double()
    # The root's own value is 0, so it may fill the paths of shorter responses.
    return values[:, trie.paths.to(policy.device)].sum(-1)


def _tree_scores(scorer: Scorer, prompts: list[list[int]], trie: Trie, blocks: list[Block]) -> Tensor:
    """[P, R, heads]: raw scores at the last token of each response."""
    from transformers import DynamicCache

    device = scorer.heads.weight.device
    tokens, lengths = pad_right(prompts, scorer.pad_id, device)
    padded = bool((lengths < tokens.shape[1]).any())
    mask = (torch.arange(tokens.shape[1], device=device) < lengths[:, None]).long() if padded else None
    cache = DynamicCache()
    scorer.backbone(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    scores = torch.zeros(len(prompts), len(trie.leaves), len(scorer.names), device=device)
    outputs = _passes(scorer.backbone, cache, mask, lengths, blocks)
    for block, output in zip(blocks, outputs, strict=True):
        hidden = output.last_hidden_state.view(len(prompts), block.tokens.numel(), -1)[:, block.leaf_places]
        scores[:, block.leaf_responses] = scorer.heads(hidden.float())
    return scores


def _passes(
    model: Callable[..., Any], cache: DynamicCache, mask: Tensor | None, lengths: Tensor, blocks: list[Block]
) -> Iterator[Any]:
    """The model's output for each block, rows P × R of T tokens, a prompt's rows together.

    Args:
        model: the language model, or its body.
        cache: keys and values of the prompts, [P, heads, L, width] a layer; consumed.
        mask: [P, L] 1 at real prompt tokens; None where all are.
        lengths: [P] tokens of each prompt.
        blocks: of the tree.
    """
    count = len(lengths)
    past = cache.get_seq_length()
    seen = torch.ones(count, past, dtype=torch.bool, device=lengths.device) if mask is None else mask.bool()
    for number, block in enumerate(blocks):
        rows, width = block.tokens.shape
        yield model(
            input_ids=block.tokens.repeat(count, 1),
            attention_mask=_attention_mask(seen, block, _number_format(cache)),
            position_ids=(lengths[:, None, None] + block.offsets).view(count * rows, width),
            past_key_values=cache,
            use_cache=True,
        )
        if number + 1 < len(blocks):
            _follow(cache, block, count, seen.shape[1])
            seen = torch.cat([seen, seen.new_ones(count, block.next_places.shape[1])], 1)


def _attention_mask(seen: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """[P × R, 1, T, past + T] additive: 0 where a token sees, the least number where it does not."""
    rows, width = block.tokens.shape
    shape = (len(seen), rows, width)
    sees = torch.cat([seen[:, None, None].expand(*shape, -1), block.visible.expand(*shape, width)], -1)
    blocked = torch.zeros(sees.shape, dtype=dtype, device=seen.device)
    return blocked.masked_fill(~sees, torch.finfo(dtype).min).flatten(0, 1)[:, None]


def _follow(cache: DynamicCache, block: Block, count: int, past: int) -> None:
    """Rearrange the cache for the next block's roots: their row's past and their own path."""
    before = torch.arange(past, device=block.next_rows.device).expand(len(block.next_rows), past)
    places = torch.cat([before, past + block.next_places], 1)
    for layer in cache.layers:
        layer.keys = _gathered(layer.keys, block.next_rows, places, count)
        layer.values = _gathered(layer.values, block.next_rows, places, count)


def _gathered(values: Tensor, rows: Tensor, places: Tensor, count: int) -> Tensor:
    """Keys or values [P × R, heads, S, width] of the given rows [R'] at the given places [R', S']."""
    by_place = values.view(count, -1, *values.shape[1:]).transpose(2, 3)
    return by_place[:, rows[:, None], places].flatten(0, 1).transpose(1, 2)


def _number_format(cache: DynamicCache) -> torch.dtype:
    return cache.layers[0].keys.dtype


def _whole_responses(responses: list[list[int]], eos: int) -> list[list[int]]:
    if any(response[-1] != eos for response in responses):
        longest = max(map(len, responses))
        raise InputError(
            "the testbed's responses do not fit", where="policy.max_response_tokens", fix=f"allow more than {longest}"
        )
    return responses


def _passes_of(prompts: Sequence[Sequence[int]], responses: int, micro_batch: int) -> list[list[int]]:
    """Prompts of one pass each, of like length."""
    size = -(-(micro_batch or RESPONSES_PER_PASS) // responses)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _on_device(blocks: list[Block], device: torch.device) -> list[Block]:
    return [Block(**{name: value.to(device) for name, value in vars(block).items()}) for block in blocks]

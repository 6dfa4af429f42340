"""Which examples a step trains on, and how a step's work is cut into passes that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# float32 numbers that one forward and backward pass may keep (1 GiB), and the tokens it may always have.
PASS_FLOATS, PASS_TOKENS = 2**28, 2048
# What a transformer keeps for the gradient, as multiples of its width (per layer) and of its vocabulary.
PER_LAYER, PER_LOGIT = 20, 4
# Examples of one prompt that a step trains on together.
TOGETHER = 4

Order = Callable[[int], np.ndarray]


class Epochs:
    """The examples of every step: each epoch is one order of all of them, cut into steps end to end."""

    def __init__(self, order: Order, count: int, batch: int) -> None:
        """
        Args:
            order: epoch -> a permutation of 0 .. count − 1, drawn from a stream named by the epoch.
            count: number of examples.
            batch: examples a step.
        """
        self._order = lru_cache(maxsize=2)(order)
        self.count, self.batch = count, batch

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, examples) of a step counted from 0, [batch] int64 each."""
        epochs, places = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), self.count)
        examples = np.empty(self.batch, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            examples[chosen] = self._order(int(epoch))[places[chosen]]
        return epochs, examples


def neighbours_order(prompt_ids: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """A random order of examples in which up to TOGETHER of one prompt stand side by side.

    Neighbours share their prompt's pass through the model; the order is otherwise uniform.

    Args:
        prompt_ids: [N], the prompt of each example.
        stream: where the order is drawn from.

    Returns:
        A permutation of 0 .. N − 1, int64.
    """
    order = stream.permutation(len(prompt_ids))
    order = order[np.argsort(prompt_ids[order], kind="stable")]
    prompts = prompt_ids[order]
    first = np.flatnonzero(np.r_[True, prompts[1:] != prompts[:-1]])
    rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    block = np.cumsum(rank % TOGETHER == 0) - 1
    return order[np.argsort(stream.permutation(block[-1] + 1)[block], kind="stable")]


def policy_pass_tokens(model: PreTrainedModel) -> int:
    """Tokens of one training pass of a causal language model when no micro-batch is given."""
    shape = model.config.get_text_config()
    return _pass_tokens(shape.hidden_size, shape.num_hidden_layers, shape.vocab_size)


def scorer_pass_tokens(backbone: PreTrainedModel) -> int:
    """The same for a scorer's backbone, which makes no logits."""
    shape = backbone.config.get_text_config()
    return _pass_tokens(shape.hidden_size, shape.num_hidden_layers, 0)


def _pass_tokens(hidden_size: int, layers: int, vocabulary_size: int) -> int:
    """A function of the model's shape alone, so that the same sums are formed on every machine."""
    floats = PER_LAYER * hidden_size * layers + PER_LOGIT * vocabulary_size
    return max(PASS_FLOATS // floats, PASS_TOKENS)


def cut_into_passes(lengths: Sequence[int], rows: int, tokens: int, micro_batch: int = 0) -> list[list[int]]:
    """Cut groups of rows into passes of like length, longest first.

    Args:
        lengths: tokens of each group's longest row.
        rows: rows in every group.
        tokens: most tokens in a pass, padding included, when micro_batch is 0.
        micro_batch: most rows in a pass, rounded up to whole groups; 0 goes by tokens.

    Returns:
        The groups' places, one list for each pass; every pass holds at least one group.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    passes: list[list[int]] = []
    start = 0
    while start < len(order):
        fit = -(-micro_batch // rows) if micro_batch else tokens // (rows * lengths[order[start]])
        count = max(fit, 1)
        passes.append(order[start : start + count])
        start += count
    return passes

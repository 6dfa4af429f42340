"""One policy for every λ: a causal language model that is told λ, and the ordinary policy it is at one λ.

e(λ), a small network's output, is added to the embedding of every token, prompt's and response's. Given one λ it is a
constant, so that it can be added to the table of embeddings once and for all: what comes out is a plain checkpoint,
which is sampled, tested and exported as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cdpo_core.errors import InputError
from cdpo_core.models.policy import Policy, width
from cdpo_core.randomness import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HIDDEN = 64
FILE = "lambda_embedding.safetensors"


class LambdaEmbedding(nn.Module):
    """e(λ) = W₂ silu(W₁ log(1 + λ) + b₁) + b₂, 0 for every λ before it is trained.

    Args:
        costs: m, the number of multipliers.
        size: d, the width of a token's embedding.
        seed: W₁ and b₁ come from the stream (seed, "lambda").
    """

    def __init__(self, costs: int, size: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "lambda"))
            self.inner = nn.Linear(costs, HIDDEN)
        self.outer = nn.Linear(HIDDEN, size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, lambda_: Tensor) -> Tensor:
        """e(λ), [d] float32. Args: lambda_ [m] float32, >= 0."""
        added: Tensor = self.outer(nn.functional.silu(self.inner(torch.log1p(lambda_))))
        return added


@contextmanager
def told(model: PreTrainedModel, embedding: LambdaEmbedding) -> Iterator[list[float]]:
    """Within the context the model is the conditional policy at the λ that the given list holds, m numbers.

    The list may change between forward passes; gradients flow into the embedding.
    """
    at = [0.0] * embedding.inner.in_features

    def add(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return output + embedding(output.new_tensor(at, dtype=torch.float32)).to(output.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield at
    finally:
        hook.remove()


def save_embedding(embedding: LambdaEmbedding, folder: Path) -> None:
    """Write e's weights beside the policy's."""
    from safetensors.torch import save_file

    save_file(
        {name: value.detach().cpu().contiguous() for name, value in embedding.state_dict().items()}, folder / FILE
    )


def load_embedding(folder: Path, device: torch.device | str = "cpu") -> LambdaEmbedding:
    """Read what `save_embedding` wrote."""
    from safetensors.torch import load_file

    weights = load_file(folder / FILE, device=str(device))
    size, costs = weights["outer.weight"].shape[0], weights["inner.weight"].shape[1]
    embedding = LambdaEmbedding(costs, size, 0).to(device)
    embedding.load_state_dict(weights)
    return embedding


def bound(policy: Policy, embedding: LambdaEmbedding, lambda_: Sequence[float]) -> Policy:
    """The policy at one λ, as a plain model: e(λ) is added to its table of embeddings, in place.

    An output head that shares the table keeps the table as it was.

    Args:
        policy: the conditional policy's language model.
        embedding: its e.
        lambda_: m multipliers.

    Raises:
        InputError: the model makes more of its table of embeddings than to look tokens up in it.
    """
    model, table = policy.model, policy.model.get_input_embeddings()
    probe = torch.arange(min(8, table.weight.shape[0]), device=policy.device)[None]
    with torch.no_grad():
        added = embedding(torch.tensor(list(lambda_), dtype=torch.float32, device=policy.device))
        wanted = table(probe) + added.to(table.weight.dtype)
        _untie(model)
        table.weight.add_(added.to(table.weight.dtype))
        if not torch.allclose(table(probe), wanted, rtol=1e-3, atol=1e-5):
            raise InputError(
                f"the embeddings of a {type(model).__name__} cannot take λ in",
                where="dpo.conditional",
                fix="train a policy for each limit (dpo.conditional: false), or take another architecture",
            )
    return replace(policy, model=model)


def new_embedding(policy: Policy, costs: int, seed: int) -> LambdaEmbedding:
    """An untrained e for a policy. Args: costs m; seed."""
    return LambdaEmbedding(costs, width(policy.model.config), seed).to(policy.device)


def _untie(model: PreTrainedModel) -> None:
    """Give the output head a copy of the table that it shares with the input."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        return
    head.weight = nn.Parameter(table.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False

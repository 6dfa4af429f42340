"""What PPO needs of models and worlds: token log-probs, values of each token, rewards and costs of new texts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cdpo_core.models.logprobs import chosen_log_probs, pad_right
from cdpo_core.models.policy import Policy
from cdpo_core.models.scorer import load_scorer
from cdpo_core.testbed.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """N responses with their prompts, padded on the right.

    Attributes:
        tokens: [N, T] int64, prompt then response.
        attention: [N, T] int64.
        places: [N, L] where the token before each response token stands.
        mask: [N, L] bool, the real response tokens.
    """

    tokens: Tensor
    attention: Tensor
    places: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], policy: Policy) -> Batch:
        """Args: prompts and responses, N of each, as tokens."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        tokens, lengths = pad_right(rows, policy.pad_id, policy.device)
        starts = torch.tensor([len(prompt) for prompt in prompts], device=policy.device)
        sizes = lengths - starts
        steps = torch.arange(int(sizes.max()), device=policy.device)
        mask = steps < sizes[:, None]
        places = (starts[:, None] - 1 + steps).clamp_max(tokens.shape[1] - 2)
        return cls(tokens, (torch.arange(tokens.shape[1]) < lengths[:, None].cpu()).long().to(tokens), places, mask)

    def rows(self, chosen: Tensor) -> Batch:
        """Part of the responses."""
        return Batch(self.tokens[chosen], self.attention[chosen], self.places[chosen], self.mask[chosen])


def token_log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
    """log π of each response token, [N, L] float32, 0 outside the mask."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
    log_probs = chosen_log_probs(logits, batch.tokens[:, 1:]).gather(1, batch.places)
    return torch.where(batch.mask, log_probs, 0.0).float()


class Critic(nn.Module):
    """V before each response token: a copy of the reference's backbone with a value head that starts at 0."""

    def __init__(self, reference: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(reference.base_model)
        self.head = nn.Linear(reference.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """[N, L] float32."""
        hidden = self.backbone(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
        values: Tensor = self.head(hidden.last_hidden_state.float())[..., 0].gather(1, batch.places)
        return values


class Judge:
    """Rewards and costs of new texts: by the scorers, or on the testbed by the truth.

    Args:
        inputs: data, scorers_0, ... (none of them when the truth scores).
        constraints: {name, labels} of each cost.
        device: where scorers run.
        trusted: the scorers whose own code may run.
    """

    def __init__(
        self,
        inputs: Mapping[str, Path],
        constraints: Sequence[Mapping[str, str]],
        device: str,
        trusted: Sequence[str] = (),
    ) -> None:
        names = sorted(name for name in inputs if name.startswith("scorers_"))
        self.scorers = [load_scorer(inputs[name], device, trust_remote_code=name in trusted) for name in names]
        self.constraints = constraints
        self.world = None if names else World.load(inputs["data"] / "world.json")
        prompts = pd.read_parquet(inputs["data"] / "prompts.parquet", columns=["prompt_id", "prompt"])
        self.texts = dict(zip(prompts["prompt_id"], prompts["prompt"], strict=True))

    def score(self, prompt_ids: Sequence[str], responses: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Reward [N] and costs [N, m] float64 of responses to the prompts of these ids."""
        if self.world is not None:
            reward, costs = self.world.score_texts(prompt_ids, responses)
            return reward, costs[:, [self.world.labels.index(item["labels"]) for item in self.constraints]]
        prompts = [self.texts[name] for name in prompt_ids]
        values: dict[str, np.ndarray] = {}
        for scorer in self.scorers:
            scores = scorer.score(prompts, list(responses)).numpy()
            values |= {name: scores[:, index] for index, name in enumerate(scorer.names)}
        return values["reward"], np.stack([values[item["name"]] for item in self.constraints], axis=1)

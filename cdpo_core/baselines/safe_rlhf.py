"""Safe RLHF: PPO-Lagrangian with reward and cost critics (Dai et al. 2023, arXiv:2310.12773), as a rival.

Each iteration samples responses from the policy, scores them, and takes clipped PPO steps on the advantage
(A_r − λA_c)/(1 + λ); λ follows the recent mean cost by SGD on log λ. One departure from the published code: the KL
penalty to the reference stands in the reward's stream alone, with coefficient β, and not half in the reward's and half
in the cost's, whose weight would then change with λ. So at every λ it solves the same problem as C-DPO.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn

from cdpo_core.baselines.critics import Batch, Critic, Judge, token_log_probs
from cdpo_core.baselines.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    generalised_advantages,
    lagrangian_advantages,
    next_log_lambda,
)
from cdpo_core.config import Section
from cdpo_core.errors import TrainingError
from cdpo_core.evaluation.sampling import sample
from cdpo_core.learning.batches import Epochs
from cdpo_core.learning.loop import Schedule
from cdpo_core.models.checkpoints import write_json
from cdpo_core.models.policy import Policy, load_policy, save_policy
from cdpo_core.randomness import numpy_stream, torch_stream

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime, Slice

RECORDS = 20


class SafeRlhfSettings(Section):
    """Settings of the rival; the paper's where a comment says so, else what works best on the testbed."""

    iterations: int = Field(200, ge=1, description="Rounds of sampling and updating.")
    prompts_per_step: int = Field(32, ge=1, description="Prompts an iteration.")
    responses_per_prompt: int = Field(8, ge=1, description="Responses sampled for each.")
    ppo_epochs: int = Field(2, ge=1, description="Passes over an iteration's responses (the paper: 1).")
    minibatches: int = Field(2, ge=1, description="Updates in each pass.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of the policy (cosine to 0).")
    critic_learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of the critics.")
    critic_warmup: int = Field(5, ge=0, description="Iterations in which only the critics learn.")
    clip: float = Field(0.2, gt=0, description="Clipping of the probability ratio (the paper: 0.2).")
    value_clip: float = Field(5.0, gt=0, description="Clipping of the values' change (the paper: 5).")
    gamma: float = Field(1.0, gt=0, le=1, description="Discount (the paper: 1).")
    gae_decay: float = Field(0.95, ge=0, le=1, description="Decay of the advantages (the paper: 0.95).")
    lambda_init: float = Field(1.0, gt=0, description="First lambda (the paper: 1).")
    lambda_learning_rate: float = Field(0.1, gt=0, description="SGD's rate on log lambda (the paper: 0.1).")
    lambda_max: float = Field(20.0, gt=0, description="Largest lambda (the paper: 5 to 10).")
    lambda_delay: int = Field(5, ge=0, description="Iterations before lambda moves.")
    cost_window: int = Field(4, ge=1, description="Iterations whose mean cost lambda follows.")
    averaging: float = Field(0.95, ge=0, lt=1, description="Decay of the running average of the weights returned.")


def train_safe_rlhf(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the policy of PPO-Lagrangian at the given targets.

    Args:
        config: seed, policy.{max_prompt_tokens, max_response_tokens, trust_remote_code}, dpo.beta, constraints
            ([{name, labels}], one for each of m costs), targets [m] (the mean costs it aims at, cost units),
            safe_rlhf (the fields of `SafeRlhfSettings`), trusted (scorers whose own code may run; absent is none).
        inputs: data, reference (policy), splits, scorers_0, ... (none: the testbed's truth scores).
        out: gets the policy's Hugging Face folder, and training.json: {steps, updates, generated_tokens, lambda}.
        runtime: device, micro_batch (responses, sampling), progress.

    Raises:
        TrainingError: a loss is not finite.
    """
    policy = load_policy(inputs["reference"], config_policy=config.policy, device=runtime.device, dtype=torch.float32)
    policy.model.requires_grad_(True)
    trainer = _Trainer(config, policy, inputs, runtime)
    iterations = trainer.settings.iterations
    records: list[dict[str, Any]] = []
    window: list[dict[str, float]] = []
    for iteration in range(iterations):
        window.append(trainer.iterate(iteration))
        if (iteration + 1) % -(-iterations // RECORDS) == 0 or iteration + 1 == iterations:
            means = {name: float(np.mean([figures[name] for figures in window])) for name in window[0]}
            records.append({"step": iteration + 1, **means})
            window = []
        runtime.progress("safe_rlhf", iteration + 1, iterations)
    trainer.put_average()
    save_policy(policy, out)
    found = {
        "updates": trainer.updates,
        "generated_tokens": trainer.generated_tokens,
        "lambda": trainer.lambda_.tolist(),
    }
    write_json(out / "training.json", {"steps": records, **found})


@dataclass(frozen=True)
class _Rollout:
    """One iteration's responses, without gradient: log π_old, values and advantages by critic, means of the scores."""

    batch: Batch
    old: Tensor
    values: list[Tensor]
    advantages: list[Tensor]
    reward: float
    costs: np.ndarray
    kl: float


class _Trainer:
    """Policy, reference, critics and λ while they learn.

    Attributes:
        lambda_: [m].
        updates: optimizer steps of the policy so far; generated_tokens: sampled so far.
    """

    def __init__(self, config: Slice, policy: Policy, inputs: Mapping[str, Path], runtime: Runtime) -> None:
        self.settings = SafeRlhfSettings(**config.safe_rlhf.as_dict())
        self.seed, self.beta, self.targets = config.seed, config.dpo.beta, list(config.targets)
        self.policy, self.runtime = policy, runtime
        self.reference = copy.deepcopy(policy.model).requires_grad_(False)
        self.names = [item["name"] for item in config.constraints]
        self.critics = [Critic(self.reference).to(policy.device) for _ in ("reward", *self.names)]
        for critic in self.critics:
            critic.requires_grad_(True)
        self.judge = Judge(inputs, config.constraints, runtime.device, getattr(config, "trusted", ()))
        self.prompt_ids, self.prompts = _policy_prompts(policy, inputs)
        count, settings = len(self.prompts), self.settings
        self.epochs = Epochs(
            lambda epoch: numpy_stream(self.seed, "safe_rlhf", "prompts", epoch).permutation(count),
            count,
            min(settings.prompts_per_step, count),
        )
        self.parameters = [value for value in policy.model.parameters() if value.requires_grad]
        self.averages = [value.detach().clone() for value in self.parameters]
        self.policy_optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.99), weight_decay=0.0)
        learned = [value for critic in self.critics for value in critic.parameters()]
        self.critic_optimizer = torch.optim.AdamW(learned, betas=(0.9, 0.99), weight_decay=0.0)
        self.log_lambda = [math.log(settings.lambda_init)] * len(self.targets)
        self.recent: deque[np.ndarray] = deque(maxlen=settings.cost_window)
        self.updates = self.generated_tokens = 0

    @property
    def lambda_(self) -> np.ndarray:
        return np.exp(np.array(self.log_lambda))

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, score, move λ, update critics and policy; returns the iteration's figures."""
        rollout = self._roll_out(iteration)
        self.recent.append(rollout.costs)
        if iteration >= self.settings.lambda_delay:
            self._move_lambda()
        lambda_ = torch.as_tensor(self.lambda_, dtype=torch.float32, device=self.policy.device)
        mixed = lagrangian_advantages(rollout.advantages[0], torch.stack(rollout.advantages[1:]), lambda_)
        losses = self._update(rollout, mixed, iteration)
        figures = {"reward": rollout.reward, "kl": rollout.kl, **losses}
        for name, cost, value in zip(self.names, rollout.costs, self.lambda_, strict=True):
            figures |= {f"cost_{name}": float(cost), f"lambda_{name}": float(value)}
        return figures

    def put_average(self) -> None:
        """Put the running average of the weights into the policy."""
        if self.settings.averaging:
            with torch.no_grad():
                for parameter, average in zip(self.parameters, self.averages, strict=True):
                    parameter.copy_(average)

    @torch.no_grad()
    def _roll_out(self, iteration: int) -> _Rollout:
        settings = self.settings
        _, rows = self.epochs.at(iteration)
        names = [self.prompt_ids[row] for row in rows]
        groups = sample(
            self.policy,
            [self.prompts[row] for row in rows],
            settings.responses_per_prompt,
            prompt_ids=names,
            seed_stream=(self.seed, "safe_rlhf", iteration),
            micro_batch=self.runtime.micro_batch,
        )
        prompts = [self.prompts[row] for row in rows for _ in range(settings.responses_per_prompt)]
        tokens = [response.tokens for group in groups for response in group]
        self.generated_tokens += sum(map(len, tokens))
        asked = [name for name in names for _ in range(settings.responses_per_prompt)]
        reward, costs = self.judge.score(asked, [self.policy.decode(response) for response in tokens])
        batch = Batch.of(prompts, tokens, self.policy)
        old = token_log_probs(self.policy.model, batch)
        drift = old - token_log_probs(self.reference, batch)
        values = [critic(batch) for critic in self.critics]
        streams = [_at_last(reward, batch) - self.beta * drift, *(_at_last(cost, batch) for cost in costs.T)]
        advantages = [
            generalised_advantages(stream, value, batch.mask, settings.gamma, settings.gae_decay)
            for stream, value in zip(streams, values, strict=True)
        ]
        kl = float(drift.sum(1).mean())
        return _Rollout(batch, old, values, advantages, float(reward.mean()), costs.mean(0), kl)

    def _move_lambda(self) -> None:
        settings, costs = self.settings, np.mean(self.recent, axis=0)
        self.log_lambda = [
            next_log_lambda(value, float(cost), target, settings.lambda_learning_rate, settings.lambda_max)
            for value, cost, target in zip(self.log_lambda, costs, self.targets, strict=True)
        ]

    def _update(self, rollout: _Rollout, mixed: Tensor, iteration: int) -> dict[str, float]:
        settings, sums = self.settings, {"loss": 0.0, "value_loss": 0.0}
        steps = settings.ppo_epochs * settings.minibatches
        for epoch in range(settings.ppo_epochs):
            stream = torch_stream(self.seed, "safe_rlhf", "minibatches", iteration, epoch)
            order = torch.randperm(len(mixed), generator=stream).to(mixed.device)
            for chosen in order.chunk(settings.minibatches):
                batch = rollout.batch.rows(chosen)
                value_loss = self._critic_loss(rollout, batch, chosen)
                self._step(value_loss, self.critic_optimizer, settings.critic_learning_rate, iteration)
                sums["value_loss"] += float(value_loss.detach()) / steps
                if iteration < settings.critic_warmup:
                    continue
                log_probs = token_log_probs(self.policy.model, batch)
                loss = clipped_policy_loss(log_probs, rollout.old[chosen], mixed[chosen], batch.mask, settings.clip)
                self._step(loss, self.policy_optimizer, settings.learning_rate, iteration)
                self.updates += 1
                decay = min(settings.averaging, (1 + self.updates) / (10 + self.updates))
                torch._foreach_lerp_(self.averages, [value.detach() for value in self.parameters], 1 - decay)
                sums["loss"] += float(loss.detach()) / steps
        return sums

    def _critic_loss(self, rollout: _Rollout, batch: Batch, chosen: Tensor) -> Tensor:
        losses = [
            clipped_value_loss(
                critic(batch), old[chosen], (old + advantages)[chosen], batch.mask, self.settings.value_clip
            )
            for critic, old, advantages in zip(self.critics, rollout.values, rollout.advantages, strict=True)
        ]
        return torch.stack(losses).sum()

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer, peak: float, iteration: int) -> None:
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the safe_rlhf loss is not finite at iteration {iteration + 1}",
                where="safe_rlhf",
                fix="lower its learning rate",
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = Schedule(self.settings.iterations, peak).rate(iteration)
        optimizer.step()


def _policy_prompts(policy: Policy, inputs: Mapping[str, Path]) -> tuple[list[str], list[list[int]]]:
    splits = pd.read_parquet(inputs["splits"] / "splits.parquet")
    names = sorted(splits.loc[splits["split"] == "policy", "prompt_id"])
    texts = pd.read_parquet(inputs["data"] / "prompts.parquet").set_index("prompt_id")["prompt"]
    return names, policy.encode_prompts(texts.loc[names].tolist())


def _at_last(scores: Sequence[float] | np.ndarray, batch: Batch) -> Tensor:
    """[N, L]: each response's score at its last token, 0 elsewhere."""
    stream = torch.zeros(batch.mask.shape, device=batch.mask.device)
    last = batch.mask.sum(1) - 1
    stream[torch.arange(len(stream)), last] = torch.as_tensor(np.asarray(scores)).to(stream)
    return stream

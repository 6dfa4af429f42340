"""One round of C-DPO: train π_λ by DPO on preferences re-decided by r_λ = r − λᵀc (arXiv:2403.02475).

Everything a round reads is independent of λ and computed once: the reference's responses, their
rewards and costs, and log π_ref of each. A round puts new labels on them and trains, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cdpo_core.dual.lagrangian import importance_weights, lagrangian_reward, relabel
from cdpo_core.errors import InputError
from cdpo_core.learning.batches import Epochs, cut_into_passes, policy_pass_tokens
from cdpo_core.learning.loop import Schedule, fit, mixed_precision
from cdpo_core.learning.losses import anchor_loss, soft_dpo_loss
from cdpo_core.models.checkpoints import saved_dtype, write_json
from cdpo_core.models.logprobs import response_log_probs
from cdpo_core.models.policy import Policy, load_policy, merged, save_policy, with_lora
from cdpo_core.models.prompt_tokens import read_prompt_tokens
from cdpo_core.randomness import numpy_stream, torch_stream

if TYPE_CHECKING:
    from torch import Tensor

    from cdpo_core.stages import Runtime, Slice

Indices = np.ndarray


def train_round(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the policy π_λ for one λ.

    Args:
        config: seed, lambda_ (one multiplier for each of `names`), names (the constraints'), reward_weight
            (optional, 1: the reward's factor in r_λ; 0 leaves the costs alone),
            policy.{lora_rank, trust_remote_code}, dpo.{beta, labels, anchor, anchor_end, steps,
            prompts_per_step, responses_per_prompt, learning_rate, optimizer, adam_beta2, averaging, pairs}.
        inputs: reference (policy), data (prompts), responses and scores of the reference's
            samples (or of the data's pairs, if dpo.pairs is `dataset`), splits; previous (policy) to
            start from it instead of from the reference.
        out: gets the policy's Hugging Face folder with policy.json, and training.json.
        runtime: device, micro_batch (responses, rounded up to whole prompts), scratch, progress.

    Raises:
        InputError: the policy split has no prompts with enough responses.
        TrainingError: the loss is not finite.
    """
    steps = config.dpo.steps
    policy, groups, dtype = trainable(inputs.get("previous", inputs["reference"]), config, inputs, runtime)
    round_ = Round(policy, groups, config, dtype, runtime.micro_batch, steps)
    round_.decide(config.lambda_)
    records = fit(policy.model, round_.losses_at, schedule_of(config.dpo, steps), runtime, "dpo")
    save_trained(policy, dtype, out)
    write_json(out / "training.json", {"steps": records})


def trainable(
    start: Path, config: Slice, inputs: Mapping[str, Path], runtime: Runtime
) -> tuple[Policy, Groups, torch.dtype]:
    """The policy that a training starts from, what it learns from, and the number format to save it in.

    All weights are trainable, in float32; with adapters only these are, on weights as they were saved.

    Args:
        start: a policy's folder.
        config: seed, names, policy.{lora_rank, trust_remote_code}, dpo, as of `train_round`.
        inputs: as of `train_round`.
        runtime: device.
    """
    adapted = config.policy.lora_rank > 0
    policy = load_policy(
        start, config_policy=config.policy, device=runtime.device, dtype=None if adapted else torch.float32
    )
    groups = load_groups(inputs, config.names, config.dpo)
    if adapted:
        policy = with_lora(policy, config.policy.lora_rank, config.seed)
    else:
        policy.model.requires_grad_(True)
    return policy, groups, saved_dtype(start)


def save_trained(policy: Policy, dtype: torch.dtype, out: Path) -> None:
    """Write a trained policy in its number format, adapters merged into the weights first."""
    policy = merged(policy)
    policy.model.to(dtype)
    save_policy(policy, out)


@dataclass(frozen=True)
class Groups:
    """P groups of K responses to one prompt: the reference's to the policy prompts, or the data's pairs.

    Attributes:
        prompt_ids: P names, one for each group.
        prompts: P prompts' tokens.
        responses: P × K responses' tokens.
        ref_log_probs: log π_ref, [P, K] float64, nats.
        reward: [P, K] float64.
        costs: [P, K, m] float64, calibrated units.
    """

    prompt_ids: list[str]
    prompts: list[list[int]]
    responses: list[list[list[int]]]
    ref_log_probs: Tensor
    reward: Tensor
    costs: Tensor


def load_groups(inputs: Mapping[str, Path], names: Sequence[str], dpo: Slice) -> Groups:
    """The scored responses that a round learns from, in the order of prompt_id and sample.

    With dpo.pairs `samples` a group is a prompt of the policy split with all its responses; with `dataset` it is
    one pair of the data's preferences, samples 2i and 2i + 1 of its prompt.

    Args:
        inputs: responses (with the prompts' tokens that the reference's log-probabilities belong to), scores, splits.
        names: the constraints', one cost column each.
        dpo: pairs, responses_per_prompt.

    Raises:
        InputError: there is no such group, or a group has too few responses or another number of them.
    """
    responses = pd.read_parquet(
        inputs["responses"] / "responses.parquet", columns=["prompt_id", "sample", "tokens", "ref_log_prob"]
    )
    group = ["prompt_id"]
    if dpo.pairs == "dataset":
        responses["pair"] = responses["sample"] // 2
        group.append("pair")
    else:
        splits = pd.read_parquet(inputs["splits"] / "splits.parquet")
        responses = responses[responses["prompt_id"].isin(splits.loc[splits["split"] == "policy", "prompt_id"])]
    table = responses.merge(pd.read_parquet(inputs["scores"] / "scores.parquet"), on=["prompt_id", "sample"])
    table = table.sort_values(["prompt_id", "sample"], kind="stable")
    sizes = table.groupby(group).size()
    if sizes.empty or sizes.nunique() > 1 or sizes.iloc[0] < dpo.responses_per_prompt or len(table) < len(responses):
        raise InputError(
            f"a round needs policy prompts with one number of scored responses, at least {dpo.responses_per_prompt}; "
            f"found {len(sizes)} prompts with {sorted(set(sizes))} responses",
            where="policy split",
            fix="raise sampling.reference, lower dpo.responses_per_prompt, or give more prompts",
        )
    count, size = len(sizes), int(sizes.iloc[0])
    written = read_prompt_tokens(inputs["responses"])
    tokens = [list(map(int, row)) for row in table["tokens"]]

    def grid(columns: str | list[str]) -> Tensor:
        return torch.tensor(table[columns].to_numpy(float)).reshape(count, size, -1)

    keys = [name if isinstance(name, str) else "/".join(map(str, name)) for name in sizes.index]
    return Groups(
        prompt_ids=keys,
        prompts=[written[name] for name in sizes.index.get_level_values("prompt_id")],
        responses=[tokens[start : start + size] for start in range(0, len(tokens), size)],
        ref_log_probs=grid("ref_log_prob")[..., 0],
        reward=grid("reward")[..., 0],
        costs=grid([f"cost_{name}" for name in names]),
    )


class Round:
    """The losses of one round's steps: which responses, their labels under r_λ, and the DPO loss on them.

    `decide` says at which λ.

    Attributes:
        r_lambda: r − λᵀc of every response, [P, K] float64.
        weights: w_j = softmax_j(r_λ,j/β) over a prompt's K reference samples, [P, K] float64.
        chances: of each response to be drawn for a step, [P, K]: part evenly, part by its weight. DPO has
            the same minimiser under every draw; the pairs that π_λ itself would meet matter most to it.
    """

    def __init__(
        self, policy: Policy, groups: Groups, config: Slice, dtype: torch.dtype, micro_batch: int, steps: int
    ) -> None:
        self.policy, self.groups, self.dpo, self.seed = policy, groups, config.dpo, config.seed
        self.dtype, self.micro_batch, self.steps = dtype, micro_batch, steps
        self._reward = getattr(config, "reward_weight", 1.0) * groups.reward
        count = len(groups.prompts)
        self._epochs = Epochs(
            lambda epoch: numpy_stream(self.seed, "round", "prompts", epoch).permutation(count),
            count,
            config.dpo.prompts_per_step,
        )
        self._tokens = policy_pass_tokens(policy.model)

    def decide(self, lambda_: Sequence[float]) -> None:
        """Put the labels of r_λ on all responses, and draw by its weights from now on. Args: lambda_ [m]."""
        self.r_lambda = lagrangian_reward(self._reward, self.groups.costs, torch.tensor(lambda_).double())
        self.weights = importance_weights(self.r_lambda, self.dpo.beta)
        focus, size = self.dpo.focus, self.weights.shape[1]
        self.chances = ((1 - focus) / size + focus * self.weights).numpy()
        # How often a response comes up in a visit of its prompt, but for the draw being without replacement.
        inclusion = (self.dpo.responses_per_prompt * torch.from_numpy(self.chances)).clamp_max(1)
        self._anchor_weights = self.weights / inclusion

    def losses_at(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The step's losses, one pass of whole prompts after the other, each divided by the step's prompts."""
        epochs, rows = self._epochs.at(step)
        columns = self._responses_of(epochs, rows)
        lengths = [
            len(self.groups.prompts[row]) + max(len(self.groups.responses[row][column]) for column in chosen)
            for row, chosen in zip(rows, columns, strict=True)
        ]
        for places in cut_into_passes(lengths, columns.shape[1], self._tokens, self.micro_batch):
            sums = self.group_losses(rows[places], columns[places], self.anchor_weight(step))
            yield {name: value.sum() / len(rows) for name, value in sums.items()}

    def anchor_weight(self, step: int) -> float:
        """The anchor's weight at a step counted from 0: a half cosine from dpo.anchor to its share anchor_end.

        Early it keeps the mass from leaking; late, its bias at finite K would be learned by heart.
        """
        if not self.dpo.anchor:
            return 0.0
        left = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return float(self.dpo.anchor * (self.dpo.anchor_end + (1 - self.dpo.anchor_end) * left))

    def group_losses(self, rows: Indices, columns: Indices, anchor_weight: float) -> dict[str, Tensor]:
        """Loss of each prompt's group: DPO over all its pairs plus the anchor; [P'] each.

        Args:
            rows: [P'] prompts.
            columns: [P', k] responses of each.
            anchor_weight: of the anchor beside the DPO loss.
        """
        groups, device = self.groups, self.policy.device
        with mixed_precision(device, self.dtype):
            log_probs = response_log_probs(
                self.policy.model,
                [groups.prompts[row] for row in rows],
                [[groups.responses[row][j] for j in chosen] for row, chosen in zip(rows, columns, strict=True)],
                self.policy.pad_id,
            )
        place = (torch.from_numpy(rows)[:, None], torch.from_numpy(columns))
        log_ratio = log_probs - groups.ref_log_probs[place].to(device)
        targets = self.labels(rows, columns).to(device)
        dpo = soft_dpo_loss(log_ratio, targets, self.dpo.beta)
        # Part of the K samples stands for all: each counts by how seldom it is drawn (Horvitz and Thompson).
        anchor = anchor_loss(log_probs, self._anchor_weights[place].to(device))
        loss = dpo + anchor_weight * anchor
        return {
            "loss": loss,
            "dpo": dpo.detach(),
            "anchor": anchor.detach(),
            "accuracy": _agreement(log_ratio, targets),
        }

    def labels(self, rows: Indices, columns: Indices) -> Tensor:
        """Relabelling: the target probabilities of every pair of each group under r_λ, [P', k, k] float64.

        `sampled` labels are drawn once for each pair of a prompt and are the same whenever it comes up.
        """
        if self.dpo.labels != "sampled":
            place = (torch.from_numpy(rows)[:, None], torch.from_numpy(columns))
            return relabel(self.r_lambda[place], self.dpo.labels)
        drawn = []
        for row, chosen in zip(rows, columns, strict=True):
            stream = torch_stream(self.seed, "relabel", self.groups.prompt_ids[row])
            drawn.append(relabel(self.r_lambda[row], "sampled", stream)[chosen[:, None], chosen])
        return torch.stack(drawn)

    def _responses_of(self, epochs: Indices, rows: Indices) -> Indices:
        """k of each prompt's K responses, drawn without replacement in proportion to `chances`."""
        size = self.dpo.responses_per_prompt
        columns = np.empty((len(rows), size), dtype=np.int64)
        for place, (epoch, row) in enumerate(zip(epochs, rows, strict=True)):
            noise = numpy_stream(self.seed, "round", "responses", int(epoch), int(row)).gumbel(
                size=len(self.chances[row])
            )
            columns[place] = np.argsort(-(np.log(self.chances[row]) + noise), kind="stable")[:size]
        return columns


def _agreement(log_ratio: Tensor, targets: Tensor) -> Tensor:
    """Share of each group's pairs that the policy's implied reward orders as the labels do, [P']."""
    implied = torch.sign(log_ratio.detach()[..., :, None] - log_ratio.detach()[..., None, :])
    wanted = torch.sign(targets - 0.5)
    decided = wanted != 0
    agreed = ((implied == wanted) & decided).sum((-1, -2))
    return agreed / decided.sum((-1, -2)).clamp_min(1)


def schedule_of(dpo: Slice, steps: int) -> Schedule:
    """How the weights of a policy move in `steps` steps. Args: dpo, the config's section; steps."""
    return Schedule(
        steps,
        dpo.learning_rate,
        adam_beta2=dpo.adam_beta2,
        muon=dpo.optimizer == "muon",
        averaging=dpo.averaging,
    )

"""Supervised fine-tuning on demonstrations: makes the reference policy π_ref."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cdpo_core.errors import InputError
from cdpo_core.evaluation.cuts import policy_cuts, write_cuts
from cdpo_core.learning.batches import Epochs, cut_into_passes, neighbours_order, policy_pass_tokens
from cdpo_core.learning.loop import Schedule, fit, mixed_precision
from cdpo_core.learning.losses import sft_loss
from cdpo_core.models.checkpoints import write_json
from cdpo_core.models.logprobs import (
    chosen_log_probs,
    continue_pass,
    has_expandable_cache,
    pad_right,
    prompt_pass,
    response_log_probs,
)
from cdpo_core.models.policy import Policy, load_policy, new_policy, save_policy
from cdpo_core.models.tokenizer import train_tokenizer
from cdpo_core.randomness import numpy_stream

if TYPE_CHECKING:
    from torch import Tensor

    from cdpo_core.stages import Runtime, Slice


def train_sft(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the reference policy, trained on the demonstrations or taken as it is.

    Args:
        config: seed, base (`scratch` or `loaded`), policy.{template, max_prompt_tokens, max_response_tokens, dtype,
            trust_remote_code, hidden_size, layers, heads, vocabulary_size},
            sft.{train, steps, batch, learning_rate}.
        inputs: data (demonstrations, prompts, preferences); base, a model folder, unless base is `scratch`.
        out: gets the policy's Hugging Face folder with policy.json, training.json, and cut.json: how many of the
            data's prompts and responses its lengths cut.
        runtime: device, micro_batch (demonstrations), scratch, progress.

    Raises:
        InputError: `scratch` without training, or no demonstrations.
        TrainingError: the loss is not finite.
    """
    demonstrations = pd.read_parquet(inputs["data"] / "demonstrations.parquet")
    policy = _starting_policy(config, inputs, demonstrations, runtime)
    records: list[dict[str, Any]] = []
    if config.sft.train:
        if demonstrations.empty:
            raise InputError(
                "there are no demonstrations to learn from",
                where=str(inputs["data"]),
                fix="give data with responses, or set sft.train: false with a ready policy as base",
            )
        records = _train(policy, demonstrations, config, runtime)
    policy.model.to(getattr(torch, config.policy.dtype))
    save_policy(policy, out)
    write_json(out / "training.json", {"steps": records})
    write_cuts(policy_cuts(policy, *_all_texts(inputs["data"])), out)


def _all_texts(data: Path) -> tuple[list[str], list[str]]:
    """Every prompt, and every response that came with the data."""
    pairs = pd.read_parquet(data / "preferences.parquet", columns=["response_0", "response_1"])
    prompts = pd.read_parquet(data / "prompts.parquet", columns=["prompt"])
    return prompts["prompt"].tolist(), pd.concat([pairs["response_0"], pairs["response_1"]]).tolist()


def _starting_policy(
    config: Slice, inputs: Mapping[str, Path], demonstrations: pd.DataFrame, runtime: Runtime
) -> Policy:
    if config.base != "scratch":
        dtype = torch.float32 if config.sft.train else None
        return load_policy(inputs["base"], config_policy=config.policy, device=runtime.device, dtype=dtype)
    if not config.sft.train:
        raise InputError(
            "a policy from scratch needs training", where="sft.train", fix="set sft.train: true, or give policy.base"
        )
    texts = pd.concat([demonstrations["prompt"], demonstrations["response"]])
    tokenizer = train_tokenizer(texts, config.policy.vocabulary_size)
    policy = new_policy(config.policy, tokenizer, config.seed)
    policy.model.to(device=runtime.device, dtype=torch.float32)
    return policy


def _train(policy: Policy, demonstrations: pd.DataFrame, config: Slice, runtime: Runtime) -> list[dict[str, Any]]:
    places, distinct = pd.factorize(demonstrations["prompt"])
    prompts = policy.encode_prompts(distinct.tolist())
    responses = policy.encode_responses(demonstrations["response"].tolist())
    epochs = Epochs(
        lambda epoch: neighbours_order(places, numpy_stream(config.seed, "sft", epoch)),
        len(responses),
        config.sft.batch,
    )
    tokens = policy_pass_tokens(policy.model)
    dtype = getattr(torch, config.policy.dtype)

    def losses_at(step: int) -> Iterator[dict[str, Tensor]]:
        _, rows = epochs.at(step)
        in_all = sum(len(responses[row]) for row in rows)
        lengths = [len(prompts[places[row]]) + len(responses[row]) for row in rows]
        for chosen in cut_into_passes(lengths, 1, tokens, runtime.micro_batch):
            with mixed_precision(policy.device, dtype):
                log_probs = demonstration_log_probs(
                    policy, prompts, places[rows[chosen]], [responses[row] for row in rows[chosen]]
                )
            yield {"loss": sft_loss(log_probs, in_all)}

    schedule = Schedule(config.sft.steps, config.sft.learning_rate)
    return fit(policy.model, losses_at, schedule, runtime, "sft")


def demonstration_log_probs(
    policy: Policy, prompts: Sequence[Sequence[int]], places: np.ndarray, responses: Sequence[Sequence[int]]
) -> Tensor:
    """log π of N responses of which several may share a prompt; each distinct prompt is passed through once.

    Args:
        policy: the policy.
        prompts: tokens of all prompts.
        places: [N], each response's prompt.
        responses: N responses' tokens.

    Returns:
        [N] float64, nats, differentiable.
    """
    distinct, rows = np.unique(places, return_inverse=True)
    if not has_expandable_cache(policy.model):
        alone = [[response] for response in responses]
        return response_log_probs(policy.model, [prompts[place] for place in places], alone, policy.pad_id)[:, 0]
    state = prompt_pass(policy.model, [prompts[place] for place in distinct], policy.pad_id)
    each = torch.from_numpy(rows).to(policy.device)
    logits = state.logits[each, None]
    state.select(each)
    tokens, lengths = pad_right(responses, policy.pad_id, policy.device)
    if tokens.shape[1] > 1:
        logits = torch.cat([logits, continue_pass(policy.model, state, tokens[:, :-1], 0)], 1)
    real = torch.arange(tokens.shape[1], device=policy.device) < lengths[:, None]
    return torch.where(real, chosen_log_probs(logits, tokens), 0.0).sum(1)

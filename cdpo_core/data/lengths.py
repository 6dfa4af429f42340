"""How much of a data set the policy's lengths would cut, before anything is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from cdpo_core.data.prepare import RESPONSES, Prepared, prepare
from cdpo_core.data.sources import locate
from cdpo_core.evaluation.cuts import cut_warnings, policy_cuts, policy_lines
from cdpo_core.models.checkpoints import hub_options, is_local
from cdpo_core.models.policy import Policy, check_text
from cdpo_core.models.template_date import freeze_date
from cdpo_core.models.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cdpo_core.config import ExperimentConfig, PolicyConfig

# Texts from which the tokenizer is estimated that a policy from scratch will train.
SAMPLE = 400


def length_lines(config: ExperimentConfig, prepared: Prepared | None = None) -> list[str]:
    """What the lengths would cut, in lines; more than a twentieth of the texts is a warning among them.

    A policy from scratch trains its tokenizer on the data: there the counts are estimates by one of a part.

    Args:
        config: the experiment's.
        prepared: its data, where it has been read already.

    Raises:
        InputError: the data cannot be used, or the policy's template cannot write its prompts.
    """
    policy = config.policy
    if config.on_testbed:
        return ["how many prompts the policy's lengths cut is known once the testbed's tokenizer is trained"]
    prepared = prepared or prepare(locate(config.data), config)
    prompts = prepared.prompts["prompt"].tolist()
    responses = pd.concat([prepared.validated.frame[side] for side in RESPONSES]).tolist()
    scratch = policy.base == "scratch"
    tokenizer = _estimated(prompts, responses, policy.vocabulary_size) if scratch else _present(config)
    if tokenizer is None:
        return ["how many prompts the policy's lengths cut is known once its tokenizer is downloaded"]
    counts = policy_cuts(_writer(tokenizer, policy), prompts, responses)
    about = "; estimated, since the tokenizer is trained in the run" if scratch else ""
    return [*policy_lines(counts, about), *(f"warning: {line}" for line in cut_warnings({"policy": counts}))]


def check_policy_text(config: ExperimentConfig) -> None:
    """Check that a base that is here can write the prompts and end its responses, before a run.

    Raises:
        InputError: as `check_text`, or max_prompt_tokens leaves no room beside the template.
    """
    policy = config.policy
    if policy.base == "scratch" or not is_local(policy.base):
        return
    try:
        tokenizer = _present(config)
    except (OSError, ValueError):
        return  # what cannot be loaded is said where the whole model is
    if tokenizer is not None:
        longer = "a prompt longer than any template leaves room for " * policy.max_prompt_tokens
        _writer(tokenizer, policy).encode_prompts([longer])


def _writer(tokenizer: PreTrainedTokenizerBase, policy: PolicyConfig) -> Policy:
    """The policy as far as it writes text: without a model."""
    freeze_date(tokenizer, policy.template_date)
    check_text(tokenizer, policy.template)
    return Policy(None, tokenizer, policy.template, policy.max_prompt_tokens, policy.max_response_tokens)


def _estimated(prompts: list[str], responses: list[str], size: int) -> PreTrainedTokenizerBase:
    texts = [text for some in (prompts, responses) for text in some[:: len(some) // SAMPLE + 1]]
    return train_tokenizer(texts, size)


def _present(config: ExperimentConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the policy's base, unless it would have to be downloaded."""
    from transformers import AutoTokenizer

    base = config.policy.base
    options = hub_options(base, config.policy.revision, config.policy.trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(base, **{**options, "local_files_only": True})
    except (OSError, ValueError):
        if is_local(base):
            raise
        return None

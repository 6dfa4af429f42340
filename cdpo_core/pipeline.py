"""The stages of the DAG: what computes each, and the config fields it receives, picked one by one.

What is not named here reaches no stage: the limit is in no training stage, a round receives lambda
and not the limit, and names, stores, tracking, devices and micro-batches are in none (but see
`machine_fields`). What is named reaches it only where it acts: the width of a policy from scratch does not
reach the one that is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdpo_core.provenance import device_kind
from cdpo_core.stages import Applies, Compute, Runtime, Slice, Stage

DATA_FIELDS = ("data.splits", "data.held_out")
SCRATCH_POLICY = ("policy.hidden_size", "policy.layers", "policy.heads", "policy.vocabulary_size")
POLICY_FIELDS = (
    "policy.template",
    "policy.template_date",
    "policy.max_prompt_tokens",
    "policy.max_response_tokens",
    "policy.dtype",
    "policy.trust_remote_code",
    *SCRATCH_POLICY,
)


EXACT = "float32"
"""The number format in which a batch's shape moves a result by rounding only."""


def machine_fields(stage: Stage, formats: Mapping[str, str], runtime: Runtime) -> dict[str, Any]:
    """What of the machine enters a stage's slice: nothing in float32, elsewhere what decides how sums are formed.

    In bfloat16 a sum is rounded to three digits, so another batch, device or number of threads gives other responses,
    not the same ones but for their last bits.

    Args:
        stage: its `models` say whose number format counts.
        formats: of `policy` and `scorers`; several are joined by commas.
        runtime: the machine.
    """
    if all(formats[name] == EXACT for name in stage.models):
        return {}
    device = device_kind(runtime.device)
    threads = runtime.threads or os.cpu_count() or 1
    return {
        "machine": {
            "device": device,
            "micro_batch": runtime.micro_batch,
            **({"threads": threads} if device.startswith("cpu") else {}),
        }
    }


def _core(path: str) -> Compute:
    """The stage function at `module:name`, imported when it has to compute and not before."""
    module, name = path.split(":")

    def compute(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        from cdpo_core.machine import call

        call((module, name), config, inputs, out, runtime)

    compute.__module__, compute.__qualname__ = module, name
    return compute


TESTBED_DATA = Stage(
    "data",
    "preferences",
    _core("cdpo_core.testbed.annotators:make_world"),
    (
        "testbed.seed",
        "testbed.costs",
        "testbed.prompts",
        "testbed.pairs_per_prompt",
        "testbed.demonstrations",
        "testbed.sharpness",
        "testbed.calibrated_limit",
        "testbed.calibrated_beta",
        *DATA_FIELDS,
    ),
)
DATA = Stage(
    "data",
    "preferences",
    _core("cdpo_core.data.prepare:prepare_data"),
    (
        "seed",
        "data.format",
        "data.max_quarantined",
        "data.max_prompt_characters",
        "data.max_response_characters",
        "data.near_duplicates",
        *DATA_FIELDS,
    ),
)
SFT = Stage(
    "sft",
    "policy",
    _core("cdpo_core.learning.sft:train_sft"),
    ("seed", *POLICY_FIELDS, "sft.train", "sft.steps", "sft.batch", "sft.learning_rate"),
    (
        Applies(SCRATCH_POLICY, lambda config: config.base == "scratch"),
        Applies(("policy.trust_remote_code",), lambda config: config.base != "scratch"),
        Applies(("sft.steps", "sft.batch", "sft.learning_rate"), lambda config: config.sft.train),
        Applies(("seed",), lambda config: config.sft.train or config.base == "scratch"),
    ),
    ("policy",),
)
RESPONSES = Stage(
    "responses",
    "responses",
    _core("cdpo_core.evaluation.sampling:sample_responses"),
    ("seed", "policy.max_response_tokens", "policy.trust_remote_code", "sampling.temperature"),
    models=("policy",),
)
DATASET_RESPONSES = Stage(
    "dataset-responses",
    "responses",
    _core("cdpo_core.learning.dataset_pairs:dataset_responses"),
    ("policy.max_prompt_tokens", "policy.max_response_tokens", "policy.trust_remote_code"),
    models=("policy",),
)
SCORER_TRAINING = ("reward.epochs", "reward.batch", "reward.learning_rate", "reward.optimizer")
SCORERS = Stage(
    "scorers",
    "scorers",
    _core("cdpo_core.learning.preference:train_scorers"),
    (
        "seed",
        "policy.max_prompt_tokens",
        "policy.max_response_tokens",
        "policy.template_date",
        *SCORER_TRAINING,
    ),
    (
        Applies(("seed", *SCORER_TRAINING), lambda config: config.train),
        Applies(("sign",), lambda config: not config.train),
    ),
    ("scorers",),
)
SCORES = Stage("scores", "scores", _core("cdpo_core.learning.score:score_responses"), models=("scorers",))
SPLITS = Stage("splits", "splits", _core("cdpo_core.data.splits:make_splits"), ("seed", "data.splits"))
ROUND_FIELDS = (
    "seed",
    "policy.lora_rank",
    "policy.trust_remote_code",
    "dpo.beta",
    "dpo.labels",
    "dpo.anchor",
    "dpo.anchor_end",
    "dpo.prompts_per_step",
    "dpo.responses_per_prompt",
    "dpo.focus",
    "dpo.learning_rate",
    "dpo.optimizer",
    "dpo.adam_beta2",
    "dpo.averaging",
    "dpo.pairs",
)
ANCHORED = (Applies(("dpo.anchor_end",), lambda config: config.dpo.anchor > 0),)
ROUND = Stage(
    "round",
    "policy",
    _core("cdpo_core.learning.dpo:train_round"),
    (*ROUND_FIELDS, "dpo.steps"),
    ANCHORED,
    ("policy",),
)
CONDITIONAL = Stage(
    "conditional",
    "conditional-policy",
    _core("cdpo_core.learning.conditional:train_conditional"),
    (*ROUND_FIELDS, "dpo.conditional_steps"),
    ANCHORED,
    ("policy",),
)
BOUND = Stage(
    "bound",
    "policy",
    _core("cdpo_core.learning.conditional:bind_lambda"),
    ("policy.trust_remote_code",),
    models=("policy",),
)
SAFE_RLHF = Stage(
    "safe-rlhf",
    "policy",
    _core("cdpo_core.baselines.safe_rlhf:train_safe_rlhf"),
    (
        "seed",
        "policy.max_prompt_tokens",
        "policy.max_response_tokens",
        "policy.trust_remote_code",
        "dpo.beta",
    ),
    models=("policy", "scorers"),
)
ENUMERATION = Stage(
    "enumeration",
    "enumeration",
    _core("cdpo_core.testbed.judge:enumerate_reference"),
    ("evaluation.judged_prompts", "policy.trust_remote_code"),
    models=("policy", "scorers"),
)
POLICY_ENUMERATION = Stage(
    "policy-enumeration",
    "enumeration",
    _core("cdpo_core.testbed.judge:enumerate_policy"),
    ("policy.trust_remote_code",),
    models=("policy",),
)
JUDGEMENT = Stage(
    "judgement",
    "judgement",
    _core("cdpo_core.testbed.judge:judge_policy"),
    ("dpo.beta",),
)

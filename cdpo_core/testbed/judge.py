"""The exact judge: what a policy is truly worth beside the best one, on prompts no training saw.

Two stages. `enumerate_reference` does what holds for every policy and limit: the judged prompts, the
reference's log-probabilities and the learned scores of all responses. `judge_policy` enumerates one
policy and compares it with the exact optimum at the limits. No decision of the method reads either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file

from cdpo_core.chunks import Chunks
from cdpo_core.data.splits import alike_order
from cdpo_core.errors import InputError
from cdpo_core.models.policy import load_policy
from cdpo_core.models.scorer import load_scorer
from cdpo_core.tables import write_table
from cdpo_core.testbed.enumeration import grammar_log_probs, grammar_scores
from cdpo_core.testbed.judgement import Problem, judge
from cdpo_core.testbed.oracle import Array, normalised
from cdpo_core.testbed.world import KINDS, World

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime, Slice

TRAINING_SPLIT = "policy"
JUDGED_SPLITS = (TRAINING_SPLIT, "selection", "certificate", "test")


def enumerate_reference(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the judged prompts with the reference's and the scorers' view of every response.

    Args:
        config: evaluation.judged_prompts (a split), policy.trust_remote_code, trusted (scorers whose own code may
            run; absent is none).
        inputs: data (testbed), reference (policy), splits, scorers_0, ... (none in oracle mode).
        out: gets judged.parquet (prompt_id, prompt, kind, split), enumeration.safetensors (log_ref [P, R]
            float64 nats, not renormalised; scores [P, R, heads] float32, calibrated units), heads.json
            (names of the scores) and floor.json: the lowest mean of each true cost that any policy can
            reach on the prompts that no training saw.
        runtime: device, micro_batch (responses), scratch, progress.
    """
    world = World.load(inputs["data"] / "world.json")
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet")
    splits = pd.read_parquet(inputs["splits"] / "splits.parquet")
    judged = judged_subset(world, prompts.drop(columns="split").merge(splits, on="prompt_id"), config)
    texts = judged["prompt"].tolist()
    reference = load_policy(inputs["reference"], config_policy=config.policy, device=runtime.device)

    def progress(done: int, total: int) -> None:
        runtime.progress("enumeration", done, total)

    def kept(part: str) -> Chunks:
        return Chunks(runtime.scratch, part)

    names: list[str] = []
    scores = [np.empty((len(texts), len(world.responses), 0))]
    for name in sorted(name for name in inputs if name.startswith("scorers_")):
        scorer = load_scorer(inputs[name], runtime.device, trust_remote_code=name in getattr(config, "trusted", ()))
        scores.append(grammar_scores(scorer, texts, world, runtime.micro_batch, progress, kept(name)))
        names += scorer.names
    write_table(judged, out / "judged.parquet")
    log_ref = grammar_log_probs(reference, texts, world, runtime.micro_batch, progress, kept("reference"))
    tables = {"log_ref": log_ref, "scores": np.concatenate(scores, -1).astype(np.float32)}
    save_file(tables, out / "enumeration.safetensors")
    (out / "heads.json").write_text(json.dumps(names) + "\n")
    unseen = judged["split"] != TRAINING_SPLIT
    floor = world.true_scores(judged.loc[unseen, "prompt_id"])[1].min(1).mean(0)
    (out / "floor.json").write_text(json.dumps(dict(zip(world.labels, floor.tolist(), strict=True))) + "\n")


def judged_subset(world: World, prompts: pd.DataFrame, config: Slice) -> pd.DataFrame:
    """The prompts of each split that the judge enumerates, alike to the whole split.

    Within a split the prompts are ordered by kind and by the demonstrators' true mean costs, and taken at
    equal distances, so that the subset's mean costs stand for the split's.

    Args:
        world: the world.
        prompts: prompt_id, prompt, kind, split.
        config: evaluation.judged_prompts.
    """
    chosen = []
    for split in JUDGED_SPLITS:
        table = prompts[prompts["split"] == split].sort_values("prompt_id", ignore_index=True)
        _, costs = world.true_scores(table["prompt_id"])
        log_probs = world.demonstrator_log_probs_of(table["prompt_id"])
        means = (np.exp(log_probs)[..., None] * costs).sum(1)
        order = np.lexsort(alike_order(table["kind"].map(KINDS.index).to_numpy(dtype=int), means)[::-1])
        count = min(len(order), config.evaluation.judged_prompts)
        places = ((np.arange(count) + 0.5) / max(count, 1) * len(order)).astype(int)
        chosen.append(table.iloc[np.sort(order[places])])
    return pd.concat(chosen, ignore_index=True)[["prompt_id", "prompt", "kind", "split"]]


def enumerate_policy(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: a policy's log-probability of every response to the judged prompts, for every limit the same.

    Args:
        config: policy.trust_remote_code.
        inputs: data (testbed), enumeration, policy.
        out: gets log_policy.safetensors: log_policy [P, R] float64 nats, not renormalised.
        runtime: device, micro_batch (responses), scratch, progress.
    """
    world = World.load(inputs["data"] / "world.json")
    judged = pd.read_parquet(inputs["enumeration"] / "judged.parquet")
    policy = load_policy(inputs["policy"], config_policy=config.policy, device=runtime.device)

    def progress(done: int, total: int) -> None:
        runtime.progress("exact policy", done, total)

    prompts, kept = judged["prompt"].tolist(), Chunks(runtime.scratch, "policy")
    log_policy = grammar_log_probs(policy, prompts, world, runtime.micro_batch, progress, kept)
    save_file({"log_policy": log_policy}, out / "log_policy.safetensors")


def judge_policy(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the `oracle` record of one policy; writes judge.json.

    Args:
        config: dpo.beta; limits [m] and margins [m] (training aimed at limit − margin); constraints
            ([{name, labels}], optional: the world's labels in their order).
        inputs: data (testbed), enumeration, policy (what `enumerate_policy` wrote; may be missing: its
            figures are then null).
        out: gets judge.json.
        runtime: not used.
    """
    world = World.load(inputs["data"] / "world.json")
    judged = pd.read_parquet(inputs["enumeration"] / "judged.parquet")
    constraints = _constraints(config, world)
    reward, costs = world.true_scores(judged["prompt_id"])
    costs = costs[..., [world.labels.index(item["labels"]) for item in constraints]]
    raw = load_file(inputs["policy"] / "log_policy.safetensors")["log_policy"] if "policy" in inputs else None
    tables = load_file(inputs["enumeration"] / "enumeration.safetensors")
    problem = Problem(normalised(tables["log_ref"]), reward, costs, config.limits, config.dpo.beta)
    heads = json.loads((inputs["enumeration"] / "heads.json").read_text())
    names = [item["name"] for item in constraints]
    learned = _learned(heads, tables["scores"].astype(np.float64), names)
    seen = (judged["split"] == TRAINING_SPLIT).to_numpy()
    record = judge(problem, raw, learned, config.margins, seen, names)
    (out / "judge.json").write_text(json.dumps(record, indent=1) + "\n")


def _learned(names: Sequence[str], scores: Array, costs: Sequence[str]) -> tuple[Array, Array] | None:
    """Reward [P, R] and costs [P, R, m] among the learned scores [P, R, heads]; None without scorers."""
    if not names:
        return None
    missing = {"reward", *costs} - set(names)
    if missing:
        raise InputError(
            f"no scorer gives {min(missing)!r}", where=", ".join(names), fix="train one for each constraint"
        )
    return scores[..., names.index("reward")], scores[..., [names.index(name) for name in costs]]


def _constraints(config: Slice, world: World) -> list[dict[str, str]]:
    given: list[dict[str, str]] | None = getattr(config, "constraints", None)
    constraints = given or [{"name": label, "labels": label} for label in world.labels]
    unknown = [item["labels"] for item in constraints if item["labels"] not in world.labels]
    if unknown or len(constraints) != len(config.limits):
        raise InputError(
            f"the testbed knows the costs {', '.join(world.labels)}",
            where="constraints",
            fix="give one limit for each and name its labels",
        )
    return constraints

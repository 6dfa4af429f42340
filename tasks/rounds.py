"""The rounds: train a policy at a lambda and measure it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from cdpo_core.evaluation.measure import Measured, join_scores
from tasks.data import sample_split
from tasks.preference_models import score
from tasks.records import Prepared, Scored
from tasks.workbench import Workbench


def train_policy(
    bench: Workbench,
    prepared: Prepared,
    scored: Scored,
    lambda_: Sequence[float],
    previous: ArtifactRef | None = None,
) -> ArtifactRef:
    """DPO on preferences re-decided at lambda, from the reference or from the previous round's policy."""
    inputs = {
        "data": prepared.data,
        "reference": prepared.reference,
        "responses": scored.responses,
        "scores": scored.scores,
        "splits": scored.splits,
    }
    if previous is not None:
        inputs["previous"] = previous
    label = "policy at λ = " + ", ".join(f"{value:g}" for value in lambda_)
    return bench.run(pipeline.ROUND, inputs, label, lambda_=list(lambda_), names=bench.names)


def measure_policy(
    bench: Workbench, prepared: Prepared, scored: Scored, policy: ArtifactRef, split: str, samples: int, label: str
) -> Measured:
    """Sample a policy on one split and score what it says."""
    responses = sample_split(
        bench, policy, prepared.data, split, samples, f"{label}: responses", scored.splits, prepared.reference
    )
    scores = score(bench, prepared.data, responses, scored.scorers, f"{label}: scores")
    return measured_from(bench, responses, scores)


def measured_from(bench: Workbench, responses: ArtifactRef, scores: ArtifactRef) -> Measured:
    """Stored responses with their stored scores."""
    tables = bench.table(responses, "responses"), bench.table(scores, "scores")
    return join_scores(*tables, sources=(responses, scores))


def prompt_kinds(bench: Workbench, data: ArtifactRef, prompt_ids: Sequence[str]) -> np.ndarray | None:
    """[n] the prompts' kinds, which every split holds in fixed proportion; None where they are not known."""
    kinds = bench.table(data, "prompts").set_index("prompt_id")["kind"].loc[list(prompt_ids)]
    is_known = bool((kinds != "").all()) and int(kinds.value_counts().min()) > 1
    return kinds.to_numpy(str) if is_known else None

"""The rounds: train a policy at a lambda and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
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
    reward_weight: float = 1.0,
) -> ArtifactRef:
    """DPO on preferences re-decided at lambda, from the reference or, in fewer steps, from a trained policy."""
    inputs = round_inputs(bench, prepared, scored)
    if previous is not None:
        inputs["previous"] = previous
        bench = bench.with_setting("dpo", **warm_settings(bench.config))
    weight = {} if reward_weight == 1 else {"reward_weight": reward_weight}
    return bench.run(
        pipeline.ROUND, inputs, f"policy {at(lambda_)}", lambda_=list(lambda_), names=bench.names, **weight
    )


def at(lambda_: Sequence[float]) -> str:
    """How stages and labels name a lambda."""
    return "at λ = " + ", ".join(f"{value:g}" for value in lambda_)


def round_inputs(bench: Workbench, prepared: Prepared, scored: Scored) -> dict[str, ArtifactRef]:
    """What a training learns from: nothing of it depends on lambda."""
    responses, scores = scored.responses, scored.scores
    if bench.config.dpo.pairs == "dataset":
        responses, scores = dataset_pairs(bench, prepared, scored)
    return {
        "data": prepared.data,
        "reference": prepared.reference,
        "responses": responses,
        "scores": scores,
        "splits": scored.splits,
    }


def warm_settings(config: ExperimentConfig) -> dict[str, Any]:
    """What a round that starts from a trained policy has otherwise: fewer steps, a smaller anchor."""
    dpo, dual = config.dpo, config.dual
    return {"steps": max(1, round(dpo.steps * dual.warm_steps)), "anchor": dpo.anchor * dual.warm_anchor}


def dataset_pairs(bench: Workbench, prepared: Prepared, scored: Scored) -> tuple[ArtifactRef, ArtifactRef]:
    """The data's own response pairs with their log-probs under the reference, and their scores."""
    inputs = {"data": prepared.data, "reference": prepared.reference}
    responses = bench.run(pipeline.DATASET_RESPONSES, inputs, "pairs of the data")
    return responses, score(bench, prepared.data, responses, scored.scorers, "pairs of the data: scores")


def measure_policy(
    bench: Workbench, prepared: Prepared, scored: Scored, policy: ArtifactRef, split: str, samples: int, label: str
) -> Measured:
    """Sample a policy on one split and score what it says."""
    responses = sample_split(
        bench, policy, prepared.data, split, samples, f"{label}: responses", scored.splits, prepared.reference
    )
    scores = score(bench, prepared.data, responses, scored.scorers, f"{label}: scores")
    return measured_from(bench, responses, scores)


def reference_costs(bench: Workbench, pool_scores: ArtifactRef) -> pd.DataFrame:
    """The reference's mean costs of all units of the pool: a column for each constraint, index unit (sorted)."""
    columns = [f"cost_{name}" for name in bench.names]
    means = bench.table(pool_scores, "scores").groupby("unit")[columns].mean().sort_index()
    return means.set_axis(bench.names, axis=1)


def measured_from(bench: Workbench, responses: ArtifactRef, scores: ArtifactRef) -> Measured:
    """Stored responses with their stored scores."""
    tables = bench.table(responses, "responses"), bench.table(scores, "scores")
    return join_scores(*tables, sources=(responses, scores))

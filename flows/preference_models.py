"""Preference models: reward and cost models, the splits, and the scored reference samples."""

from __future__ import annotations

from prefect import flow

from tasks.data import sample_split, split_prompts
from tasks.prefect_patience import ends_when_there
from tasks.preference_models import score, train_scorers
from tasks.records import Prepared, Scored
from tasks.workbench import Workbench


@flow(name="preference-models", validate_parameters=False)
@ends_when_there
def preference_models(bench: Workbench, prepared: Prepared) -> Scored:
    """Train or load the scorers, split the prompts by their mean cost, score the reference samples."""
    data, reference = prepared.data, prepared.reference
    scorers = [] if bench.config.oracle_scorers else train_scorers(bench, data, reference)
    pool_scores = score(bench, data, prepared.pool_responses, scorers, "pool scores")
    splits = split_prompts(bench, data, prepared.pool_responses, pool_scores)
    samples = bench.config.sampling.reference
    responses = sample_split(bench, reference, data, "policy", samples, "reference responses", splits)
    scores = score(bench, data, responses, scorers, "reference scores")
    return Scored(scorers, pool_scores, splits, responses, scores)

"""Prepare: data → reference policy → its responses to every prompt outside the preferences."""

from __future__ import annotations

from prefect import flow

from tasks.data import prepare_data, sample_split, train_reference
from tasks.prefect_patience import ends_when_there
from tasks.records import Prepared
from tasks.workbench import Workbench


@flow(name="prepare", validate_parameters=False)
@ends_when_there
def prepare(bench: Workbench) -> Prepared:
    """Data, supervised fine-tuning, and the reference's responses that stratify the splits."""
    data = prepare_data(bench)
    reference = train_reference(bench, data)
    pool_responses = sample_split(bench, reference, data, "pool", bench.config.sampling.pool, "pool responses")
    return Prepared(data, reference, pool_responses)

"""Data preparation: preferences, the reference policy, its responses, the splits."""

from __future__ import annotations

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from cdpo_core.errors import InputError
from tasks.external import external_model
from tasks.sources import source_ref
from tasks.workbench import Workbench


def prepare_data(bench: Workbench) -> ArtifactRef:
    """Validated preferences and prompts, from the testbed or from the user's data."""
    if bench.config.on_testbed:
        return bench.run(pipeline.TESTBED_DATA, {}, "data")
    source = source_ref(bench.config.data)
    # The experiment is known by what its inputs held when it began.
    if bench.external_digests()["data.source"] != source.digest:
        raise InputError("the data has changed since the run began", where=source.uri, fix="run the same command again")
    return bench.run(pipeline.DATA, {"source": source}, "data")


def train_reference(bench: Workbench, data: ArtifactRef) -> ArtifactRef:
    """The reference policy: supervised fine-tuning on the demonstrations, or the base as it is."""
    inputs = {"data": data}
    policy = bench.config.policy
    if policy.base != "scratch":
        inputs["base"] = external_model(policy.base, policy.revision)
    base = "scratch" if policy.base == "scratch" else "loaded"
    return bench.run(pipeline.SFT, inputs, "reference policy", base=base)


def sample_split(
    bench: Workbench,
    policy: ArtifactRef,
    data: ArtifactRef,
    split: str,
    samples: int,
    label: str,
    splits: ArtifactRef | None = None,
    reference: ArtifactRef | None = None,
) -> ArtifactRef:
    """A policy's responses to the prompts of one split (`pool`: all that are not for preferences).

    Args:
        samples: responses for each prompt.
        reference: the reference policy when `policy` is another one, for the KL's log-probs.
    """
    inputs = {"policy": policy, "data": data}
    if splits is not None:
        inputs["splits"] = splits
    if reference is not None and reference.digest != policy.digest:
        inputs["reference"] = reference
    return bench.run(pipeline.RESPONSES, inputs, label, split=split, samples=samples)


def split_prompts(bench: Workbench, data: ArtifactRef, responses: ArtifactRef, scores: ArtifactRef) -> ArtifactRef:
    """Policy, selection, certificate and test prompts, stratified by the reference's mean cost."""
    return bench.run(pipeline.SPLITS, {"data": data, "responses": responses, "scores": scores}, "splits")

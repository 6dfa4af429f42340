"""What the flows hand from part to part: references only, never data or models."""

from __future__ import annotations

from dataclasses import dataclass

from cdpo_core.artifacts import ArtifactRef


@dataclass(frozen=True)
class Prepared:
    """What depends on no scorer: the data, the reference, its responses to the pool prompts."""

    data: ArtifactRef
    reference: ArtifactRef
    pool_responses: ArtifactRef


@dataclass(frozen=True)
class Scored:
    """What is the same at every lambda: the scorers, the splits, the reference's scored responses."""

    scorers: list[ArtifactRef]
    pool_scores: ArtifactRef
    splits: ArtifactRef
    responses: ArtifactRef
    scores: ArtifactRef

"""A config of a test's own: the defaults, and the limit that has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cdpo_core.config import ConstraintConfig, ExperimentConfig

LIMIT = -0.5


def limited(sections: Mapping[str, Any]) -> ExperimentConfig:
    """A config of these sections as YAML says them; one limit on harm unless they say otherwise."""
    return ExperimentConfig.model_validate({"constraints": [{"limit": LIMIT}], **sections})


def experiment_config(**sections: Any) -> ExperimentConfig:
    """The defaults with these sections; one limit on harm, LIMIT, unless `constraints` says otherwise."""
    return ExperimentConfig(**{"constraints": [ConstraintConfig(limit=LIMIT)], **sections})

"""Reward and cost models: training or wrapping them, and scoring responses with them."""

from __future__ import annotations

import json
from typing import Any

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from tasks.external import RESERVED_BASES, external_model
from tasks.workbench import Workbench


def train_scorers(bench: Workbench, data: ArtifactRef, reference: ArtifactRef) -> list[ArtifactRef]:
    """One artifact for each backbone: the reward model with the costs that share it, then the others."""
    config = bench.config
    reward = {"name": "reward", "labels": ""}
    shared = [{"name": item.name, "labels": item.labels} for item in config.constraints if item.base == "reward"]
    groups = [(config.reward.base, config.reward.revision, config.reward.train, "harmful", [reward, *shared])]
    groups += [
        (item.base, item.revision, item.train, item.sign, [{"name": item.name, "labels": item.labels}])
        for item in config.constraints
        if item.base != "reward"
    ]
    return [_scorer_group(bench, data, reference, *group) for group in groups]


def _scorer_group(
    bench: Workbench,
    data: ArtifactRef,
    reference: ArtifactRef,
    base: str,
    revision: str,
    train: bool,
    sign: str,
    heads: list[dict[str, str]],
) -> ArtifactRef:
    # A base from outside does not depend on the reference: another one finds the scorer there already.
    model = {"sft": reference} if base in RESERVED_BASES else {"base": external_model(base, revision)}
    inputs = {"data": data, **model}
    word = base if base in RESERVED_BASES else "loaded"
    label = " and ".join(head["name"] for head in heads) + " model"
    return bench.run(pipeline.SCORERS, inputs, label, base=word, train=train, sign=sign, heads=heads)


def score(
    bench: Workbench, data: ArtifactRef, responses: ArtifactRef, scorers: list[ArtifactRef], label: str
) -> ArtifactRef:
    """Rewards and costs of responses, by the scorers or, on the testbed if asked, by the truth."""
    names = [{"name": item.name, "labels": item.labels} for item in bench.config.constraints]
    inputs = {"data": data, "responses": responses}
    inputs |= {f"scorers_{index}": ref for index, ref in enumerate(scorers)}
    return bench.run(pipeline.SCORES, inputs, label, constraints=names, oracle=not scorers)


def scorer_reports(bench: Workbench, scorers: list[ArtifactRef]) -> dict[str, Any]:
    """Held-out accuracy, interval and calibration of every scorer, by its name."""
    reports: dict[str, Any] = {}
    for ref in scorers:
        reports |= json.loads((bench.folder(ref) / "report.json").read_text())
    return reports

"""Reward and cost models: training or wrapping them, and scoring responses with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from tasks.external import RESERVED_BASES, external_model
from tasks.workbench import Workbench

if TYPE_CHECKING:
    from cdpo_core.config import ConstraintConfig, ExperimentConfig, RewardConfig


def train_scorers(bench: Workbench, data: ArtifactRef, reference: ArtifactRef) -> list[ArtifactRef]:
    """One artifact for each backbone: the reward model with the costs that share it, then the others."""
    return [_scorer_group(bench, data, reference, group) for group in _groups(bench.config)]


class _Group(NamedTuple):
    """What is scored by one model: its base, how it is made, its heads, and whether its own code may run."""

    base: str
    revision: str
    train: bool
    sign: str
    heads: list[dict[str, str]]
    trusted: bool


def _groups(config: ExperimentConfig) -> list[_Group]:
    reward = {"name": "reward", "labels": ""}
    shared = [{"name": item.name, "labels": item.labels} for item in config.constraints if item.base == "reward"]
    sections: list[tuple[RewardConfig | ConstraintConfig, str, list[dict[str, str]]]]
    sections = [(config.reward, "harmful", [reward, *shared])]
    sections += [
        (item, item.sign, [{"name": item.name, "labels": item.labels}])
        for item in config.constraints
        if item.base != "reward"
    ]
    return [
        _Group(item.base, item.revision, item.train, sign, heads, _may_run_code(config, item))
        for item, sign, heads in sections
    ]


def _may_run_code(config: ExperimentConfig, item: RewardConfig | ConstraintConfig) -> bool:
    """What begins as the policy is the policy's model; any other is one that the user named for this."""
    return (config.policy if item.base in RESERVED_BASES else item).trust_remote_code


def trusted_scorers(config: ExperimentConfig) -> dict[str, list[str]]:
    """`trusted`, for stages that load the scorers as scorers_0, …: those whose own code may run; {} of none."""
    names = [f"scorers_{index}" for index, group in enumerate(_groups(config)) if group.trusted]
    return {"trusted": names} if names else {}


def _scorer_group(bench: Workbench, data: ArtifactRef, reference: ArtifactRef, group: _Group) -> ArtifactRef:
    # A base from outside does not depend on the reference: another one finds the scorer there already.
    is_word = group.base in RESERVED_BASES
    model = {"sft": reference} if is_word else {"base": external_model(group.base, group.revision)}
    inputs = {"data": data, **model}
    word = group.base if is_word else "loaded"
    label = " and ".join(head["name"] for head in group.heads) + " model"
    extra: dict[str, Any] = {"base": word, "train": group.train, "sign": group.sign, "heads": group.heads}
    return bench.run(pipeline.SCORERS, inputs, label, **extra, **({"trusted": True} if group.trusted else {}))


def score(
    bench: Workbench, data: ArtifactRef, responses: ArtifactRef, scorers: list[ArtifactRef], label: str
) -> ArtifactRef:
    """Rewards and costs of responses, by the scorers or, on the testbed if asked, by the truth."""
    names = [{"name": item.name, "labels": item.labels} for item in bench.config.constraints]
    inputs = {"data": data, "responses": responses}
    inputs |= {f"scorers_{index}": ref for index, ref in enumerate(scorers)}
    trusted = trusted_scorers(bench.config) if scorers else {}
    return bench.run(pipeline.SCORES, inputs, label, constraints=names, oracle=not scorers, **trusted)


def scorer_reports(bench: Workbench, scorers: list[ArtifactRef]) -> dict[str, Any]:
    """Held-out accuracy, interval and calibration of every scorer, by its name."""
    reports: dict[str, Any] = {}
    for ref in scorers:
        reports |= json.loads((bench.folder(ref) / "report.json").read_text())
    return reports

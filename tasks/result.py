"""Assembling the result record from what the parts of the DAG returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.evaluation.cuts import cut_warnings, read_cuts
from cdpo_core.evaluation.instrument import same_tokens_warning, unchecked, unfinished_warning
from cdpo_core.evaluation.measure import Measured
from cdpo_core.evaluation.result import constraint_records, each, verdict
from cdpo_core.provenance import library_versions, mixed
from tasks.dual import BELOW_SAMPLES, OfflinePlan, within_reach
from tasks.evaluation import Certified
from tasks.journal import Journal
from tasks.workbench import Workbench

# What the exact judge says of the returned policy itself; the rest is about the world.
POLICY_FIGURES_OF_ORACLE = ("captured", "support_mass", "true_reward", "true_cost", "true_costs", "true_kl")


@dataclass(frozen=True)
class Outcome:
    """What the parts of the DAG returned, as the result reads it.

    Attributes:
        data: the data artifact.
        reference: the reference policy.
        pool_scores: the reference's scored responses to the prompts that were split.
        rounds: the rounds' records, oldest first; empty when the limit was known to be out of reach.
        reason: why the rounds ended.
        chosen: index of the returned round; -1 when there is none.
        policy: the returned round's policy, or None.
        certified: None when the limit is out of reach.
        test: scored test responses; `policy` is the returned one, the others are baselines.
        oracle: the exact judge's record, {} off the testbed.
        floor: [m] lowest mean costs: exact on the testbed, else among the reference samples and rounds.
    """

    data: ArtifactRef
    reference: ArtifactRef
    pool_scores: ArtifactRef
    rounds: Sequence[Mapping[str, Any]]
    reason: str
    chosen: int
    policy: ArtifactRef | None
    certified: Certified | None
    test: Mapping[str, Measured]
    oracle: Mapping[str, Any]
    floor: Sequence[float]


def outcome_name(run_id: str) -> str:
    """Where the store keeps the result record that a Prefect flow run ended with."""
    return f"outcomes/{run_id}"


def experiment_result(
    bench: Workbench, journal: Journal, plan: OfflinePlan, scorers: Mapping[str, Any], outcome: Outcome
) -> dict[str, Any]:
    """The result record (DESIGN: Result)."""
    names, limits = bench.names, [item.limit for item in bench.config.constraints]
    certified = outcome.certified
    certificates = [certified.record(index) if certified else None for index in range(len(names))]
    chosen = outcome.rounds[outcome.chosen] if outcome.rounds else None
    lambda_, costs = (each(chosen[key]) if chosen else [None] * len(names) for key in ("lambda", "cost"))
    prompts = bench.table(outcome.data, "prompts")
    kinds = dict(zip(prompts["prompt_id"], prompts["kind"], strict=True))
    figures = {name: item.summary(names, outcome.test["reference"], kinds) for name, item in outcome.test.items()}
    run_id = journal.run_id
    oracle = _oracle(outcome.oracle, feasible=certified is not None)
    machines = bench.machines()
    folders = {"policy": outcome.reference, "scorers": outcome.pool_scores}
    cut = {name: read_cuts(bench.folder(ref)) for name, ref in folders.items()}
    reach = within_reach(names, plan, outcome.rounds, outcome.floor)
    result: dict[str, Any] = {
        "name": bench.config.name,
        "status": "infeasible" if certified is None else "certified" if certified.passed else "not_certified",
        "reason": outcome.reason,
        "limit": limits[0],
        "target": list(plan.settings.target),
        "lambda": lambda_[0],
        "chosen_round": chosen["round"] if chosen else None,
        "rounds": list(outcome.rounds),
        "constraints": constraint_records(names, limits, plan.settings.target, lambda_, costs, certificates, oracle),
        "certificate": certificates[0],
        "reachable": {
            "at_zero": float(plan.dual.expected(np.zeros(len(names))).costs[0]),
            "floor": float(outcome.floor[0]),
            "price": plan.price,
            "effective_samples": plan.effective_samples,
            "constraints": reach,
            **{key: reach[0][key] for key in ("lowest", "lowest_by", "certifiable")},
        },
        "instrument": [failure.record() for failure in certified.failures] if certified else [],
        "warnings": [*_warnings(names, plan, scorers, outcome), *cut_warnings(cut), *filter(None, [mixed(machines)])],
        "cut": cut,
        "test": figures.pop("policy", None),
        "baselines": figures,
        "scorers": dict(scorers),
        "oracle": oracle,
        "stages": [
            {"name": item.label, "seconds": round(item.seconds, 3), "cached": item.cached} for item in bench.results
        ],
        "policy": outcome.policy.model_dump() if outcome.policy else None,
        "tracking": {"run_id": run_id, "uri": journal.tracker.uri, "url": journal.tracker.run_url(run_id)},
        "store": bench.store.uri,
        "data": outcome.data.model_dump(),
        "pool_scores": outcome.pool_scores.model_dump(),
        "seed": bench.config.seed,
        "ended_ms": journal.ended_ms(),
        "machines": machines,
        # Of the process that wrote this record; what computed the artifacts, `machines` says.
        "versions": library_versions(),
    }
    return {**result, "verdict": verdict(result)}


def _warnings(names: Sequence[str], plan: OfflinePlan, scorers: Mapping[str, Any], outcome: Outcome) -> list[str]:
    """What the reader must know besides: of the plan, of responses that were cut, of what was not checked."""
    # What was foreseen of the limit is settled once a run has found it out of reach: its verdict says how low it came.
    lines = [text for text in plan.warnings if outcome.certified or not text.startswith(BELOW_SAMPLES)]
    measured = {"the policy": outcome.certified.measured if outcome.certified else None}
    measured["the reference"] = outcome.test["reference"]
    for label, item in measured.items():
        lines += unfinished_warning(label, item.unfinished() if item else None)
    lines += same_tokens_warning(scorers)
    for name in names:
        lines += unchecked(name, scorers.get(name, {}))
    return lines


def _oracle(oracle: Mapping[str, Any], feasible: bool) -> dict[str, Any]:
    if feasible:
        return dict(oracle)
    return {name: None if name in POLICY_FIGURES_OF_ORACLE else value for name, value in oracle.items()}

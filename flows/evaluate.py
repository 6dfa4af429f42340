"""Evaluate: certify the chosen policy, measure it and the baselines on the test prompts, judge it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect import flow

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.evaluation.measure import Measured
from flows.align import Alignment
from tasks.conditional import policy_at
from tasks.evaluation import (
    Certified,
    certify_policy,
    enumerate_reference,
    examined,
    has_judge,
    judge_policy,
    test_policy,
)
from tasks.prefect_patience import ends_when_there
from tasks.records import Prepared, Scored
from tasks.workbench import Workbench

REFERENCE, UNCONSTRAINED = "reference", "DPO (λ = 0)"


@dataclass(frozen=True)
class Evaluation:
    """What was found out about the chosen policy.

    Attributes:
        certified: the certificates; None when the limit is out of reach and none was tried.
        test: scored test responses by method, the baselines first.
        oracle: the exact judge's record on the testbed, else {}.
    """

    certified: Certified | None
    test: dict[str, Measured]
    oracle: dict[str, Any]


@flow(name="evaluate", validate_parameters=False)
@ends_when_there
def evaluate(bench: Workbench, prepared: Prepared, scored: Scored, alignment: Alignment) -> Evaluation:
    """The certificate on prompts that nothing has seen, the test figures, what measured them, the exact judge."""
    policy = alignment.policy
    certified = None
    if policy is not None and alignment.status != "infeasible":
        foreseen = alignment.candidates[alignment.chosen].foreseen
        certified = certify_policy(bench, prepared, scored, policy, foreseen)
    unconstrained = alignment.unconstrained or policy_at(
        bench, prepared, scored, [0.0] * len(bench.names), alignment.plan.settings.lambda_max
    )
    policies = {REFERENCE: prepared.reference, UNCONSTRAINED: unconstrained}
    if policy is not None:
        policies["policy"] = policy
    test = {name: test_policy(bench, prepared, scored, item, name) for name, item in policies.items()}
    if certified is not None:
        baselines = {name: item for name, item in test.items() if name != "policy"}
        certified = examined(bench, prepared, scored, certified, baselines)
    return Evaluation(certified, test, _judged(bench, prepared, scored, alignment, policy or unconstrained))


def _judged(
    bench: Workbench, prepared: Prepared, scored: Scored, alignment: Alignment, policy: ArtifactRef
) -> dict[str, Any]:
    if not has_judge(bench):
        return {}
    enumerated = enumerate_reference(bench, prepared, scored)
    return judge_policy(bench, prepared, enumerated, policy, alignment.plan.margins)

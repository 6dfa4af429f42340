"""Evaluate: certify the chosen policy, measure it and the baselines on the test prompts, judge it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefect import flow

from cdpo_core.evaluation.measure import Measured
from flows.align import Alignment
from tasks.evaluation import (
    Certified,
    begin_judgement,
    certify_policy,
    enumerate_reference,
    has_judge,
    judge_policy,
    test_policy,
)
from tasks.prefect_patience import ends_when_there
from tasks.records import Prepared, Scored
from tasks.rounds import train_policy
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
    """The certificate on prompts that nothing has seen, the test figures, the exact judge."""
    policy = alignment.policy
    unconstrained = alignment.unconstrained or train_policy(bench, prepared, scored, [0.0] * len(bench.names))
    enumerated = enumerate_reference(bench, prepared, scored) if has_judge(bench) else None
    if enumerated is not None:
        begin_judgement(bench, prepared, enumerated, policy or unconstrained)
    certified = None
    if policy is not None and alignment.status != "infeasible":
        certified = certify_policy(bench, prepared, scored, policy)
    policies = {REFERENCE: prepared.reference, UNCONSTRAINED: unconstrained}
    if policy is not None:
        policies["policy"] = policy
    test = {name: test_policy(bench, prepared, scored, item, name) for name, item in policies.items()}
    judged = {}
    if enumerated is not None:
        judged = judge_policy(bench, prepared, enumerated, policy or unconstrained, alignment.plan.margins)
    return Evaluation(certified, test, judged)

"""Align: the rounds of constrained DPO, from the first lambda until the limit is met."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import flow

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.dual.ascent import DualStep, Round, next_step
from cdpo_core.dual.selection import Candidate
from cdpo_core.evaluation.measure import Measured
from cdpo_core.evaluation.result import round_record
from tasks.conditional import policy_at
from tasks.dual import OfflinePlan, candidate, choose_round, corrected_plan, dual_round, plan_dual
from tasks.evaluation import exact_floor
from tasks.journal import Journal
from tasks.prefect_patience import ends_when_there
from tasks.records import Prepared, Scored
from tasks.rounds import at, measure_policy
from tasks.workbench import Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alignment:
    """The rounds and which of them is returned.

    Attributes:
        status: `met`, `exhausted` or `infeasible`; without any round when the limit is known to be
            out of reach.
        reason: one sentence.
        unconstrained: the policy trained at lambda 0, where the rounds needed it.
        candidates: the rounds as the choice weighed them.
        chosen: index into `rounds` and `policies`; the round on target, else the one with the most reward
            among those that the certificate would pass, else the one with the lowest bound.
    """

    plan: OfflinePlan
    history: list[Round]
    rounds: list[dict[str, Any]]
    policies: list[ArtifactRef]
    chosen: int
    status: str
    reason: str
    exact_floor: list[float] | None
    unconstrained: ArtifactRef | None = None
    candidates: Sequence[Candidate] = ()

    @property
    def policy(self) -> ArtifactRef | None:
        """The chosen round's policy; None without any round."""
        return self.policies[self.chosen] if self.policies else None

    def floor(self) -> list[float]:
        """[m] the lowest mean costs known: exact on the testbed, else of the samples and the rounds."""
        if self.exact_floor is not None:
            return self.exact_floor
        return [
            min(costs) for costs in zip(self.plan.dual.floor().tolist(), *(r.cost for r in self.history), strict=True)
        ]


@flow(name="align", validate_parameters=False)
@ends_when_there
def align(bench: Workbench, prepared: Prepared, scored: Scored, journal: Journal | None = None) -> Alignment:
    """Train at lambda, measure on the selection prompts, move lambda; then choose among the rounds."""
    plan = plan_dual(bench, prepared, scored)
    for warning in plan.warnings:
        log.warning(warning)
    if journal is not None:
        journal.price(plan.price)
    floor = exact_floor(bench, prepared) if bench.config.on_testbed else None
    if floor and any(limit < low for limit, low in zip(plan.settings.limit, floor, strict=True)):
        return Alignment(plan, [], [], [], -1, "infeasible", _below_floor(floor), floor)
    unconstrained = _unconstrained(bench, prepared, scored, plan)
    if unconstrained is not None and bench.config.dual.start == "corrected":
        plan = corrected_plan(bench, prepared, scored, plan, unconstrained.measured)
    history: list[Round] = []
    candidates: list[Candidate] = []
    rounds: list[dict[str, Any]] = []
    policies: list[ArtifactRef] = []
    while (step := next_step(history, plan.settings, plan.first_lambda)).lambda_ is not None:
        log.info(step.reason)
        policy, measured = _trained(bench, prepared, scored, plan, step.lambda_, unconstrained, policies)
        policies.append(policy)
        history.append(dual_round(bench, prepared, scored, measured, step.lambda_))
        candidates.append(candidate(bench, prepared, scored, measured, history[-1], plan.settings))
        figures = {
            "cost": history[-1].cost,
            "cost_half_width": history[-1].half_width,
            "cost_upper": candidates[-1].upper,
            "reward": measured.reward().mean,
            "kl": measured.kl().mean,
            "safe_rate": measured.safe_rate(bench.names).mean,
            "unfinished": unfinished.mean if (unfinished := measured.unfinished()) else None,
            "seconds": bench.seconds(policy),
        }
        rounds.append(round_record(len(rounds) + 1, step.lambda_, figures))
        if journal is not None:
            journal.round(rounds, policy)
    status, reason = _verdict(bench, plan, step)
    log.info(reason)
    chosen = choose_round(bench, candidates)
    zero = unconstrained.policy if unconstrained else None
    return Alignment(plan, history, rounds, policies, chosen, status, reason, floor, zero, candidates)


def _verdict(bench: Workbench, plan: OfflinePlan, step: DualStep) -> tuple[str, str]:
    """How the rounds ended. That a policy for every λ does not come down to a limit says little of other policies."""
    if not (bench.config.dpo.conditional and step.status == "infeasible"):
        return step.status, step.reason
    most = f"λ = {plan.settings.lambda_max:g}, the largest that the policy for every λ has learned"
    return "exhausted", f"{step.reason}: {most}; for this limit set dpo.conditional to false"


@dataclass(frozen=True)
class Unconstrained:
    """The policy trained at lambda 0 from the reference, on the selection prompts."""

    policy: ArtifactRef
    measured: Measured


def _unconstrained(bench: Workbench, prepared: Prepared, scored: Scored, plan: OfflinePlan) -> Unconstrained | None:
    """None where the rounds neither start from it nor learn their first lambda from it."""
    dual, zeros = bench.config.dual, (0.0,) * len(bench.names)
    if dual.start != "corrected" and dual.warm_start != "unconstrained":
        return None
    policy = policy_at(bench, prepared, scored, zeros, plan.settings.lambda_max)
    return Unconstrained(policy, _on_selection(bench, prepared, scored, policy, zeros))


def _trained(
    bench: Workbench,
    prepared: Prepared,
    scored: Scored,
    plan: OfflinePlan,
    lambda_: tuple[float, ...],
    unconstrained: Unconstrained | None,
    earlier: Sequence[ArtifactRef],
) -> tuple[ArtifactRef, Measured]:
    """A round's policy and what it says to the selection prompts."""
    start = bench.config.dual.warm_start
    if unconstrained is not None and not any(lambda_):
        return unconstrained.policy, unconstrained.measured
    previous = earlier[-1] if earlier and start == "previous" else None
    if unconstrained is not None and start == "unconstrained":
        previous = unconstrained.policy
    policy = policy_at(bench, prepared, scored, lambda_, plan.settings.lambda_max, previous)
    return policy, _on_selection(bench, prepared, scored, policy, lambda_)


def _on_selection(
    bench: Workbench, prepared: Prepared, scored: Scored, policy: ArtifactRef, lambda_: tuple[float, ...]
) -> Measured:
    samples, label = bench.config.sampling.selection, f"selection {at(lambda_)}"
    return measure_policy(bench, prepared, scored, policy, "selection", samples, label)


def _below_floor(floor: list[float]) -> str:
    return "the lowest mean cost that any policy can have is " + ", ".join(f"{value:.3f}" for value in floor)

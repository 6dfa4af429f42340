"""The dual's side of a run: the offline curve, the training target, and each round as the dual sees it.

All of it is computed from stored artifacts in milliseconds, so a continued run replays it exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from cdpo_core.dual.ascent import DualSettings, Round, meets_target
from cdpo_core.dual.certificate import Foreseen, foresee, planned_margin
from cdpo_core.dual.offline import OfflineDual
from cdpo_core.dual.selection import Candidate, select_round
from cdpo_core.evaluation.measure import Measured
from cdpo_core.evaluation.metrics import paired_mean, within_prompt_covariance
from cdpo_core.evaluation.result import reach_records
from tasks.conditional import largest_lambda, most_rounds
from tasks.ledger import share_for
from tasks.preference_models import scorer_reports
from tasks.records import Prepared, Scored
from tasks.rounds import measured_from, reference_costs
from tasks.workbench import Workbench

log = logging.getLogger(__name__)

CURVE_POINTS = 60
PRICE_POINTS = 8
# Below so many of a prompt's reference samples that carry weight, or such a share of them, the prediction is warned of.
FEWEST_SAMPLES = 2.0
FEWEST_SHARE = 0.1
BELOW_SAMPLES = "the limit lies below the lowest mean cost among the reference samples"


@dataclass(frozen=True)
class OfflinePlan:
    """What the reference samples say before any round.

    Attributes:
        dual: the offline dual on the policy prompts' reference samples.
        margins: [m] distances below the limits that training aims at.
        settings: how lambda moves, with targets and limits.
        first_lambda: [m] the first round's multipliers.
        warnings: what the user should know before training.
        effective_samples: of a prompt's reference samples, how many carry weight at the first lambda's prediction.
        price: what each limit would cost in reward, as the samples predict it (`OfflineDual.price_of_limits`).
    """

    dual: OfflineDual
    margins: list[float]
    settings: DualSettings
    first_lambda: tuple[float, ...]
    warnings: list[str]
    effective_samples: float
    price: list[dict[str, Any]]


def plan_dual(bench: Workbench, prepared: Prepared, scored: Scored) -> OfflinePlan:
    """Solve the dual on the reference samples: the margin, the first lambda, what is within reach."""
    config = bench.config
    dual = offline_dual(bench, scored)
    limits = np.array([item.limit for item in config.constraints])
    margins = _margins(bench, prepared, scored, dual, limits)
    target = limits - margins
    most = largest_lambda(bench, dual)
    solved = dual.solve(target, most)
    first = np.zeros(len(limits)) if config.dual.start == "zero" else solved
    settings = DualSettings(
        update=config.dual.update,
        step=config.dual.step,
        rounds=most_rounds(bench),
        lambda_max=most,
        target=tuple(target.tolist()),
        limit=tuple(limits.tolist()),
    )
    price = dual.price_of_limits(limits, config.dual.lambda_max, PRICE_POINTS)
    told = _told(bench, scored, dual, solved)
    return OfflinePlan(dual, margins.tolist(), settings, tuple(first.tolist()), price=price, **told)


def corrected_plan(
    bench: Workbench, prepared: Prepared, scored: Scored, plan: OfflinePlan, unconstrained: Measured
) -> OfflinePlan:
    """The plan with the first lambda that trained policies need, told from the one trained at lambda 0.

    Its reward says at which beta the samples predict trained policies. The costs that it has beyond that prediction, on
    prompts that no round trained on, the others are expected to have too.

    Args:
        bench: of the experiment.
        prepared: its data.
        scored: its scored samples.
        plan: of `plan_dual`.
        unconstrained: the policy trained at lambda 0, on the selection prompts.
    """
    pool = measured_from(bench, prepared.pool_responses, scored.pool_scores)
    here, reference = (item.table.groupby("prompt_id")["reward"].mean() for item in (unconstrained, pool))
    zeros = (0.0,) * len(bench.names)
    dual = plan.dual.at_beta(plan.dual.effective_beta(float((here - reference.loc[here.index]).mean())))
    measured = np.asarray(dual_round(bench, prepared, scored, unconstrained, zeros).cost)
    beyond = measured - dual.expected(np.asarray(zeros)).costs
    first = dual.solve(np.asarray(plan.settings.target) - beyond, plan.settings.lambda_max)
    said = ", ".join(f"{value:+.3f}" for value in beyond)
    log.info(
        "the policy at λ = 0 is as the samples promise at β = %.3g, but for costs of %s: first λ from there",
        dual.beta,
        said,
    )
    return replace(plan, first_lambda=tuple(first.tolist()), **_told(bench, scored, dual, first))


def _told(bench: Workbench, scored: Scored, dual: OfflineDual, lambda_: np.ndarray) -> dict[str, Any]:
    """A plan's warnings and effective samples, where the dual predicts a policy at this lambda."""
    limits = np.array([item.limit for item in bench.config.constraints])
    warnings = [*below_samples(bench.names, dual, limits), *few_samples(dual, lambda_), *beyond_ends(bench, scored)]
    return {"warnings": warnings, "effective_samples": dual.expected(lambda_).effective_samples}


def offline_dual(bench: Workbench, scored: Scored) -> OfflineDual:
    """The dual on the reference's scored responses to the policy prompts: [P, K] rewards, [P, K, m] costs."""
    table = measured_from(bench, scored.responses, scored.scores).table
    samples = int(table["sample"].max()) + 1
    reward = table["reward"].to_numpy(float).reshape(-1, samples)
    costs = np.stack([table[f"cost_{name}"].to_numpy(float).reshape(-1, samples) for name in bench.names], axis=-1)
    return OfflineDual(reward, costs, bench.config.dpo.beta)


def _margins(bench: Workbench, prepared: Prepared, scored: Scored, dual: OfflineDual, limits: np.ndarray) -> np.ndarray:
    """The certificate's planned margin from the costs the offline policy is predicted to have.

    The certificate takes the cost model's units as given; the margin also pays for the error that
    the held-out labels leave in them, so that the truth keeps the limit about as surely as the model says.
    """
    config, sampling = bench.config, bench.config.sampling
    point = dual.expected(dual.solve(limits, config.dual.lambda_max))
    measured = measured_from(bench, scored.responses, scored.scores)
    units = [measured.units()[name] for name in measured.prompts()]
    costs = pd.DataFrame(point.prompt_costs, columns=bench.names).groupby(units).mean()
    within = (np.diag(point.hessian) * config.dpo.beta).tolist()
    # Few answers to a prompt leave chance in its mean, which the predicted costs do not have.
    chance = [variance / sampling.certificate for variance in within]
    foreseen = foreseen_tests(bench, prepared, scored, costs, chance)
    prompts = {split: _units_of(bench, scored, split) for split in ("selection", "certificate")}
    rules, reports = config.certificate, scorer_reports(bench, scored.scorers)
    # All limits must pass, and their truths hold, together as surely as one alone would.
    power = (len(limits) - 1 + rules.power) / len(limits)
    return np.array(
        [
            planned_margin(
                item,
                prompts["certificate"],
                power,
                selection_error=math.hypot(
                    math.sqrt((item.spread.within**2 + variance / sampling.selection) / prompts["selection"]),
                    reports.get(name, {}).get("calibration_error") or 0.0,
                ),
            )
            for name, item, variance in zip(bench.names, foreseen, within, strict=True)
        ]
    )


def below_samples(names: list[str], dual: OfflineDual, limits: np.ndarray) -> list[str]:
    """A warning where a limit is below everything that the reference samples can represent."""
    floor = dual.floor()
    low = [f"{name} ≤ {c:g} (lowest {f:.2f})" for name, c, f in zip(names, limits, floor, strict=True) if c < f]
    return [f"{BELOW_SAMPLES}: " + ", ".join(low)] if low else []


def few_samples(dual: OfflineDual, lambda_: np.ndarray) -> list[str]:
    """A warning where few of a prompt's samples carry the prediction at a lambda, by their effective number."""
    carry, samples = dual.expected(lambda_).effective_samples, dual.reward.shape[1]
    if carry >= max(FEWEST_SHARE * samples, FEWEST_SAMPLES):
        return []
    said = ", ".join(f"{value:.3g}" for value in lambda_)
    return [
        f"of a prompt's {samples} reference samples only {carry:.1f} carry weight at the predicted λ = {said}: the "
        "prediction leans to what those few say; more samples (sampling.reference) or a larger dpo.beta help"
    ]


def dual_round(
    bench: Workbench, prepared: Prepared, scored: Scored, measured: Measured, lambda_: tuple[float, ...]
) -> Round:
    """A trained round as the dual sees it: costs on the selection prompts, paired with the reference's there."""
    names = bench.names
    pool = measured_from(bench, prepared.pool_responses, scored.pool_scores)
    here, reference = measured.unit_costs(names), pool.unit_costs(names)
    splits = bench.table(scored.splits, "splits")
    # The certificate's prompts must not have a say in where lambda goes.
    certificate = splits.loc[splits["split"] == "certificate", "unit"].unique()
    population = reference.drop(index=certificate.tolist())
    estimates = [
        paired_mean(
            here[name].to_numpy(),
            reference.loc[here.index, name].to_numpy(),
            float(population[name].mean()),
        )
        for name in names
    ]
    covariance = within_prompt_covariance(measured.costs(names), measured.table["prompt_id"].to_numpy())
    return Round(
        lambda_=tuple(lambda_),
        cost=tuple(estimate.mean for estimate in estimates),
        half_width=tuple((estimate.high - estimate.low) / 2 for estimate in estimates),
        hessian=tuple(map(tuple, (covariance / bench.config.dpo.beta).tolist())),
    )


def foreseen_tests(
    bench: Workbench, prepared: Prepared, scored: Scored, costs: pd.DataFrame, chance: Sequence[float] | None = None
) -> tuple[Foreseen, ...]:
    """What the certificate is likely to say of a policy, one for each constraint.

    Args:
        bench: of the experiment.
        prepared: its data.
        scored: its scored samples.
        costs: the policy's mean costs, a column for each constraint, index unit; none of the certificate's.
        chance: variance that few answers to a prompt will leave in its mean, where `costs` are free of it.
    """
    rules, prompts = bench.config.certificate, _units_of(bench, scored, "certificate")
    pool = reference_costs(bench, scored.pool_scores)
    ends, delta = cost_ends(bench, scored), share_for(bench, prepared, scored).delta
    return tuple(
        foresee(
            costs[item.name].to_numpy(),
            pool.loc[costs.index, item.name].to_numpy(),
            pool[item.name].to_numpy(),
            prompts,
            item.limit,
            delta,
            rules.method,
            high=ends[item.name],
            chance=variance,
        )
        for item, variance in zip(bench.config.constraints, chance or [0.0] * len(bench.names), strict=True)
    )


def cost_ends(bench: Workbench, scored: Scored) -> dict[str, float]:
    """The largest cost that a response can have, by constraint: the cost model's own end, else the configured one."""
    reports = scorer_reports(bench, scored.scorers)
    own = {name: (reports.get(name) or {}).get("ceiling") for name in bench.names}
    return {name: bench.config.certificate.cost_high if end is None else end for name, end in own.items()}


def beyond_ends(bench: Workbench, scored: Scored) -> list[str]:
    """A warning where a reference response costs more than a response may: one of the policy's would fail the test."""
    scores, ends = bench.table(scored.pool_scores, "scores"), cost_ends(bench, scored)
    largest = {name: float(scores[f"cost_{name}"].max()) for name in bench.names}
    beyond = [f"{name} {largest[name]:.3g}" for name in bench.names if largest[name] > ends[name]]
    if not beyond:
        return []
    return [
        f"reference responses cost up to {', '.join(beyond)}, more than certificate.cost_high "
        f"({bench.config.certificate.cost_high:g}): one such response fails the test; set it to the largest cost that "
        "the cost model can give"
    ]


def candidate(
    bench: Workbench,
    prepared: Prepared,
    scored: Scored,
    measured: Measured,
    round_: Round,
    settings: DualSettings | None = None,
) -> Candidate:
    """A round's figures as the choice of policy weighs them; without targets (`settings`) none is on target."""
    foreseen = foreseen_tests(bench, prepared, scored, measured.unit_costs(bench.names))
    met = settings is not None and meets_target(round_, settings)
    return Candidate(reward=measured.reward().mean, cost=round_.cost, foreseen=foreseen, met=met)


def choose_round(bench: Workbench, candidates: list[Candidate]) -> int:
    """Index of the round whose policy goes to the certificate."""
    return select_round(candidates, tuple(item.limit for item in bench.config.constraints))


def _units_of(bench: Workbench, scored: Scored, split: str) -> int:
    """What the split's tests and intervals count: its prompts, near duplicates once."""
    splits = bench.table(scored.splits, "splits")
    return int(splits.loc[splits["split"] == split, "unit"].nunique())


def within_reach(
    names: Sequence[str], plan: OfflinePlan, rounds: Sequence[Mapping[str, Any]], floor: Sequence[float] | None = None
) -> list[dict[str, Any]]:
    """How low each cost came, and the tightest limit that would likely be certified (`reach_records`).

    Without a round it is what the reference samples predict at the largest multipliers, never below what they hold or
    an exact floor.
    """
    most = plan.settings.lambda_max
    predicted = plan.dual.expected(np.full(len(names), most)).costs
    predicted = np.maximum(predicted, plan.dual.floor())
    predicted = predicted if floor is None else np.maximum(predicted, np.asarray(floor))
    by = f"predicted from the reference's samples at λ = {most:.3g}"
    return reach_records(names, plan.margins, rounds, predicted.tolist(), by)


def predicted_curve(plan: OfflinePlan) -> tuple[np.ndarray, np.ndarray]:
    """(lambdas [L], predicted mean costs [L, m]) along the ray through the first lambda, for the figure."""
    direction = np.asarray(plan.first_lambda)
    if not direction.any():
        direction = np.ones(len(direction))
    largest = max(3 * float(direction.max()), math.ulp(1.0))
    grid = np.linspace(0, largest / float(direction.max()), CURVE_POINTS)[:, None] * direction
    return grid.max(axis=1), np.stack([point.costs for point in plan.dual.curve(grid)])

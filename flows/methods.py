"""What each kind of method runs, how its settings are chosen, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.evaluation.measure import Measured
from cdpo_core.evaluation.result import each
from cdpo_core.methods import Method
from flows.align import align
from flows.preference_models import preference_models
from flows.prepare import prepare
from tasks.comparison import compute_spent, value_on
from tasks.dual import OfflinePlan, candidate, choose_round, dual_round, plan_dual
from tasks.evaluation import enumerate_reference, has_judge, judge_policy, test_policy
from tasks.prefect_patience import part
from tasks.preference_models import trusted_scorers
from tasks.records import Prepared, Scored
from tasks.rounds import measure_policy, train_policy
from tasks.workbench import Workbench, open_workbench

# One training at the offline dual's λ, by which a method's training settings are compared.
ONE_ROUND = {"dual.update": "offline", "dual.start": "offline", "dual.warm_start": "none"}


@dataclass(frozen=True)
class World:
    """What all methods start from: the reference, scorers, splits and scored samples."""

    prepared: Prepared
    scored: Scored

    @classmethod
    def of(cls, config: ExperimentConfig) -> World:
        """The world of a config, computed or found in the store."""
        bench = open_workbench(config)
        prepared = part(prepare, bench)
        return cls(prepared, part(preference_models, bench, prepared))

    @property
    def samples(self) -> list[ArtifactRef]:
        """The reference's scored responses, which every method but PPO and the reference learns from."""
        return [self.scored.responses, self.scored.scores]


@dataclass(frozen=True)
class Trained:
    """One method's run at one limit.

    Attributes:
        bench: its workbench, with the config it ran.
        policy: what it returns.
        lambda_: the multipliers of the policy; empty where there are none.
        rounds: trainings until it ended; 0 for the reference.
        met: whether it ended because the limit was met.
        spent: what its own training and sampling took (`compute_spent`).
    """

    bench: Workbench
    policy: ArtifactRef
    lambda_: list[float]
    rounds: int
    met: bool
    spent: dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """The settings a method runs with, and what was tried to choose them."""

    settings: dict[str, Any]
    tried: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """{settings, tried: [{settings, value or rounds, cpu_seconds}]}."""
        return {"settings": self.settings, "tried": self.tried}

    @property
    def cpu_seconds(self) -> float:
        """Of all that was tried."""
        return float(sum(entry["cpu_seconds"] for entry in self.tried))


def trained(world: World, config: ExperimentConfig, method: Method, settings: Mapping[str, Any]) -> Trained:
    """Run one method at one limit.

    Args:
        world: of the config.
        config: the compared config with the limit.
        method: what to run.
        settings: the chosen ones, by dotted path.
    """
    bench = open_workbench(method.config(config, settings))
    if method.kind == "reference":
        return Trained(bench, world.prepared.reference, [], 0, False, compute_spent(bench, []))
    if method.kind == "safe_rlhf":
        return _safe_rlhf(world, bench, method, settings)
    return _fixed(world, bench, method) if method.kind == "fixed" else _rounds(world, bench)


def tune(world: World, config: ExperimentConfig, method: Method) -> Tuned:
    """The best combination of the method's grid, then the best of its step sizes.

    Training settings are compared by E[r] − λᵀE[c] − β KL on the selection prompts at the offline dual's λ; for
    rounds each is one training at that λ. Step sizes are compared by the rounds they take to meet the limit, then by
    their processor time.
    """
    plan = plan_dual(open_workbench(config), world.prepared, world.scored)
    price = plan.dual.solve(_targets(plan), config.dual.lambda_max).tolist()
    tried: list[dict[str, Any]] = []
    for settings in method.settings() if method.grid else []:
        one_round = ONE_ROUND if method.kind == "cdpo" else {}
        run = trained(world, config, method, {**settings, **one_round})
        value = value_on(_on_selection(world, run), run.bench.names, price, config.dpo.beta)
        tried.append({"settings": settings, "value": value, "cpu_seconds": run.spent["cpu_seconds"]})
    best: dict[str, Any] = dict(max(tried, key=lambda entry: entry["value"])["settings"]) if tried else {}
    steps: list[dict[str, Any]] = []
    for step in method.step_grid:
        run = trained(world, config, method, {**best, "dual.step": step})
        rounds = run.rounds if run.met else run.bench.config.dual.rounds + 1
        steps.append({"settings": {"dual.step": step}, "rounds": rounds, "cpu_seconds": run.spent["cpu_seconds"]})
    if steps:
        best |= min(steps, key=lambda entry: (entry["rounds"], entry["cpu_seconds"]))["settings"]
    return Tuned(best, tried + steps)


def method_record(world: World, run: Trained, method: Method, tuned: Tuned) -> dict[str, Any]:
    """A method's policy on the test prompts and, on the testbed, before the exact judge.

    Returns:
        {method, title, seed, beta, lambda, rounds, met, settings, test, oracle, compute, policy}.
    """
    bench, config = run.bench, run.bench.config
    oracle: dict[str, Any] = {}
    if has_judge(bench):
        enumerated = enumerate_reference(bench, world.prepared, world.scored)
        margins = plan_dual(bench, world.prepared, world.scored).margins
        oracle = judge_policy(bench, world.prepared, enumerated, run.policy, margins, method.title)
    measured = test_policy(bench, world.prepared, world.scored, run.policy, method.title)
    return {
        "method": method.name,
        "title": method.title,
        "seed": config.seed,
        "beta": config.dpo.beta,
        "lambda": run.lambda_,
        "rounds": run.rounds if method.kind == "cdpo" else None,
        "met": run.met,
        "settings": tuned.settings,
        "test": measured.summary(bench.names),
        "oracle": oracle,
        "compute": {**run.spent, "tuning_cpu_seconds": tuned.cpu_seconds},
        "policy": run.policy.model_dump(),
    }


def _rounds(world: World, bench: Workbench) -> Trained:
    alignment = align(bench, world.prepared, world.scored)
    if alignment.policy is None:
        raise ValueError(f"no policy can be trained at a limit out of reach ({alignment.reason})")
    spent = compute_spent(bench, [*_made(bench), *world.samples])
    chosen = each(alignment.rounds[alignment.chosen]["lambda"])
    return Trained(bench, alignment.policy, chosen, len(alignment.rounds), alignment.status == "met", spent)


def _fixed(world: World, bench: Workbench, method: Method) -> Trained:
    """Train at each of the method's λ; the choice among them is the one among rounds."""
    prepared, scored = world.prepared, world.scored
    policies, candidates = [], []
    for value in method.lambdas:
        lambda_ = [value] * len(bench.names)
        policy = train_policy(bench, prepared, scored, lambda_, reward_weight=method.reward_weight)
        label = f"selection of {method.title} at λ = {value:g}"
        measured = measure_policy(bench, prepared, scored, policy, "selection", bench.config.sampling.selection, label)
        round_ = dual_round(bench, prepared, scored, measured, tuple(lambda_))
        policies.append(policy)
        candidates.append(candidate(bench, prepared, scored, measured, round_))
    chosen = choose_round(bench, candidates)
    spent = compute_spent(bench, [*_made(bench), *world.samples])
    return Trained(bench, policies[chosen], [method.lambdas[chosen]] * len(bench.names), len(policies), False, spent)


def _safe_rlhf(world: World, bench: Workbench, method: Method, settings: Mapping[str, Any]) -> Trained:
    from cdpo_core.baselines.safe_rlhf import SafeRlhfSettings

    config, prepared, scored = bench.config, world.prepared, world.scored
    inputs = {"data": prepared.data, "reference": prepared.reference, "splits": scored.splits}
    inputs |= {f"scorers_{index}": ref for index, ref in enumerate(scored.scorers)}
    policy = bench.run(
        pipeline.SAFE_RLHF,
        inputs,
        method.title,
        names=bench.names,
        constraints=[{"name": item.name, "labels": item.labels} for item in config.constraints],
        targets=[round(float(value), 6) for value in _targets(plan_dual(bench, prepared, scored))],
        safe_rlhf=SafeRlhfSettings(**method.own_settings(settings)).model_dump(mode="json"),
        **(trusted_scorers(config) if scored.scorers else {}),
    )
    return Trained(bench, policy, [], 1, False, compute_spent(bench, _made(bench)))


def _targets(plan: OfflinePlan) -> np.ndarray:
    """[m] the mean costs that every method aims at."""
    return np.asarray(plan.settings.target)


def _on_selection(world: World, run: Trained) -> Measured:
    samples = run.bench.config.sampling.selection
    return measure_policy(run.bench, world.prepared, world.scored, run.policy, "selection", samples, "selection")


def _made(bench: Workbench) -> Sequence[ArtifactRef]:
    """All that a workbench was asked to make so far."""
    return [done.ref for done in bench.results if done.ref is not None]

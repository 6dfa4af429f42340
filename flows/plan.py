"""The plan: which stages a run would find in the store, which it would compute, and what that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, ClassVar

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.data.lengths import length_lines
from cdpo_core.evaluation.cuts import cut_warnings, policy_lines, read_cuts
from cdpo_core.provenance import machine_record, mixed
from cdpo_core.stages import Stage, reference_to, stage_key
from flows.align import align
from flows.evaluate import evaluate
from flows.preference_models import preference_models
from flows.preflight import check_before_run
from flows.prepare import prepare
from tasks.conditional import CONDITIONAL_STAGE
from tasks.dual import plan_dual, within_reach
from tasks.evaluation import has_judge
from tasks.ledger import share_for
from tasks.workbench import Done, Workbench, open_workbench

PLANNED = "planned"
UNCONSTRAINED_STAGE, FIRST_STAGE = "policy at λ = 0", "policy at the first λ"
# What follows the first stage that is not there yet, when its λ cannot be known before it is computed.
ROUND_STAGES = (FIRST_STAGE, "responses and scores on the selection prompts", "further rounds if needed")
FINAL_STAGES = ("certificate", "test of the reference, of DPO and of the policy")
JUDGE_STAGES = ("exact reference", "exact policy", "exact judge")


class _NotComputed(Exception):
    """A table was asked for that no stage has written yet."""


class PlanBench(Workbench):
    """A workbench that computes nothing: a missing artifact is a placeholder, and reading one ends the plan."""

    enters: ClassVar[bool] = False

    def run(self, stage: Stage, inputs: Mapping[str, ArtifactRef], label: str = "", **extra: Any) -> ArtifactRef:
        """The artifact's reference if it is in the store, else a placeholder."""
        label = label or stage.name
        if all(ref.kind != PLANNED for ref in inputs.values()):
            key = stage_key(stage, self.slice_of(stage, extra), inputs)
            manifest = self.store.find(stage.name, key)
            if manifest is not None:
                ref = reference_to(manifest, self.store)
                self.results.append(Done(label, True, manifest.seconds, manifest.created, ref))
                return ref
        self.results.append(Done(label, False, 0.0, ""))
        return ArtifactRef(uri="", digest="", kind=PLANNED)

    def put_record(self, name: str, record: Mapping[str, Any]) -> None:
        """A plan tests nothing, so it enters nothing."""

    def folder(self, ref: ArtifactRef) -> Any:
        """The artifact's files; ends the plan when they are not there yet."""
        if ref.kind == PLANNED:
            raise _NotComputed
        return super().folder(ref)


def plan_experiment(config: ExperimentConfig) -> dict[str, Any]:
    """What a run of the config would do, from the store alone.

    Returns:
        stages: [{name, cached, estimate}], estimate in seconds from earlier runs of the same part,
        None where there was none; lengths: lines on what they cut;
        margin: [m] or None when the costs are not known yet; memory;
        warnings; share: of δ that the next test would have (`tasks.ledger.Share`), None when its prompts
        are not known yet; price: what each limit would cost in reward, [] until the reference's samples are scored;
        reach: the tightest limits that would likely be certified (`reach_records`), [] until then.
    """
    check_before_run(config)
    real = open_workbench(config)
    bench = PlanBench(config, real.store, real.scratch_root)
    margin, share, warnings, price, reach, reference = None, None, [], [], [], None
    try:
        prepared = prepare.fn(bench)
        reference = prepared.reference
        scored = preference_models.fn(bench, prepared)
        share = asdict(share_for(bench, prepared, scored))
        dual = plan_dual(bench, prepared, scored)
        margin, warnings, price = dual.margins, dual.warnings, dual.price
        reach = within_reach(bench.names, dual, ())
        alignment = align.fn(bench, prepared, scored, None)
        evaluate.fn(bench, prepared, scored, alignment)
        rest: tuple[str, ...] = ()
    except _NotComputed:
        rest = _what_follows(bench)
    known = _seconds_by_stage(bench)
    warnings += _mixed(bench)
    stages = [{"name": done.label, "cached": done.cached, "estimate": known.get(done.label)} for done in bench.results]
    stages += [{"name": name, "cached": False, "estimate": known.get(name)} for name in rest]
    counted = read_cuts(bench.folder(reference)) if reference and reference.kind != PLANNED else {}
    lengths = policy_lines(counted) if counted else length_lines(config)
    warnings += cut_warnings({"policy": counted})
    found = {"lengths": lengths, "margin": margin, "share": share, "warnings": warnings, "price": price, "reach": reach}
    return {"stages": stages, "memory": _memory(config), **found}


def _mixed(bench: PlanBench) -> list[str]:
    """A line if what is there was computed elsewhere than what is not there yet would be."""
    machines = bench.machines()
    missing = [done.label for done in bench.results if not done.cached]
    if missing:
        runtime = replace(bench.runtime(""), dtype=bench.config.policy.dtype)
        machines.append({**machine_record(runtime), "stages": missing})
    return [line] if (line := mixed(machines)) else []


def _what_follows(bench: PlanBench) -> tuple[str, ...]:
    """The parts of the DAG that the walk did not reach."""
    walked = {done.label for done in bench.results}
    trained = {label for label in walked if label.startswith("policy at")}
    rest: tuple[str, ...] = (*FINAL_STAGES, *JUDGE_STAGES) if has_judge(bench) else FINAL_STAGES
    rest = tuple(name for name in rest if name not in walked)
    if not trained - {UNCONSTRAINED_STAGE}:
        rest = (*ROUND_STAGES, *rest)
    rest = rest if UNCONSTRAINED_STAGE in trained else (UNCONSTRAINED_STAGE, *rest)
    return (CONDITIONAL_STAGE, *rest) if bench.config.dpo.conditional and CONDITIONAL_STAGE not in walked else rest


def _seconds_by_stage(bench: PlanBench) -> dict[str, float]:
    """What stages of the same kind took before, in any experiment of this store: the latest of each."""
    took = {item.stage: item.seconds for item in sorted(bench.store.manifests(), key=lambda item: item.created)}
    kinds = {"reference policy": "sft", "splits": "splits", "data": "data", "exact reference": "enumeration"}
    at_lambda = "bound" if bench.config.dpo.conditional else "round"
    kinds |= {
        "exact policy": "policy-enumeration",
        "exact judge": "judgement",
        FIRST_STAGE: at_lambda,
        UNCONSTRAINED_STAGE: at_lambda,
        CONDITIONAL_STAGE: "conditional",
    }
    kinds |= {label: "scorers" for label in (done.label for done in bench.results) if label.endswith(" model")}
    kinds |= {done.label: "responses" for done in bench.results if done.label.endswith("responses")}
    kinds |= {done.label: "scores" for done in bench.results if done.label.endswith("scores")}
    kinds |= {done.label: at_lambda for done in bench.results if done.label.startswith("policy at")}
    return {label: took[stage] for label, stage in kinds.items() if stage in took}


def _memory(config: ExperimentConfig) -> str:
    """The parameters of a policy from scratch and what training them holds (weights, gradient, Adam, average)."""
    policy = config.policy
    if policy.base != "scratch":
        return ""
    parameters = policy.hidden_size * policy.vocabulary_size + policy.layers * 12 * policy.hidden_size**2
    mebibytes = parameters * 5 * 4 / 2**20
    return f"{parameters / 1e6:.2g} million parameters, {mebibytes:.0f} MiB while training, and the activations"

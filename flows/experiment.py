"""The experiment: from data to a certified policy, as one DAG.

    cdpo run configs/testbed.yaml

prepare → preference models → align (the rounds) → evaluate → report. Every stage whose artifact is
in the store is skipped, so the same command continues a killed run and repeats a finished one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from cdpo_core.config import (
    CertificateConfig,
    ComputeConfig,
    ConstraintConfig,
    DataConfig,
    DpoConfig,
    DualConfig,
    EvaluationConfig,
    ExperimentConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    StoreConfig,
    TestbedConfig,
    TrackingConfig,
)
from cdpo_core.stages import Progress
from flows.align import Alignment, align
from flows.evaluate import Evaluation, evaluate
from flows.preference_models import preference_models
from flows.preflight import check_before_run
from flows.prepare import prepare
from tasks.journal import Journal, announce
from tasks.preference_models import scorer_reports
from tasks.records import Prepared, Scored
from tasks.report import draw_figures, report_folder, write_json, write_samples
from tasks.result import Outcome, experiment_result
from tasks.workbench import Workbench, open_workbench, outcome, report_progress_to

STATE_NAMES = {"certified": "Certified", "not_certified": "NotCertified", "infeasible": "Infeasible"}
DEFAULT = ExperimentConfig()
# The rules that Prefect's server checks before anything starts; those within a section are the section's own. The
# form's descriptions come from the flow's docstring.
Name = Annotated[str, Field(min_length=1, max_length=100)]
Seed = Annotated[int, Field(ge=0)]
Constraints = Annotated[list[ConstraintConfig], Field(min_length=1)]


@flow(name="experiment", flow_run_name="{name}", persist_result=False)
def experiment(
    name: Name = DEFAULT.name,
    seed: Seed = DEFAULT.seed,
    data: DataConfig = DEFAULT.data,
    testbed: TestbedConfig = DEFAULT.testbed,
    policy: PolicyConfig = DEFAULT.policy,
    sft: SftConfig = DEFAULT.sft,
    reward: RewardConfig = DEFAULT.reward,
    constraints: Constraints = DEFAULT.constraints,
    dpo: DpoConfig = DEFAULT.dpo,
    dual: DualConfig = DEFAULT.dual,
    sampling: SamplingConfig = DEFAULT.sampling,
    certificate: CertificateConfig = DEFAULT.certificate,
    evaluation: EvaluationConfig = DEFAULT.evaluation,
    store: StoreConfig = DEFAULT.store,
    tracking: TrackingConfig = DEFAULT.tracking,
    compute: ComputeConfig = DEFAULT.compute,
) -> State[dict[str, Any]]:
    """A policy as helpful as the limit on harm allows, with evidence that it keeps the limit.

    Args:
        name: shown in the UIs.
        seed: of every random stream.
        data: the preferences, and how their prompts are split.
        testbed: the oracle world, used when data.source is `testbed`.
        policy: the language model that is aligned.
        sft: fine-tuning that makes the reference policy.
        reward: the model of what is better.
        constraints: the limits on harm, each with its cost model.
        dpo: one round of training.
        dual: how lambda moves from round to round.
        sampling: how many responses are drawn for each prompt.
        certificate: the test the returned policy must pass.
        evaluation: what is measured besides.
        store: where artifacts are kept.
        tracking: MLflow.
        compute: the machine; changes no result but by rounding.
    """
    # The parameters, which at this line are all there is, are the config's sections.
    config = ExperimentConfig(**locals())
    bench = open_workbench(config)
    announce(bench)
    check_before_run(config)
    result = _conduct(bench)
    return Completed(name=STATE_NAMES[result["status"]], message=result["verdict"], data=result)


def run_experiment(config: ExperimentConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run one experiment here, in this process; returns its result record (DESIGN: Result)."""
    if progress is not None:
        report_progress_to(progress)
    make_prefect_home()
    state = experiment(**sections(config), return_state=True)
    result: dict[str, Any] = outcome(state)
    return result


def make_prefect_home() -> None:
    """Make Prefect's home where it is missing: its temporary server does not start without."""
    home = os.environ.get("PREFECT_HOME")
    if home:
        Path(home).mkdir(parents=True, exist_ok=True)


def sections(config: ExperimentConfig) -> dict[str, Any]:
    """The config as the flow's parameters, one a section."""
    return {name: getattr(config, name) for name in ExperimentConfig.model_fields}


def _conduct(bench: Workbench) -> dict[str, Any]:
    journal = Journal(bench)
    try:
        prepared = prepare(bench)
        scored = preference_models(bench, prepared)
        reports = scorer_reports(bench, scored.scorers)
        journal.scorers(reports, scored.scorers)
        alignment = align(bench, prepared, scored, journal)
        evaluation = evaluate(bench, prepared, scored, alignment)
        result = experiment_result(
            bench, journal, alignment.plan, reports, _outcome(prepared, scored, alignment, evaluation)
        )
        folder = report_folder(journal.key, bench.config.name)
        draw_figures(bench, result, alignment.plan, alignment.history, evaluation.test, folder)
        write_samples(bench, prepared, evaluation.test, folder)
        write_json(result, folder / "result.json")
        chosen = (result["policy"] or {}).get("digest", "none")
        # A change of the code may give the same experiment another policy: each has a record of its own.
        bench.put_record(f"results/{journal.key}-{chosen[:12]}", result)
        journal.closed(result, folder)
        result["report"] = str(folder)
    except BaseException:
        journal.failed()
        raise
    return result


def _outcome(prepared: Prepared, scored: Scored, alignment: Alignment, evaluation: Evaluation) -> Outcome:
    return Outcome(
        data=prepared.data,
        pool_scores=scored.pool_scores,
        rounds=alignment.rounds,
        reason=alignment.reason,
        chosen=alignment.chosen,
        policy=alignment.policy,
        certified=evaluation.certified,
        test=evaluation.test,
        oracle=evaluation.oracle,
        floor=alignment.floor(),
    )

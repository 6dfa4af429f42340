"""The experiment: from data to a certified policy, as one DAG.

    cdpo run configs/testbed.yaml

prepare → preference models → align (the rounds) → evaluate → report. Every stage whose artifact is
in the store is skipped, so the same command continues a killed run and repeats a finished one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow, tags
from prefect.states import Completed, State

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.stages import Progress
from flows.align import Alignment, align
from flows.evaluate import Evaluation, evaluate
from flows.preference_models import preference_models
from flows.preflight import check_before_run
from flows.prepare import prepare
from flows.sections import takes_sections
from tasks.environment import RUN_TAG
from tasks.journal import Journal, announce
from tasks.prefect_patience import ends_when_there, part
from tasks.prefect_records import flow_run_id
from tasks.preference_models import scorer_reports
from tasks.records import Prepared, Scored
from tasks.report import draw_figures, report_folder, write_json, write_report, write_samples, written_whole
from tasks.result import Outcome, experiment_result, outcome_name
from tasks.uses import enter_run
from tasks.workbench import Workbench, open_workbench, outcome, report_progress_to

STATE_NAMES = {"certified": "Certified", "not_certified": "NotCertified", "infeasible": "Infeasible"}


@flow(name="experiment", flow_run_name="{name}", persist_result=False)
@takes_sections
@ends_when_there
def experiment(config: ExperimentConfig) -> State[dict[str, Any]]:
    """A policy as helpful as the limit on harm allows, with evidence that it keeps the limit."""
    bench = open_workbench(config)
    announce(bench)
    check_before_run(config)
    result = _conduct(bench)
    if run_id := flow_run_id():
        # A run that is started again ends with another record; what waits for this one reads it by the run's id.
        bench.store.delete_record(outcome_name(run_id))
        bench.put_record(outcome_name(run_id), result)
    return Completed(name=STATE_NAMES[result["status"]], message=result["verdict"], data=result)


def run_experiment(config: ExperimentConfig, *, progress: Progress | None = None) -> dict[str, Any]:
    """Run one experiment here, in this process; returns its result record (DESIGN: Result)."""
    if progress is not None:
        report_progress_to(progress)
    make_prefect_home()
    with tags(RUN_TAG):
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
        prepared = part(prepare, bench)
        scored = part(preference_models, bench, prepared)
        reports = scorer_reports(bench, scored.scorers)
        journal.scorers(reports, scored.scorers)
        journal.data(prepared, scored)
        alignment = part(align, bench, prepared, scored, journal)
        evaluation = part(evaluate, bench, prepared, scored, alignment)
        result = experiment_result(
            bench, journal, alignment.plan, reports, _outcome(prepared, scored, alignment, evaluation)
        )
        folder = report_folder(journal.key, bench.config.name)
        with written_whole(folder) as drafts:
            draw_figures(bench, result, alignment.plan, alignment.history, evaluation.test, drafts)
            write_samples(bench, prepared, evaluation.test, drafts)
            result["report_artifact"] = write_report(bench, result, drafts).model_dump()
            write_json(result, drafts / "result.json")
        chosen = (result["policy"] or {}).get("digest", "none")
        # A change of the code may give the same experiment another policy: each has a record of its own.
        record = f"results/{journal.key}-{chosen[:12]}"
        bench.put_record(record, result)
        used = [*bench.used(), (ArtifactRef(**result["report_artifact"]), "report")]
        facts = {name: result[name] for name in ("status", "ended_ms")} | {"result": record}
        enter_run(bench.store, "experiment", journal.key, bench.config.name, used, facts)
        journal.closed(result, folder)
        result["tracking"]["kept"] = journal.tracker.kept()
        result["report"] = str(folder)
    except BaseException:
        journal.failed()
        raise
    return result


def _outcome(prepared: Prepared, scored: Scored, alignment: Alignment, evaluation: Evaluation) -> Outcome:
    return Outcome(
        data=prepared.data,
        reference=prepared.reference,
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

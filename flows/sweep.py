"""The sweep: one experiment for each limit, sharing every stage that the limit does not enter.

    cdpo sweep configs/testbed.yaml --limits -1.2,-0.8,-0.5,-0.2

A parent with one child a limit; the frontier of reward over cost; and of the policies that are still
certified when the error probability is split over all limits, the most helpful one.
"""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, tags
from prefect.states import Completed, State
from pydantic import Field

from cdpo_core.config import ExperimentConfig
from cdpo_core.stages import Progress
from flows.experiment import experiment, make_prefect_home, sections
from flows.preflight import check_before_run
from flows.sections import takes_sections
from tasks.environment import RUN_TAG
from tasks.frontier import SweepJournal, choose_for_sweep, exact_frontier, frontier_points
from tasks.workbench import outcome, report_progress_to

Limits = Annotated[list[float], Field(min_length=1)]


@flow(name="sweep", flow_run_name="{name}", persist_result=False)
@takes_sections
def sweep(config: ExperimentConfig, limits: Limits) -> State[dict[str, Any]]:
    """One experiment for each limit of the first constraint, and the frontier they draw.

    Args:
        limits: of the first constraint, one experiment each (cost units).
    """
    result = _conduct(config, sorted(set(limits)))
    certified = sum(child["status"] == "certified" for child in result["children"])
    return Completed(message=f"{certified} of {len(result['children'])} limits certified", data=result)


def run_sweep(config: ExperimentConfig, limits: list[float], *, progress: Progress | None = None) -> dict[str, Any]:
    """Run a sweep here, in this process; returns {children, frontier, chosen, ...}."""
    if progress is not None:
        report_progress_to(progress)
    make_prefect_home()
    with tags(RUN_TAG):
        state = sweep(limits=limits, **sections(config), return_state=True)
    result: dict[str, Any] = outcome(state)
    return result


def with_limit(config: ExperimentConfig, limit: float, parent_run: str) -> ExperimentConfig:
    """The child's config: the first constraint's limit replaced, its MLflow parent named."""
    first, *others = config.constraints
    constraints = [first.model_copy(update={"limit": limit}), *others]
    model_name = config.tracking.model_name or f"cdpo-{config.name}"
    tracking = config.tracking.model_copy(update={"parent_run": parent_run, "model_name": model_name})
    name = f"{config.name}, {first.name} ≤ {limit:g}"
    return config.model_copy(update={"name": name, "constraints": constraints, "tracking": tracking})


def _conduct(config: ExperimentConfig, limits: list[float]) -> dict[str, Any]:
    check_before_run(config)
    journal = SweepJournal(config, limits)
    try:
        children = [
            outcome(experiment(**sections(with_limit(config, limit, journal.run_id)), return_state=True))
            for limit in limits
        ]
        result = {
            "name": config.name,
            "limits": limits,
            "children": children,
            "frontier": frontier_points(children),
            "exact_frontier": exact_frontier(children),
            "chosen": choose_for_sweep(journal.bench, children),
            "tracking": journal.record(),
        }
        result["report"] = str(journal.closed(result))
    except BaseException:
        journal.failed()
        raise
    return result

"""The sweep: one experiment for each limit, seed and setting, sharing every stage that these do not enter.

    cdpo sweep configs/testbed.yaml --limits -1.2,-0.8,-0.5,-0.2
    cdpo sweep configs/testbed.yaml --limits -0.8,-0.5 --seeds 0,1 --set dpo.beta=0.5,1 --at-once 4

A parent with one child for each combination and limit; the frontier of reward over cost; and of the policies that are
still certified when the error probability is split over all children, the most helpful one. Verdicts do not depend on
where, when or in which order the children run (`flows.children`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from prefect import flow, tags
from prefect.client.orchestration import get_client
from prefect.states import Completed, Failed, State
from pydantic import Field

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import CdpoError, InputError
from cdpo_core.evaluation.sweep_result import exact_frontier, frontier_points
from cdpo_core.stages import Progress
from flows.children import Child, Ended, Listener, children_of, run_here, run_on_workers
from flows.experiment import make_prefect_home, sections
from flows.grid import combinations
from flows.preflight import check_before_run
from flows.sections import takes_sections
from tasks.child_runs import WORKER_SECONDS, ChildRuns, deployed_with_workers, this_flow_run
from tasks.environment import RUN_TAG
from tasks.frontier import SweepJournal, choose_for_sweep
from tasks.prefect_patience import ends_when_there
from tasks.prefect_records import experiment_tag
from tasks.workbench import outcome, report_progress_to

log = logging.getLogger(__name__)

CHILD = "experiment/experiment"
"""The deployment that children are runs of."""

Limits = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]
Seeds = list[Annotated[int, Field(ge=0)]]
Place = Literal["auto", "here", "workers"]


class ChildrenFailed(CdpoError):
    """Some children have no result; the sweep's result says which, and holds what the others found."""

    result: dict[str, Any]

    @classmethod
    def of(cls, result: dict[str, Any]) -> ChildrenFailed:
        """The error that a sweep with failed children ends with."""
        failed = result["failed"]
        named = "; ".join(f"{item['name']} ({item['error'].splitlines()[0]})" for item in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        error = cls(
            f"{len(failed)} of {len(failed) + len(result['children'])} children failed: {named}{more}",
            fix="run the same command again, or retry the run: only what is missing is computed",
        )
        error.result = result
        return error


@flow(name="sweep", flow_run_name="{name}", persist_result=False)
@takes_sections
@ends_when_there
def sweep(
    config: ExperimentConfig,
    limits: Limits,
    seeds: Seeds = [],  # noqa: B006  Prefect's form shows the default, and a flow's parameters are copies
    vary: list[str] = [],  # noqa: B006
    at_once: Annotated[int, Field(ge=0)] = 0,
    run_on: Place = "auto",
) -> State[dict[str, Any]]:
    """One experiment for each limit of the first constraint (and each seed and setting), and the frontier they draw.

    Args:
        limits: Limits of the first constraint, one experiment each (cost units; at least one).
        seeds: Seeds of every random stream, each with all limits; none for the config's own. On the testbed they
            share one world; worlds are varied by `testbed.seed=0,1` in `vary`.
        vary: Further settings, each with all limits, as `section.field=value,value`; for example `dpo.beta=0.5,1`.
        at_once: Most experiments at once on workers; 0 is as many as the work pool takes. At least 0.
        run_on: Where the experiments run: `workers` (each a run of the deployment `experiment/experiment`), `here`
            (in this sweep's own process, one after another), or `auto`: on workers if the sweep itself runs on one.
    """
    found = combinations(config, seeds, vary)
    for item in found:
        check_before_run(item.config)
    limits = sorted(set(limits))
    journal = SweepJournal(config, limits, [item.settings for item in found])
    try:
        result = _conduct(journal, children_of(found, limits), limits, at_once, run_on)
        result["report"] = str(journal.closed(result))
    except BaseException:
        journal.failed()
        raise
    if result["failed"]:
        error = ChildrenFailed.of(result)
        return Failed(message=error.what, data=error)
    certified = sum(point["certified"] for point in result["frontier"])
    return Completed(message=f"{certified} of {len(result['children'])} policies certified", data=result)


def run_sweep(
    config: ExperimentConfig,
    limits: Sequence[float],
    seeds: Sequence[int] = (),
    vary: Sequence[str] = (),
    *,
    at_once: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a sweep from this process.

    Args:
        at_once: None runs the children in this process; a number runs so many at once on the workers of the Prefect
            server, 0 as many as they take.

    Returns:
        {name, limits, children, failed, frontier, exact_frontier, chosen, tracking, report}.

    Raises:
        ChildrenFailed: with the same record as its `result`.
    """
    if progress is not None:
        report_progress_to(progress)
    make_prefect_home()
    given = {"limits": list(limits), "seeds": list(seeds), "vary": list(vary), "at_once": at_once or 0}
    run_on = "here" if at_once is None else "workers"
    with tags(RUN_TAG):
        state = sweep(**given, run_on=run_on, **sections(config), return_state=True)
    result: dict[str, Any] = outcome(state)
    return result


def _conduct(
    journal: SweepJournal, children: list[Child], limits: list[float], at_once: int, run_on: Place
) -> dict[str, Any]:
    ended = _run(journal, children, at_once, run_on)
    found = [
        (item.child.config, {**item.result, "settings": dict(item.child.settings), "number": number})
        for number, item in enumerate(ended)
        if item.result is not None
    ]
    results = [result for _, result in found]
    return {
        "name": journal.config.name,
        "limits": limits,
        "children": results,
        "failed": [_failure(item) for item in ended if item.result is None],
        "frontier": frontier_points(results),
        "exact_frontier": exact_frontier(results),
        "chosen": choose_for_sweep(found, tested=len(children)),
        "tracking": journal.record(),
    }


def _failure(ended: Ended) -> dict[str, Any]:
    child = ended.child
    return {
        "name": child.config.name,
        "settings": dict(child.settings),
        "limit": child.limit,
        "error": ended.error,
    }


def _run(journal: SweepJournal, children: list[Child], at_once: int, run_on: Place) -> list[Ended]:
    """Run the children on workers or here; `auto` is on workers for a sweep that is itself a deployment's run."""
    parent = this_flow_run()
    is_deployed = parent.deployment_id is not None
    told = _listener(journal)
    if run_on == "here" or (run_on == "auto" and not is_deployed):
        return run_here(children, journal.run_id, told)
    with get_client(sync_client=True) as client:
        deployment, reason = deployed_with_workers(client, CHILD, WORKER_SECONDS if is_deployed else 0.0)
        if deployment is not None:
            runs = ChildRuns(client, deployment, parent, experiment_tag(journal.key))
            store = journal.bench.store
            progress = journal.bench.runtime(f"children of {journal.config.name}").progress
            return run_on_workers(
                children, journal.run_id, runs, store, at_once, told, progress, from_here=not is_deployed
            )
    if run_on == "workers":
        raise InputError(
            f"the children cannot run on workers: {reason}",
            where="--at-once",
            fix="start `cdpo up`, or a worker; or leave it out: the children then run in this process",
        )
    log.warning("the children run in the sweep's own process: %s", reason)
    return run_here(children, journal.run_id, told)


def _listener(journal: SweepJournal) -> Listener:
    """Tells the log and the tracker of each child that ends."""

    def told(one: Ended) -> None:
        name = one.child.config.name
        if one.result is None:
            log.error("%s failed: %s", name, one.error)
        else:
            log.info("%s: %s", name, one.result["status"].replace("_", " "))
            journal.child_ended({**one.result, "settings": one.child.settings})

    return told

"""The comparison: this method and its rivals on the same worlds, at the same limits, each with its best settings.

    cdpo compare testbed --limits tight,middle,loose --seeds 0,1,2

Every method starts from the same reference, scorers and splits, and aims at the same target below each limit. Methods
with a grid choose their settings on the selection prompts of the config's own seed at the middle limit. All stages are
shared and cached, so two processes may work on different seeds, and the same command continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np
from prefect import flow, tags
from prefect.states import Completed, State
from pydantic import Field

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import InputError
from cdpo_core.evaluation.comparison import comparison_table
from cdpo_core.methods import OURS, Method, load_methods
from cdpo_core.stages import Progress
from flows.experiment import make_prefect_home, sections
from flows.methods import Tuned, World, method_record, trained, tune
from flows.preflight import check_before_run
from flows.sections import takes_sections
from tasks.comparison import ComparisonJournal
from tasks.environment import RUN_TAG
from tasks.evaluation import limits_by_name
from tasks.metric_points import timestamp_ms
from tasks.prefect_patience import begun, ends_when_there
from tasks.uses import enter_run, noting_uses
from tasks.workbench import open_workbench, outcome, report_progress_to

Limits = Annotated[list[str], Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One limit on one world: the config that says so, and what the limit is called."""

    config: ExperimentConfig
    limit_name: str


@flow(name="compare", flow_run_name="compare {name}", persist_result=False)
@takes_sections
@ends_when_there
def compare(config: ExperimentConfig, limits: Limits, seeds: Seeds, methods: list[str]) -> State[dict[str, Any]]:
    """Methods side by side at each limit: reward over cost, intervals over seeds, and what each took.

    Args:
        limits: of the first constraint: numbers, or on the testbed tight, middle and loose.
        seeds: of the worlds and of every random stream; one comparison each, the table is over all of them.
        methods: names of methods under configs/methods; none for all of them.
    """
    chosen = load_methods(methods)
    seeds = sorted(set(seeds))
    identity: dict[str, Any] = {"limits": limits, "seeds": seeds, "methods": [method.name for method in chosen]}
    journal = ComparisonJournal(config, identity)
    try:
        with noting_uses() as used:
            result = _conduct(config, limits, seeds, chosen)
        facts = {"ended_ms": result["ended_ms"], "tracking": journal.record()}
        enter_run(journal.bench.store, "comparison", journal.key, config.name, used.values(), facts)
        ended = result.pop("ended_ms")
        result |= {"name": config.name, **identity, "tracking": journal.record()}
        result["report"] = str(journal.closed(result, ended))
    except BaseException:
        journal.failed()
        raise
    return Completed(message=f"{len(chosen)} methods, {len(limits)} limits, {len(seeds)} seeds", data=result)


def run_compare(
    config: ExperimentConfig,
    limits: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a comparison here, in this process; returns {records, table, settings, exact_frontier, ...}."""
    if progress is not None:
        report_progress_to(progress)
    make_prefect_home()
    given = {"limits": list(limits), "seeds": list(seeds), "methods": list(methods)}
    with tags(RUN_TAG):
        result: dict[str, Any] = outcome(compare(**given, **sections(config), return_state=True))
    return result


def _conduct(
    config: ExperimentConfig, limits: Sequence[str], seeds: Sequence[int], methods: Sequence[Method]
) -> dict[str, Any]:
    # A comparison tests nothing on the certificate's prompts, so it draws no share of δ: all plan the same margin.
    certificate = config.certificate.model_copy(update={"spending": "none"})
    config = config.model_copy(update={"certificate": certificate})
    check_before_run(config)
    settings = _settings(config, limits, methods)
    records = []
    for seed in seeds:
        names = [method.name for method in methods]
        records += begun(partial(one_world, config, seed, list(limits), names, settings))
    return {
        "records": records,
        "table": comparison_table(records, OURS),
        "settings": {name: found.record() for name, found in settings.items()},
        "exact_frontier": _mean_frontier(records),
        "ended_ms": max(record.pop("ended_ms") for record in records),
    }


def _settings(config: ExperimentConfig, limits: Sequence[str], methods: Sequence[Method]) -> dict[str, Tuned]:
    """Each method's settings, chosen on the world of the config's own seed at the middle limit."""
    own = _on_world(config, config.seed)
    if not any(method.grid or method.step_grid for method in methods):
        return {method.name: Tuned({}, []) for method in methods}
    world = World.of(own)
    cells = _cells(own, world, limits)
    middle = cells[len(cells) // 2].config
    return {method.name: tune(world, middle, method) for method in methods}


@flow(name="compare-world", flow_run_name="seed {seed}", validate_parameters=False)
def one_world(
    config: ExperimentConfig, seed: int, limits: list[str], names: list[str], settings: Mapping[str, Tuned]
) -> list[dict[str, Any]]:
    """Every method at every limit on the world of one seed."""
    own = _on_world(config, seed)
    world = World.of(own)
    records = []
    for cell in _cells(own, world, limits):
        for method in load_methods(names):
            tuned = settings[method.name]
            run = trained(world, cell.config, method, tuned.settings)
            record = method_record(world, run, method, tuned)
            limit = cell.config.constraints[0].limit
            ended = max(timestamp_ms(done.created) for done in run.bench.results)
            records.append({"limit_name": cell.limit_name, "limit": limit, **record, "ended_ms": ended})
    return records


def _on_world(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The config with this seed, of the testbed's world too."""
    testbed = config.testbed.model_copy(update={"seed": seed}) if config.on_testbed else config.testbed
    return config.model_copy(update={"seed": seed, "testbed": testbed})


def _cells(config: ExperimentConfig, world: World, limits: Sequence[str]) -> list[Cell]:
    """The config at each limit; a number is the first constraint's, a name gives every constraint its own."""
    named: Mapping[str, Sequence[float]] = {}
    if config.on_testbed and not all(map(_is_number, limits)):
        named = limits_by_name(open_workbench(config), world.prepared)
    cells = []
    for limit in limits:
        if not _is_number(limit) and limit not in named:
            known = ", ".join(["numbers", *named])
            raise InputError(f"{limit!r} is no limit here", where="--limits", fix=f"give {known}")
        values = [float(limit)] if _is_number(limit) else named[limit]
        constraints = [
            item.model_copy(update={"limit": values[at]}) if at < len(values) else item
            for at, item in enumerate(config.constraints)
        ]
        cells.append(Cell(config.model_copy(update={"constraints": constraints}), limit))
    return cells


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _mean_frontier(records: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[cost, reward] of the exact optimum along the limits, averaged over the worlds; [] where no truth is known."""
    first = {record["seed"]: record["oracle"]["frontier"] for record in records if record["oracle"].get("frontier")}
    if not first:
        return []
    points = np.array([[[point["cost"], point["reward"]] for point in frontier] for frontier in first.values()])
    mean: list[list[float]] = sorted(points.mean(0).tolist())
    return mean

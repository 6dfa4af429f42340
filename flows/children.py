"""The children of a sweep: what they are, and running them, here or on the workers of a Prefect server.

No child starts from another's policy, and none reads how another ended: what a child finds depends on its own config
alone, and the order in which children run and finish changes what is computed by whom and nothing else. What is the
same for several children (data, reference policy, scorers, samples, a round at a λ already trained) comes from the
store. A child therefore starts when those that it can share with have ended: first one alone, then all that differ
from it in one thing, and so on; so nothing that is shared is computed by two at once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from cdpo_core.artifacts import Store
from cdpo_core.config import ExperimentConfig
from cdpo_core.models.checkpoints import is_local
from cdpo_core.stages import Progress
from flows.experiment import experiment, sections
from flows.grid import Combination, words
from tasks.child_runs import POLL_SECONDS, ChildRuns
from tasks.external import RESERVED_BASES
from tasks.ledger import family_key
from tasks.prefect_patience import begun
from tasks.result import outcome_name
from tasks.tracking import experiment_key
from tasks.workbench import open_workbench, outcome, store_of

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger(__name__)

LONGEST_NAME = 100


@dataclass(frozen=True)
class Child:
    """One experiment of a sweep.

    Attributes:
        place: its position on each axis of the sweep, the limit's last; all 0 for the first child.
        settings: what it varies besides the limit, by dotted path.
        limit: of the first constraint.
        config: the whole experiment, but for its MLflow parent.
        identity: the experiment's key, which its runs are known by.
    """

    place: tuple[int, ...]
    settings: Mapping[str, Any]
    limit: float
    config: ExperimentConfig
    identity: str

    def shares_with(self) -> set[tuple[int, ...]]:
        """The places that differ from this one in being first on one more axis.

        A stage depends on some of the axes. The child that has this one's place on those axes and is first on the
        others computes it; it is this one, or comes before it in the order these sets make.
        """
        return {(*self.place[:at], 0, *self.place[at + 1 :]) for at, value in enumerate(self.place) if value}

    def below(self, parent_run: str) -> ExperimentConfig:
        """The config with the sweep's MLflow run named."""
        return self.config.model_copy(
            update={"tracking": self.config.tracking.model_copy(update={"parent_run": parent_run})}
        )


@dataclass(frozen=True)
class Ended:
    """How a child ended: its result record, or why there is none."""

    child: Child
    result: dict[str, Any] | None
    error: str = ""


Listener = Callable[[Ended], None]


def children_of(combinations: Sequence[Combination], limits: Sequence[float]) -> list[Child]:
    """One child for each combination and limit; the first can share with all others.

    All of them are one family of tests, which has one share of δ (`tasks.ledger`) and is known by its whole grid.
    """
    grid = [
        (item, at, with_limit(item.config, limit, item.settings), inputs)
        for item in combinations
        for inputs in [open_workbench(item.config).external_digests()]
        for at, limit in enumerate(limits)
    ]
    family = family_key((alone, inputs) for _, _, alone, inputs in grid)
    children = []
    for item, at, alone, inputs in grid:
        config = in_family(alone, family, len(grid))
        children.append(Child((*item.place, at), item.settings, limits[at], config, experiment_key(config, inputs)))
    return children


def in_family(config: ExperimentConfig, family: str, tests: int) -> ExperimentConfig:
    """A child's config with its part in the sweep's share of δ; as it is when nothing is spent, or nobody shares."""
    if tests == 1 or config.certificate.spending == "none":
        return config
    certificate = config.certificate.model_copy(update={"family": family, "family_tests": tests})
    return config.model_copy(update={"certificate": certificate})


def with_limit(config: ExperimentConfig, limit: float, settings: Mapping[str, Any]) -> ExperimentConfig:
    """A child's config: the first constraint's limit replaced, and a name that says what it varies."""
    first, *others = config.constraints
    constraints = [first.model_copy(update={"limit": limit}), *others]
    varied = ", ".join(filter(None, ["", words(settings), f"{first.name} ≤ {limit:g}"]))
    name = (config.name[: max(1, LONGEST_NAME - len(varied) - 2)] + ", " + varied)[:LONGEST_NAME]
    model_name = config.tracking.model_name or f"cdpo-{config.name}"
    tracking = config.tracking.model_copy(update={"model_name": model_name})
    return config.model_copy(update={"name": name, "constraints": constraints, "tracking": tracking})


def run_here(children: Sequence[Child], parent_run: str, told: Listener) -> list[Ended]:
    """Run the children in this process, one after another; one that fails is listed and the others go on."""
    found = []
    for child in children:
        state = begun(partial(experiment, **sections(child.below(parent_run)), return_state=True))
        try:
            ended = Ended(child, outcome(state))
        except Exception as error:  # whatever a child dies of, the others are sound
            ended = Ended(child, None, str(error) or type(error).__name__)
        told(ended)
        found.append(ended)
    return found


def run_on_workers(
    children: Sequence[Child],
    parent_run: str,
    runs: ChildRuns,
    store: Store,
    at_once: int,
    told: Listener,
    progress: Progress,
    *,
    from_here: bool = False,
) -> list[Ended]:
    """Run the children as runs of a deployment, several at once; one that fails is listed and the others go on.

    A child whose run completed before is not run again, and one whose run ended otherwise before this attempt of the
    sweep is started again. When the sweep is cancelled so are the children that have not ended; when it dies of
    anything else they go on, and are found again by the sweep's next attempt.

    Args:
        parent_run: the sweep's MLflow run.
        runs: where the children run.
        store: where they write their result records.
        at_once: most children at once; 0 is no limit but the work pool's.
        told: called with each child as it ends.
        progress: called with how many of the children have ended.
        from_here: the sweep runs on this machine, so paths are meant from its working folder.
    """
    waiting, ended = list(children), dict[tuple[int, ...], Ended]()
    watch = _Watch(runs, store)
    progress("", 0, len(children))
    try:
        while waiting or watch.running:
            free = (at_once or len(children)) - len(watch.running)
            ready = [child for child in waiting if child.shares_with() <= ended.keys()]
            for child in ready[:free]:
                config = child.below(parent_run)
                watch.start(child, _seen_from_here(config) if from_here else config)
                waiting.remove(child)
            for found in watch.newly_ended():
                ended[found.child.place] = found
                told(found)
                progress("", len(ended), len(children))
            if watch.running:
                time.sleep(POLL_SECONDS)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or runs.parent_is_cancelled():
            runs.cancel(watch.running)
        raise
    return [ended[child.place] for child in children]


class _Watch:
    """The children that run now; each is started at most once in this attempt of the sweep."""

    def __init__(self, runs: ChildRuns, store: Store) -> None:
        self.running: dict[UUID, Child] = {}
        self._runs, self._store = runs, store
        self._started: set[UUID] = set()

    def start(self, child: Child, config: ExperimentConfig) -> None:
        run, is_new = self._runs.start(child.identity, config.name, config.model_dump(mode="json"))
        self.running[run.id] = child
        if is_new:
            self._started.add(run.id)
        log.info("%s: %s", config.name, "started" if is_new else "found again")

    def newly_ended(self) -> list[Ended]:
        now = self._runs.read(self.running)
        found = []
        for run_id, child in list(self.running.items()):
            ended = self._ended(child, run_id, now.get(run_id))
            if ended is None:
                continue
            if ended.result is None and run_id in now and run_id not in self._started:
                self._runs.restart(run_id)
                self._started.add(run_id)
                log.info("%s: started again", child.config.name)
                continue
            del self.running[run_id]
            found.append(ended)
        return found

    def _ended(self, child: Child, run_id: UUID, run: FlowRun | None) -> Ended | None:
        """How the child ended; None while it has not."""
        if run is None:
            return Ended(child, None, "its flow run was deleted")
        if run.state is None or not run.state.is_final():
            return None
        if not run.state.is_completed():
            return Ended(child, None, f"{run.state.name}: {run.state.message or 'no reason given'}")
        result = self._store.get_record(outcome_name(str(run_id)))
        if result is None:
            return Ended(child, None, f"it completed, but its result is not in the sweep's store ({self._store.uri})")
        return Ended(child, result)


def _seen_from_here(config: ExperimentConfig) -> ExperimentConfig:
    """The config with absolute paths: a worker on this machine may start runs in another folder."""

    def absolute(text: str) -> str:
        return os.path.abspath(os.path.expanduser(text)) if Path(text).expanduser().exists() else text

    def based(section: Any) -> Any:
        is_path = section.base not in (*RESERVED_BASES, "reward") and is_local(section.base)
        return section.model_copy(update={"base": absolute(section.base)}) if is_path else section

    source = config.data.source if config.on_testbed else absolute(config.data.source)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": source}),
            "policy": based(config.policy),
            "reward": based(config.reward),
            "constraints": [based(item) for item in config.constraints],
            "store": config.store.model_copy(update={"uri": store_of(config).uri}),
        }
    )

"""What every task works with: the config, the store, the scratch folder and the machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TagsContext
from prefect.states import Completed, State

from cdpo_core.artifacts import ArtifactRef, Manifest, Store
from cdpo_core.config import ExperimentConfig
from cdpo_core.pipeline import machine_fields
from cdpo_core.provenance import by_machine
from cdpo_core.stages import (
    Progress,
    Runtime,
    Slice,
    Stage,
    StageResult,
    compute_stage,
    manifest_of,
    resolve,
    slice_of,
)
from tasks.environment import cdpo_home, default_store
from tasks.external import RESERVED_BASES, external_model, number_format
from tasks.prefect_records import ProgressArtifacts
from tasks.sources import source_ref
from tasks.storage import open_store
from tasks.uses import note_use, with_whole

log = logging.getLogger(__name__)

# Where nobody listens in a terminal, progress is shown in the Prefect UI.
_progress: Progress = ProgressArtifacts()


def report_progress_to(progress: Progress) -> None:
    """Send the progress of every later stage of this process to `progress(what, done, total)`."""
    global _progress
    _progress = progress


def outcome(state: Any) -> Any:
    """What a finished task or flow returned; raises what it raised."""
    return state.result()


@dataclass(frozen=True)
class Done:
    """One use of a stage, as the result lists it; `ref` is what it made, None where only planned."""

    label: str
    cached: bool
    seconds: float
    created: str
    ref: ArtifactRef | None = None


@dataclass
class Workbench:
    """One experiment's tools.

    Attributes:
        results: what each stage did, in order.
        uses_drawn: what the experiment has drawn from the ledger (`tasks.ledger`).
        enters: whether tests are entered there; a plan only looks.
    """

    config: ExperimentConfig
    store: Store
    scratch_root: Path
    results: list[Done] = field(default_factory=list)
    externals: dict[str, str] | None = None
    uses_drawn: dict[str, Any] = field(default_factory=dict)
    enters: ClassVar[bool] = True
    formats: dict[str, str] | None = None

    def run(self, stage: Stage, inputs: Mapping[str, ArtifactRef], label: str = "", **extra: Any) -> ArtifactRef:
        """Run one stage as a Prefect task, which shows as `Cached` when the store has it already.

        Args:
            stage: the stage.
            inputs: the artifacts it reads, by the names it knows them by.
            label: what the UIs and the progress call this use of the stage; the stage's name if "".
            extra: slice values that are no config field (lambda, split).
        """
        label = label or stage.name
        as_task = _stage_task.with_options(name=label, task_run_name=label)

        def make() -> StageResult:
            # Of a task with tags Prefect asks the server for the limits of each, which a server on SQLite that is
            # just writing the task before answers with 503: two seconds until the next try.
            with TagsContext():
                result: StageResult = outcome(as_task(self, stage, dict(inputs), label, extra, return_state=True))
            return result

        result = with_whole(inputs.values(), make)
        note_use(result.ref, label, inputs.values(), make)
        self.results.append(Done(label, result.cached, result.seconds, result.created, result.ref))
        return result.ref

    def with_setting(self, section: str, **values: Any) -> Self:
        """The same workbench, its list of results too, with other values in one section of the config."""
        changed = getattr(self.config, section).model_copy(update=values)
        return replace(self, config=self.config.model_copy(update={section: changed}))

    def slice_of(self, stage: Stage, extra: Mapping[str, Any]) -> Slice:
        """What a stage receives. Args: stage; extra, values that are no config field."""
        machine = machine_fields(stage, self.number_formats(), self.runtime("", stage))
        return slice_of(stage, self.config, **extra, **machine)

    def number_formats(self) -> dict[str, str]:
        """The number formats that the policy and the scorers compute in; several are joined by commas."""
        if self.formats is None:
            config, own = self.config, self.config.policy.dtype
            bases = [(config.reward.base, config.reward.revision)]
            bases += [(item.base, item.revision) for item in config.constraints if item.base != "reward"]
            found = {own if base in RESERVED_BASES else number_format(base, revision) for base, revision in bases}
            self.formats = {"policy": own, "scorers": ", ".join(sorted(found))}
        return self.formats

    def runtime(self, label: str, stage: Stage | None = None) -> Runtime:
        """The machine as configured, for a stage; progress is reported under the label."""
        compute, formats = self.config.compute, self.number_formats() if stage else {}
        report = _progress

        def progress(what: str, done: int, total: int) -> None:
            report(label, done, total)

        return Runtime(
            compute.device,
            compute.threads,
            compute.micro_batch,
            None,
            progress,
            compute.own_process,
            dtype=", ".join(sorted({formats[name] for name in stage.models} if stage else ())),
        )

    def put_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Keep a small record in the store under this name, unless there is one."""
        self.store.put_record(name, dict(record))

    def external_digests(self) -> dict[str, str]:
        """Digests of the external inputs by name, which with the config make the experiment's identity."""
        if self.externals is None:
            config = self.config
            bases = {"policy": (config.policy.base, config.policy.revision)}
            bases["reward"] = config.reward.base, config.reward.revision
            bases |= {f"constraints.{i}": (item.base, item.revision) for i, item in enumerate(config.constraints)}
            self.externals = {
                f"{name}.base": external_model(base, revision).digest
                for name, (base, revision) in bases.items()
                if base not in (*RESERVED_BASES, "reward")
            }
            if not config.on_testbed:
                self.externals["data.source"] = source_ref(config.data).digest
        return self.externals

    @property
    def names(self) -> list[str]:
        """The constraints' names, in order."""
        return [item.name for item in self.config.constraints]

    def folder(self, ref: ArtifactRef) -> Path:
        """The artifact's files, verified; what is gone is made again."""
        return with_whole([ref], lambda: resolve(ref, self.store))

    def table(self, ref: ArtifactRef, name: str) -> pd.DataFrame:
        """One table of an artifact."""
        return pd.read_parquet(self.folder(ref) / f"{name}.parquet")

    def seconds(self, ref: ArtifactRef) -> float:
        """How long the artifact took to compute, whenever that was."""
        return self._manifest(ref).seconds

    def cpu_seconds(self, ref: ArtifactRef) -> float:
        """How much processor time the artifact took to compute, whenever that was."""
        return self._manifest(ref).cpu_seconds

    def created(self, ref: ArtifactRef) -> str:
        """When the artifact was computed (UTC, ISO 8601)."""
        return self._manifest(ref).created

    def used(self) -> list[tuple[ArtifactRef, str]]:
        """All that was made or found so far, with what it was called; what is gone since is made again."""
        used = [(done.ref, done.label) for done in self.results if done.ref is not None]
        for ref, _ in used:
            self._manifest(ref)
        return used

    def machines(self) -> list[dict[str, Any]]:
        """What computed the artifacts that this run used: {versions, device, ..., stages} of each machine."""
        return by_machine([(done.label, self._manifest(done.ref)) for done in self.results if done.ref is not None])

    def _manifest(self, ref: ArtifactRef) -> Manifest:
        return with_whole([ref], lambda: manifest_of(ref, self.store))


@task(cache_policy=NO_CACHE, persist_result=False)
def _stage_task(
    bench: Workbench, stage: Stage, inputs: Mapping[str, ArtifactRef], label: str, extra: dict[str, Any]
) -> State:
    slice_ = bench.slice_of(stage, extra)
    result = compute_stage(stage, slice_, inputs, bench.store, bench.runtime(label, stage), bench.scratch_root)
    _progress(label, 1, 1)
    log.info("%s: %s in %.1f s", label, "cached" if result.cached else "computed", result.seconds)
    return Completed(name="Cached" if result.cached else "Completed", data=result)


@lru_cache(maxsize=16)
def _store_at(uri: str) -> Store:
    return open_store(uri)


def store_of(config: ExperimentConfig) -> Store:
    """The experiment's store; one object for each address and process."""
    return _store_at(config.store.uri or default_store())


def open_workbench(config: ExperimentConfig) -> Workbench:
    """The workbench of one experiment."""
    return Workbench(config, store_of(config), cdpo_home() / "scratch")

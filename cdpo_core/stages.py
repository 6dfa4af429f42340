"""One rule for caching, resume and shared work: a stage whose artifact exists is skipped.

A stage is a pure function of (its slice of the config, the artifacts it reads). Its key hashes
exactly those and the code that computes it, so nothing else implements caching a second time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cdpo_core.artifacts import ArtifactRef, Manifest, Store, files_digest, folder_files
from cdpo_core.code_version import code_version
from cdpo_core.errors import CorruptArtifact
from cdpo_core.outside import Watched, unchanged
from cdpo_core.provenance import machine_record, others_before
from cdpo_core.scratch import held_folder
from cdpo_core.stage_process import compute_apart

log = logging.getLogger(__name__)

_AGAIN = "run the same command again: it is computed again, what is whole is kept"
CALLER = "cdpo_core.machine"

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Runtime:
    """The machine a stage runs on: in no key, so it changes speed and, in float32, no more than rounding.

    Attributes:
        device: `cpu`, `cuda`, or `auto` for the best there is.
        threads: of the processor; 0 takes all cores.
        micro_batch: sequences in one forward pass; 0 lets the stage choose.
        scratch: where checkpoints and finished chunks lie.
        progress: hears (what, done, total).
        own_process: whether each stage computes in a process of its own.
        dtype: the number format of the models a stage computes with, "" without; what it computes in, its models say:
            this is for the record.
    """

    device: str = "cpu"
    threads: int = 0
    micro_batch: int = 0
    scratch: Path | None = None
    progress: Progress = no_progress
    own_process: bool = False
    dtype: str = ""


class Slice:
    """The picked fields of a config, readable by dotted attribute; anything else is an error."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getattr__(self, name: str) -> Any:
        try:
            value = self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"field {name!r} is not in this stage's slice") from None
        return Slice(value) if isinstance(value, dict) else value

    def as_dict(self) -> dict[str, Any]:
        """The picked values as plain nested dicts."""
        return self._values


def pick(config: BaseModel, fields: tuple[str, ...], **extra: Any) -> Slice:
    """The slice of `config` named by dotted paths, plus values that are no config field (lambda)."""
    values: dict[str, Any] = {}
    for path in fields:
        source: Any = config
        *sections, last = path.split(".")
        target = values
        for name in sections:
            source = getattr(source, name)
            target = target.setdefault(name, {})
        target[last] = _plain(getattr(source, last))
    return Slice({**values, **extra})


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Applies:
    """Fields that act only under a condition; where it does not hold, a stage receives none of them.

    Attributes:
        fields: dotted paths, of config fields or of values that are given beside them.
        when: of the slice with all fields.
    """

    fields: tuple[str, ...]
    when: Callable[[Slice], bool]


Compute = Callable[[Slice, Mapping[str, Path], Path, Runtime], None]


@dataclass(frozen=True)
class Stage:
    """A named pure function and the config fields it receives.

    Attributes:
        name: the stage's name in keys, stores and reports.
        kind: what its artifact is (policy, scorers, responses, ...).
        compute: (slice, inputs by name, empty output folder, runtime) -> None; writes files.
        fields: dotted config paths that form its slice.
        applies: which of them, and of the values given beside them, are left out when they would not act.
        models: whose number format it computes in: `policy`, `scorers`, both or none.
    """

    name: str
    kind: str
    compute: Compute
    fields: tuple[str, ...] = ()
    applies: tuple[Applies, ...] = ()
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageResult:
    """One stage's outcome: where its artifact is and whether it had to be computed."""

    stage: str
    ref: ArtifactRef
    key: str
    cached: bool
    seconds: float
    created: str = field(default="", compare=False)


def slice_of(stage: Stage, config: BaseModel, **extra: Any) -> Slice:
    """What a stage receives: its fields of `config` and values that are no config field, as far as they act."""
    whole = pick(config, stage.fields, **extra)
    idle = {path for rule in stage.applies if not rule.when(whole) for path in rule.fields}
    return pick(
        config,
        tuple(path for path in stage.fields if path not in idle),
        **{name: value for name, value in extra.items() if name not in idle},
    )


def stage_key(stage: Stage, slice_: Slice, inputs: Mapping[str, ArtifactRef]) -> str:
    """sha256(stage, config slice, input digests, code version), hex.

    Raises:
        ValueError: the slice holds a number that is not finite.
    """
    parts = {
        "stage": stage.name,
        "slice": slice_.as_dict(),
        "inputs": {name: ref.digest for name, ref in inputs.items()},
        "code": stage_code(stage),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def stage_code(stage: Stage) -> str:
    """Version of the function and of how it is called, which no stage's module imports."""
    return hashlib.sha256(f"{code_version(stage.compute.__module__)} {code_version(CALLER)}".encode()).hexdigest()


def resolve(ref: ArtifactRef, store: Store) -> Path:
    """A local path with the artifact's content, verified; external input is its own path.

    Raises:
        CorruptArtifact: the artifact is gone or corrupt; a corrupt one has been set aside, so that
            the same command computes it again.
        InputError: external input has changed since it was referred to.
    """
    if ref.kind == "external":
        return unchanged(ref)
    manifest = manifest_of(ref, store)
    try:
        return store.fetch(manifest)
    except CorruptArtifact as error:
        store.set_aside(manifest)
        log.warning("%s: set aside (%s)", error.what, error.where)
        raise CorruptArtifact(f"{error.what}; it was set aside", where=error.where, fix=_AGAIN) from error


def manifest_of(ref: ArtifactRef, store: Store) -> Manifest:
    """The manifest a reference points at.

    Raises:
        CorruptArtifact: the store no longer holds it, or holds another content under its key.
    """
    stage, key = ref.uri.removesuffix(".json").split("/")[-2:]
    manifest = store.find(stage, key)
    if manifest is None:
        raise CorruptArtifact("an artifact that a stage needs is gone", where=ref.uri, fix=_AGAIN)
    if manifest.digest != ref.digest:
        raise CorruptArtifact("an artifact that a stage needs was computed anew meanwhile", where=ref.uri, fix=_AGAIN)
    return manifest


def reference_to(manifest: Manifest, store: Store) -> ArtifactRef:
    """The reference that points at a stored manifest."""
    uri = f"{store.uri.rstrip('/')}/stages/{manifest.stage}/{manifest.key}.json"
    return ArtifactRef(uri=uri, digest=manifest.digest, kind=manifest.kind)


def compute_stage(
    stage: Stage, slice_: Slice, inputs: Mapping[str, ArtifactRef], store: Store, runtime: Runtime, scratch_root: Path
) -> StageResult:
    """Skip the stage if its artifact exists and is whole, else compute and publish it.

    The stage's checkpoints live in `scratch_root/<key>`, which is removed once it is published and
    kept after a failure. Of two processes that share a scratch root the second waits and finds the
    first one's artifact; of two that do not, both compute, and the later one adopts the other's.
    """
    started = time.monotonic()
    key = stage_key(stage, slice_, inputs)
    manifest = _whole(store, stage.name, key)
    cached = manifest is not None
    # Whoever was killed between publishing and removing its scratch folder leaves it to the next.
    if manifest is None or (scratch_root / key).exists():
        with held_folder(scratch_root / key, stage.name) as scratch:
            manifest = _whole(store, stage.name, key)
            cached = manifest is not None
            if manifest is None:
                manifest = _compute(
                    stage, slice_, inputs, key, store, replace(runtime, scratch=scratch), scratch / "out"
                )
            shutil.rmtree(scratch, ignore_errors=True)
    return StageResult(
        stage.name, reference_to(manifest, store), key, cached, time.monotonic() - started, manifest.created
    )


def _whole(store: Store, stage: str, key: str) -> Manifest | None:
    manifest = store.find(stage, key)
    if manifest is None:
        return None
    try:
        store.check(manifest)
    except CorruptArtifact as error:
        log.warning("%s: set aside, %s is computed again (%s)", error.what, stage, error.where)
        store.set_aside(manifest)
        return None
    return manifest


def _compute(
    stage: Stage,
    slice_: Slice,
    inputs: Mapping[str, ArtifactRef],
    key: str,
    store: Store,
    runtime: Runtime,
    out: Path,
) -> Manifest:
    outside = Watched(inputs.values())
    paths = {name: resolve(ref, store) for name, ref in inputs.items()}
    shutil.rmtree(out, ignore_errors=True)  # what a killed process left
    out.mkdir()
    started, cpu_started = time.monotonic(), time.process_time()
    assert runtime.scratch is not None
    machine = machine_record(runtime)
    earlier = others_before(runtime.scratch, machine)
    try:
        runtime.progress(stage.name, 0, 1)
        apart = 0.0
        if runtime.own_process:
            apart = compute_apart(stage.compute, slice_, paths, out, runtime, stage.name)
        else:
            stage.compute(slice_, paths, out, runtime)
        outside.check()
        files = folder_files(out)
        return store.publish(
            out,
            Manifest(
                stage=stage.name,
                key=key,
                kind=stage.kind,
                digest=files_digest(files),
                files=files,
                slice=slice_.as_dict(),
                inputs={name: ref.digest for name, ref in inputs.items()},
                code=stage_code(stage),
                created=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=round(time.monotonic() - started, 3),
                cpu_seconds=round(time.process_time() - cpu_started + apart, 3),
                host=platform.node(),
                versions=machine.pop("versions"),
                machine=machine,
                earlier=earlier,
            ),
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)

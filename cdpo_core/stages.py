"""One rule for caching, resume and shared work: a stage whose artifact exists is skipped.

A stage is a pure function of (its slice of the config, the artifacts it reads). Its key hashes
exactly those and the code that computes it, so nothing else implements caching a second time.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cdpo_core.artifacts import ArtifactRef, Manifest, Store, files_digest, folder_files
from cdpo_core.errors import CorruptArtifact

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Runtime:
    """The machine a stage runs on: in no key, so it may change speed but never the result's meaning."""

    device: str = "cpu"
    threads: int = 0
    micro_batch: int = 0
    scratch: Path | None = None
    progress: Progress = no_progress


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
        value = getattr(source, last)
        target[last] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return Slice({**values, **extra})


Compute = Callable[[Slice, Mapping[str, Path], Path, Runtime], None]


@dataclass(frozen=True)
class Stage:
    """A named pure function and the config fields it receives.

    Attributes:
        name: the stage's name in keys, stores and reports.
        kind: what its artifact is (policy, scorers, responses, ...).
        compute: (slice, inputs by name, empty output folder, runtime) -> None; writes files.
        fields: dotted config paths that form its slice.
    """

    name: str
    kind: str
    compute: Compute
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageResult:
    """One stage's outcome: where its artifact is and whether it had to be computed."""

    stage: str
    ref: ArtifactRef
    key: str
    cached: bool
    seconds: float
    created: str = field(default="", compare=False)


def stage_key(stage: Stage, slice_: Slice, inputs: Mapping[str, ArtifactRef]) -> str:
    """sha256(stage, config slice, input digests, code version), hex."""
    parts = {
        "stage": stage.name,
        "slice": slice_.as_dict(),
        "inputs": {name: ref.digest for name, ref in inputs.items()},
        "code": code_version(stage.compute.__module__),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def resolve(ref: ArtifactRef, store: Store) -> Path:
    """A local path with the artifact's content, verified; external input is its own path."""
    if ref.kind == "external":
        return Path(ref.uri)
    return store.fetch(manifest_of(ref, store))


def manifest_of(ref: ArtifactRef, store: Store) -> Manifest:
    """The manifest a reference points at.

    Raises:
        CorruptArtifact: the store no longer holds it.
    """
    stage, key = ref.uri.removesuffix(".json").split("/")[-2:]
    manifest = store.find(stage, key)
    if manifest is None:
        raise CorruptArtifact("an artifact that a stage needs is gone", where=ref.uri, fix="run the same command again")
    return manifest


def reference_to(manifest: Manifest, store: Store) -> ArtifactRef:
    """The reference that points at a stored manifest."""
    uri = f"{store.uri.rstrip('/')}/stages/{manifest.stage}/{manifest.key}.json"
    return ArtifactRef(uri=uri, digest=manifest.digest, kind=manifest.kind)


def compute_stage(
    stage: Stage, slice_: Slice, inputs: Mapping[str, ArtifactRef], store: Store, runtime: Runtime, scratch_root: Path
) -> StageResult:
    """Skip the stage if its artifact exists and is whole, else compute and publish it.

    The stage's checkpoints live in `scratch_root/<key>`, which is removed once it is published.
    """
    started = time.monotonic()
    key = stage_key(stage, slice_, inputs)
    manifest = _whole(store, stage.name, key)
    cached = manifest is not None
    if manifest is None:
        manifest = _compute(stage, slice_, inputs, key, store, runtime, scratch_root)
    return StageResult(
        stage.name, reference_to(manifest, store), key, cached, time.monotonic() - started, manifest.created
    )


def _whole(store: Store, stage: str, key: str) -> Manifest | None:
    manifest = store.find(stage, key)
    if manifest is None:
        return None
    try:
        store.fetch(manifest)
    except CorruptArtifact as error:
        log.warning("%s is corrupt, set aside and computed again: %s", stage, error.what)
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
    scratch_root: Path,
) -> Manifest:
    scratch = scratch_root / key
    scratch.mkdir(parents=True, exist_ok=True)
    paths = {name: resolve(ref, store) for name, ref in inputs.items()}
    with tempfile.TemporaryDirectory(prefix="out-", dir=scratch) as folder:
        out = Path(folder)
        started = time.monotonic()
        on_machine = Runtime(runtime.device, runtime.threads, runtime.micro_batch, scratch, runtime.progress)
        stage.compute(slice_, paths, out, on_machine)
        files = folder_files(out)
        manifest = store.publish(
            out,
            Manifest(
                stage=stage.name,
                key=key,
                kind=stage.kind,
                digest=files_digest(files),
                files=files,
                slice=slice_.as_dict(),
                inputs={name: ref.digest for name, ref in inputs.items()},
                code=code_version(stage.compute.__module__),
                created=datetime.now(UTC).isoformat(timespec="milliseconds"),
                seconds=round(time.monotonic() - started, 3),
                host=platform.node(),
                versions=library_versions(),
            ),
        )
    shutil.rmtree(scratch, ignore_errors=True)
    return manifest


@cache
def library_versions() -> dict[str, str]:
    """Versions of what computes: for the manifest and the report, never in a key."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


@cache
def code_version(module: str) -> str:
    """Hash of the syntax trees of a module and of every cdpo_core module it imports, transitively.

    Comments and docstrings do not count; imports under TYPE_CHECKING do not count.
    """
    trees: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in trees:
            continue
        tree = _bare_tree(_module_file(name))
        trees[name] = ast.dump(tree)
        pending.extend(_core_imports(tree))
    return hashlib.sha256(json.dumps(sorted(trees.items())).encode()).hexdigest()


def _module_file(name: str) -> Path:
    module = sys.modules.get(name)
    origin = getattr(module, "__file__", None)
    if origin is None:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
    if origin is None:
        raise ModuleNotFoundError(name)
    return Path(origin)


def _bare_tree(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        node.body = [child for child in body if not _is_docstring(child) and not _is_type_checking(child)]  # type: ignore[attr-defined]
    return tree


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _core_imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    core = {name for name in names if name.split(".")[0] == "cdpo_core"}
    return {name for name in core if _is_module(name)}


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

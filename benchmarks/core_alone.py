"""The stages of a finished run once more, by `cdpo_core` alone: no Prefect, no MLflow, no artifact store.

    python benchmarks/core_alone.py STORE FOLDER THREADS

Reads what was computed from the manifests of STORE, computes all of it anew, each stage into a folder of its own below
FOLDER, and checks that the bytes are the same. `benchmarks/orchestration.py` times it against `cdpo run`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdpo_core import pipeline
from cdpo_core.artifacts import Manifest, files_digest, folder_files
from cdpo_core.local_store import LocalStore
from cdpo_core.machine import use_machine
from cdpo_core.stages import Runtime, Slice, Stage, stage_code

APART = ("prefect", "mlflow", "boto3")


def main(arguments: Sequence[str]) -> None:
    """Compute everything again; ends with an error when a byte differs."""
    store, folder, threads = LocalStore(arguments[0]), Path(arguments[1]), int(arguments[2])
    stages = [stage for stage in vars(pipeline).values() if isinstance(stage, Stage)]
    names, made = {stage.name for stage in stages}, dict[str, Path]()
    # What is no stage (a run's report) is orchestration's.
    for manifest in in_order([item for item in store.manifests() if item.stage in names]):
        out, scratch = folder / manifest.key, folder / f"{manifest.key}.scratch"
        out.mkdir(parents=True)
        scratch.mkdir()
        inputs = {name: made[digest] for name, digest in manifest.inputs.items()}
        runtime = use_machine(Runtime("cpu", threads, scratch=scratch))
        stage = next(item for item in stages if identity(item) == (manifest.stage, manifest.code))
        stage.compute(Slice(manifest.slice), inputs, out, runtime)
        if files_digest(folder_files(out)) != manifest.digest:
            sys.exit(f"{manifest.stage} {manifest.key}: other bytes than the run's")
        made[manifest.digest] = out
    loaded = [name for name in APART if name in sys.modules]
    print(json.dumps({"stages": len(made), "loaded": loaded}))


def identity(stage: Stage) -> tuple[str, str]:
    """What tells a stage from the others in a manifest."""
    return stage.name, stage_code(stage)


def in_order(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """The manifests, each after those whose artifacts it reads."""
    left, known = list(manifests), set[str]()
    while left:
        ready = [item for item in left if known.issuperset(item.inputs.values())]
        if not ready:
            raise ValueError(f"{left[0].stage} reads what is not in the store")
        yield from ready
        known |= {item.digest for item in ready}
        left = [item for item in left if item not in ready]


if __name__ == "__main__":
    main(sys.argv[1:])

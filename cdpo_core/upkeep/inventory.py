"""What a store holds, as records to print and to write: by stage, by policy, by run, and one artifact alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cdpo_core.errors import InputError
from cdpo_core.upkeep.catalogue import Artifact, Catalogue, Run
from cdpo_core.upkeep.collection import CERTIFIED
from cdpo_core.upkeep.machine import Scratch
from cdpo_core.upkeep.shelves import Item


def inventory(
    catalogue: Catalogue,
    versions: Mapping[str, Sequence[str]],
    aside: Sequence[Item],
    leftovers: Sequence[Item],
    scratch: Sequence[Scratch],
) -> dict[str, Any]:
    """All of a store.

    Args:
        catalogue: what it holds.
        versions: registered model versions, in words, by the policy's digest.
        aside: what was set aside.
        leftovers: what killed processes left in the store.
        scratch: the scratch folders of this machine.

    Returns:
        store, totals, stages, artifacts, policies, runs, records, unreadable, orphans, aside, leftovers, scratch;
        sizes in bytes, ages in seconds.
    """
    artifacts = [artifact_record(catalogue, artifact) for _, artifact in sorted(catalogue.artifacts.items())]
    orphans = catalogue.orphans()
    return {
        "store": catalogue.uri,
        "totals": {
            "artifacts": len(artifacts),
            "objects": len(catalogue.objects),
            "bytes": sum(item.size for item in catalogue.objects.values()),
            "runs": len(catalogue.runs),
            "records": len(catalogue.records),
            "unused_artifacts": sum(not item["used_by"] for item in artifacts),
        },
        "stages": _stages(catalogue),
        "artifacts": artifacts,
        "policies": _policies(catalogue, versions),
        "runs": [run_record(catalogue, run) for run in catalogue.runs],
        "records": _records(catalogue),
        "unreadable": list(catalogue.unreadable),
        "orphans": _summed(orphans),
        "aside": _summed(aside),
        "leftovers": _summed(leftovers),
        "scratch": [
            {"key": item.path.name, "bytes": item.size, "last_written": item.time, "finished": item.is_finished}
            for item in scratch
        ],
    }


def artifact_record(catalogue: Catalogue, artifact: Artifact) -> dict[str, Any]:
    """One artifact: name, stage, kind, digest, bytes, created, age_seconds since its last use, used_by."""
    manifest = artifact.manifest
    return {
        "name": artifact.name,
        "stage": manifest.stage,
        "kind": manifest.kind,
        "digest": manifest.digest,
        "bytes": artifact.size,
        "created": manifest.created,
        "age_seconds": round(catalogue.now - artifact.item.time),
        "used_by": [run.names[0] for run in catalogue.users[artifact.name]],
    }


def artifact_details(catalogue: Catalogue, artifact: Artifact) -> dict[str, Any]:
    """One artifact with its files, what it was made from, what was made from it, and the runs that use it."""
    manifest = artifact.manifest
    made_from = {
        name: ", ".join(sorted(catalogue.by_digest.get(digest, []))) or f"not in the store ({digest[:12]})"
        for name, digest in manifest.inputs.items()
    }
    followers = [
        name for name, other in catalogue.artifacts.items() if manifest.digest in other.manifest.inputs.values()
    ]
    return {
        **artifact_record(catalogue, artifact),
        "files": {name: entry.size for name, entry in sorted(manifest.files.items())},
        "made_from": made_from,
        "made_of_it": sorted(followers),
        "runs": [run_record(catalogue, run) for run in catalogue.users[artifact.name]],
    }


def run_record(catalogue: Catalogue, run: Run) -> dict[str, Any]:
    """One run: record, kind, name, key, status, ended_ms, policy, artifacts, bytes, bytes_alone, missing."""
    here = run.artifacts & catalogue.artifacts.keys()
    return {
        "record": run.names[0],
        "kind": run.kind,
        "name": run.title,
        "key": run.key,
        "status": run.status,
        "ended_ms": run.ended_ms,
        "policy": run.policy,
        "lists_its_artifacts": run.is_listed,
        "artifacts": sorted(run.artifacts),
        "bytes": catalogue.size_of(here),
        "bytes_alone": catalogue.bytes_alone(run),
        "missing": sorted(run.artifacts - here),
    }


def find_artifact(catalogue: Catalogue, reference: str) -> Artifact:
    """The artifact that `<store>/stages/<stage>/<key>.json` or `<stage>/<beginning of the key>` means.

    Raises:
        InputError: it means none, or several.
    """
    short = reference.removeprefix("cdpo://").removesuffix(".json").rpartition("/stages/")[2]
    found = [artifact for name, artifact in sorted(catalogue.artifacts.items()) if name.startswith(short)]
    if "/" in short and len(found) == 1:
        return found[0]
    raise InputError(
        f"{len(found)} artifacts are meant by this" if "/" in short and found else "no artifact is meant by this",
        where=reference,
        fix="give a reference, or `<stage>/<beginning of the key>`; `cdpo store ls --all` lists all",
    )


def _stages(catalogue: Catalogue) -> list[dict[str, Any]]:
    names: dict[tuple[str, str], list[str]] = {}
    for name, artifact in catalogue.artifacts.items():
        names.setdefault((artifact.manifest.stage, artifact.manifest.kind), []).append(name)
    rows = []
    for (stage, kind), members in sorted(names.items()):
        ages = [catalogue.now - catalogue.artifacts[name].item.time for name in members]
        uses = [len(catalogue.users[name]) for name in members]
        rows.append(
            {
                "stage": stage,
                "kind": kind,
                "artifacts": len(members),
                "bytes": catalogue.size_of(members),
                "youngest_seconds": round(min(ages)),
                "oldest_seconds": round(max(ages)),
                "most_runs": max(uses),
                "unused": uses.count(0),
            }
        )
    return rows


def _policies(catalogue: Catalogue, versions: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Policies that a run returned or that are registered, the certified first."""
    runs: dict[str, list[Run]] = {}
    for run in catalogue.runs:
        if run.policy:
            runs.setdefault(run.policy, []).append(run)
    policies = []
    for digest in {**runs, **versions}:
        returned = runs.get(digest, [])
        statuses = [run.status for run in returned]
        names = sorted(catalogue.by_digest.get(digest, []))
        policies.append(
            {
                "name": names[0] if names else "",
                "digest": digest,
                "status": CERTIFIED if CERTIFIED in statuses else (statuses or ["from no finished run"])[0],
                "registered": list(versions.get(digest, [])),
                "runs": [run.title for run in returned],
                "bytes": catalogue.size_of(names[:1]),
            }
        )
    return sorted(
        (item for item in policies if item["name"]),
        key=lambda item: (item["status"] != CERTIFIED, not item["registered"], item["name"]),
    )


def _records(catalogue: Catalogue) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in catalogue.records:
        kind = name.partition("/")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def _summed(items: Iterable[Item]) -> dict[str, Any]:
    items = list(items)
    return {"number": len(items), "bytes": sum(item.size for item in items), "names": [item.name for item in items]}

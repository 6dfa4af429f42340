"""Whether a store is whole: every manifest, every byte of every object, every record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from cdpo_core.stages import Progress, no_progress
from cdpo_core.upkeep.catalogue import Catalogue, read_catalogue
from cdpo_core.upkeep.shelves import OBJECTS, RECORDS, STAGES, Item, Shelves, each

LEDGER = "records/ledger/"


@dataclass(frozen=True)
class Fault:
    """One thing that is not what was stored.

    Attributes:
        name: its place in the store.
        what: what is wrong with it.
        artifacts: `<stage>/<key>` of the artifacts that it makes useless.
    """

    name: str
    what: str
    artifacts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what was found.

    Attributes:
        uri: the store.
        artifacts: how many manifests could be read.
        objects: how many objects were read in full.
        bytes: how many bytes those have.
        records: how many records could be read.
        faults: what is corrupt.
        orphans: objects that no manifest names: no fault, but they take space.
        inputs_gone: (artifact, input) where the artifact of the input is gone: it can be used, not computed again.
        repaired: whether the faults were set aside.
    """

    uri: str
    artifacts: int
    objects: int
    bytes: int
    records: int
    faults: list[Fault] = field(default_factory=list)
    orphans: list[Item] = field(default_factory=list)
    inputs_gone: list[tuple[str, str]] = field(default_factory=list)
    repaired: bool = False


def verify_store(shelves: Shelves, *, repair: bool = False, progress: Progress = no_progress) -> Verification:
    """Read everything and compare it with what it should be.

    Args:
        shelves: the store.
        repair: set aside what is corrupt, so that the next run computes it again.
        progress: told of the objects that were read.
    """
    catalogue = read_catalogue(shelves, progress)
    hashes = _hashes(shelves, catalogue, progress)
    faults = [Fault(name, "cannot be read") for name in catalogue.unreadable]
    faults += _object_faults(shelves, catalogue, hashes)
    if repair:
        _set_aside(shelves, catalogue, faults)
    return Verification(
        catalogue.uri,
        len(catalogue.artifacts),
        sum(found is not None for found in hashes.values()),
        sum(catalogue.objects[name].size for name, found in hashes.items() if found and name in catalogue.objects),
        len(catalogue.records),
        faults,
        catalogue.orphans(),
        catalogue.inputs_gone(),
        repair and bool(faults),
    )


def _hashes(shelves: Shelves, catalogue: Catalogue, progress: Progress) -> dict[str, str | None]:
    """The hash of every object that is there or should be; None for what is missing."""
    named = {entry.sha256 for artifact in catalogue.artifacts.values() for entry in artifact.manifest.entries}
    names = sorted(named | catalogue.objects.keys())
    read = each(lambda name: shelves.sha256(OBJECTS + name), names, "objects", progress)
    return dict(zip(names, read, strict=True))


def _object_faults(shelves: Shelves, catalogue: Catalogue, hashes: Mapping[str, str | None]) -> list[Fault]:
    users: dict[str, list[str]] = {}
    for name, artifact in catalogue.artifacts.items():
        for entry in artifact.manifest.entries:
            users.setdefault(entry.sha256, []).append(name)
    faults = []
    for sha256, found in hashes.items():
        artifacts = users.get(sha256, [])
        if found is None:
            # Cleaned away or set aside since the catalogue was read, with its manifests: nothing is wrong.
            artifacts = [name for name in artifacts if shelves.item(f"{STAGES}{name}.json") is not None]
            if artifacts and shelves.sha256(OBJECTS + sha256) is None:
                faults.append(Fault(OBJECTS + sha256, "is missing", tuple(artifacts)))
        elif found != sha256:
            faults.append(Fault(OBJECTS + sha256, "is not what was stored", tuple(artifacts)))
    return faults


def _set_aside(shelves: Shelves, catalogue: Catalogue, faults: list[Fault]) -> None:
    for name in {name for fault in faults for name in fault.artifacts}:
        shelves.set_aside(catalogue.artifacts[name].manifest)
    for fault in faults:
        item = shelves.item(fault.name)
        if item is None or (fault.name.startswith(OBJECTS) and shelves.sha256(fault.name) == _content(fault.name)):
            continue
        shelves.put_aside(fault.name)
        if fault.name.startswith(LEDGER):
            # The test it stood for was made: its prompts stay spent.
            shelves.put_record(
                fault.name.removeprefix(RECORDS).removesuffix(".json"), {"note": "this entry could not be read"}
            )


def _content(name: str) -> str:
    return PurePosixPath(name).name

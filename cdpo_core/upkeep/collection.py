"""What can go from a store, and taking it away without hurting a run that works meanwhile.

What stays is what somebody may still need, with everything it was made from:

- what a finished run used (its record lists it), and what any other record refers to;
- what a certified or a registered policy was made from and was certified on, even when its run was released;
- what is younger than the age asked for. Using an artifact makes it young again (`Store.check`), so what runs in
  progress work with is young, and so is, by the ancestors, what it was made from.

The rest goes, the manifest first: an artifact whose manifest is gone is not there, and is computed again; one whose
objects were gone would be corrupt. Three things keep a run safe that turns to something old just now:

- each manifest and object is looked at once more before it goes, and spared when it was made young;
- objects go only when no manifest names them, read anew after the manifests went; a publisher makes the objects young
  that it finds before it writes the manifest that names them, and looks after them once more when it has;
- what is lost all the same, because this process stood still between a look and a deletion, is found missing by
  whoever reads it, and computed again (`Workbench`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdpo_core.errors import CorruptArtifact
from cdpo_core.stages import Progress, no_progress
from cdpo_core.upkeep.catalogue import OUTCOMES, RESULTS, Artifact, Catalogue, Run
from cdpo_core.upkeep.machine import Copy, remove_copy, unused_copies
from cdpo_core.upkeep.shelves import ASIDE, OBJECTS, RECORDS, Item, Shelves, each

CERTIFIED = "certified"


@dataclass(frozen=True)
class Wishes:
    """What the operator asks for.

    Attributes:
        older_than: seconds; nothing younger goes.
        released: runs whose artifacts are no longer wanted.
        with_policies: the certified policies of those runs are no longer wanted either.
        registered: digests of the policies that are registered, which stay whatever is asked for.
        home: folders of this machine to look through too (`unused_copies`), or None.
    """

    older_than: float
    released: tuple[Run, ...] = ()
    with_policies: bool = False
    registered: frozenset[str] = frozenset()
    home: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What can go, in the order it would.

    Attributes:
        records: of released runs, and outcomes that sweeps have long read.
        artifacts: that nobody needs; what was made from an artifact goes before it.
        objects: that no other artifact needs, with those that are nobody's.
        aside: corrupt things set aside long ago.
        leftovers: what killed processes left half-written.
        copies: views, local copies and scratch on this machine.
        kept: artifacts that stay, by the reason.
    """

    before: float
    records: list[Item] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    objects: list[Item] = field(default_factory=list)
    aside: list[Item] = field(default_factory=list)
    leftovers: list[Item] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What would be freed."""
        items = [*self.records, *self.objects, *self.aside, *self.leftovers, *(item.item for item in self.artifacts)]
        return sum(item.size for item in items) + sum(copy.size for copy in self.copies)


def plan_collection(shelves: Shelves, catalogue: Catalogue, wishes: Wishes) -> Plan:
    """What can go from a store; nothing is changed.

    Args:
        shelves: the store.
        catalogue: what it holds, read just now.
        wishes: what is asked for.

    Raises:
        CorruptArtifact: a manifest or record cannot be read, so who needs what cannot be known.
    """
    if catalogue.unreadable:
        raise CorruptArtifact(
            f"{len(catalogue.unreadable)} manifests or records cannot be read, so what is in use cannot be known",
            where=f"{shelves.uri}: {catalogue.unreadable[0]}",
            fix="cdpo store verify --repair",
        )
    before = catalogue.now - wishes.older_than
    records = _records_to_go(catalogue, wishes, before)
    kept = _kept(catalogue, wishes, before, {_record_name(item) for item in records})
    stays = set().union(*kept.values())
    goes = [artifact for name, artifact in catalogue.artifacts.items() if name not in stays]
    needed = {entry.sha256 for name in stays for entry in catalogue.artifacts[name].manifest.entries}
    return Plan(
        before,
        records,
        _newest_first(catalogue, goes),
        [item for sha256, item in catalogue.objects.items() if sha256 not in needed and item.time < before],
        [item for item in shelves.items(ASIDE) if item.time < before],
        [item for item in shelves.leftovers() if item.time < before],
        unused_copies(wishes.home, shelves.uri, wishes.older_than, catalogue.artifacts) if wishes.home else [],
        {reason: len(names) for reason, names in kept.items()},
    )


def collect(shelves: Shelves, plan: Plan, progress: Progress = no_progress) -> Plan:
    """Take away what a plan names; what came into use since it was made stays.

    Returns:
        The plan, of what has really gone.
    """
    records = _gone(shelves, plan.records, plan.before, "records", progress)
    # One after the other: what was made from an artifact must be gone before it.
    artifacts = []
    for done, artifact in enumerate(plan.artifacts, start=1):
        if _remove(shelves, artifact.item, plan.before):
            artifacts.append(artifact)
        progress("manifests", done, len(plan.artifacts) + 1)
    if plan.artifacts:
        progress("manifests", 1, 1)
    needed = {entry.sha256 for manifest in shelves.manifests() for entry in manifest.entries}
    unneeded = [item for item in plan.objects if item.name.removeprefix(OBJECTS) not in needed]
    objects = _gone(shelves, unneeded, plan.before, "objects", progress)
    aside = _gone(shelves, plan.aside, plan.before, "set aside", progress)
    each(shelves.clear, plan.leftovers, "leftovers" if plan.leftovers else "", progress)
    copies = [copy for copy in plan.copies if remove_copy(copy)]
    return Plan(plan.before, records, artifacts, objects, aside, plan.leftovers, copies, plan.kept)


def find_runs(catalogue: Catalogue, words: Iterable[str]) -> tuple[tuple[Run, ...], list[str]]:
    """The runs that these names or keys mean, and the words that mean none."""
    found: dict[tuple[str, ...], Run] = {}
    unknown = []
    for word in words:
        meant = [run for run in catalogue.runs if run.answers_to(word)]
        found |= {run.names: run for run in meant}
        if not meant:
            unknown.append(word)
    return tuple(found.values()), unknown


def idle_runs(catalogue: Catalogue, seconds: float) -> tuple[Run, ...]:
    """The runs whose own artifacts, those that no other run uses, were not used for so many seconds."""
    found = []
    for run in catalogue.runs:
        own = [name for name in run.artifacts if len(catalogue.users.get(name, [])) == 1]
        times = [catalogue.artifacts[name].item.time for name in own]
        if times and max(times) < catalogue.now - seconds:
            found.append(run)
    return tuple(found)


def _kept(catalogue: Catalogue, wishes: Wishes, before: float, records_going: Collection[str]) -> dict[str, set[str]]:
    """`<stage>/<key>` of what stays, with its ancestors, by the reason; an artifact may have several."""
    released = {run.names for run in wishes.released}
    used = set().union(*(run.artifacts for run in catalogue.runs if run.names not in released))
    certified: set[str] = set()
    registered = set(wishes.registered)
    for run in catalogue.runs:
        if run.policy in wishes.registered:
            registered |= run.evidence
        if run.status == CERTIFIED and not (run.names in released and wishes.with_policies):
            certified |= run.evidence
    others = (digests for name, digests in catalogue.references.items() if name not in records_going)
    roots = {
        "used by runs": used,
        "of certified policies": catalogue.named(certified),
        "of registered policies": catalogue.named(registered),
        "in other records": catalogue.named(set().union(*others)),
        "young": {name for name, artifact in catalogue.artifacts.items() if artifact.item.time >= before},
    }
    return {reason: catalogue.with_ancestors(names) for reason, names in roots.items()}


def _records_to_go(catalogue: Catalogue, wishes: Wishes, before: float) -> list[Item]:
    names = [name for name, item in catalogue.records.items() if name.startswith(OUTCOMES) and item.time < before]
    for run in wishes.released:
        # The result record is what a certified policy's certificate is known by.
        stays = run.policy in wishes.registered or (run.status == CERTIFIED and not wishes.with_policies)
        names += [name for name in run.names if not (stays and name.startswith(RESULTS))]
    return [catalogue.records[name] for name in names]


def _newest_first(catalogue: Catalogue, artifacts: Sequence[Artifact]) -> list[Artifact]:
    """What was made from an artifact comes before it."""
    depth: dict[str, int] = {}

    def depth_of(name: str) -> int:
        if name not in depth:
            depth[name] = 0  # two artifacts of one digest may each be made from the other's like
            inputs = catalogue.named(catalogue.artifacts[name].manifest.inputs.values())
            depth[name] = 1 + max(map(depth_of, inputs), default=0)
        return depth[name]

    return sorted(artifacts, key=lambda artifact: (-depth_of(artifact.name), artifact.name))


def _gone(shelves: Shelves, items: Sequence[Item], before: float, what: str, progress: Progress) -> list[Item]:
    removed = each(lambda item: _remove(shelves, item, before), items, what if items else "", progress)
    return [item for item, went in zip(items, removed, strict=True) if went]


def _remove(shelves: Shelves, item: Item, before: float) -> bool:
    now = shelves.item(item.name)
    if now is None or (now.time >= before and now.time > item.time):
        return False
    shelves.remove(item.name)
    return True


def _record_name(item: Item) -> str:
    return item.name.removeprefix(RECORDS).removesuffix(".json")

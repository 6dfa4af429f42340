"""All that a store holds, read once: artifacts, what each was made from, and the runs that use it.

A finished run enters the artifacts it used as `runs/<...>` (tasks.uses). A record of any other kind uses
what it refers to: wherever a record holds a reference, the artifact is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cdpo_core.artifacts import Manifest, parse_manifest, parse_record
from cdpo_core.errors import CorruptArtifact
from cdpo_core.stages import Progress, no_progress
from cdpo_core.upkeep.shelves import OBJECTS, RECORDS, STAGES, Item, Shelves, each

RUNS, RESULTS, OUTCOMES = "runs/", "results/", "outcomes/"

EXTERNAL_INPUTS = ("source", "base")
"""Inputs that come from outside the store, by the names that stages know them by."""


@dataclass(frozen=True)
class Artifact:
    """One artifact: its manifest, and the manifest's own place, size and age."""

    manifest: Manifest
    item: Item

    @property
    def name(self) -> str:
        """`<stage>/<key>`."""
        return f"{self.manifest.stage}/{self.manifest.key}"

    @property
    def size(self) -> int:
        """Bytes of its files, shared ones too."""
        return sum(entry.size for entry in self.manifest.entries)


@dataclass(frozen=True)
class Run:
    """A finished run and the artifacts it used.

    Attributes:
        names: its records' names, without `records/` in front.
        kind: experiment, comparison, or what else entered it.
        key: the experiment's key.
        title: the name it was given.
        status: certified, not_certified, infeasible; "" where there is no verdict.
        ended_ms: when the newest of its artifacts was computed, milliseconds since 1970.
        artifacts: `<stage>/<key>` of all it used.
        is_listed: False for a run that was recorded before runs listed what they use: `artifacts` is then
            everything that was ever computed from its data.
        policy: digest of the policy it returned, "" for none.
        evidence: digests that a later check of the policy needs, the policy's among them.
        tracking: where it was tracked: {run_id, uri}, or {}.
    """

    names: tuple[str, ...]
    kind: str
    key: str
    title: str
    status: str
    ended_ms: int
    artifacts: frozenset[str]
    is_listed: bool = True
    policy: str = ""
    evidence: frozenset[str] = frozenset()
    tracking: Mapping[str, str] = field(default_factory=dict)

    def answers_to(self, word: str) -> bool:
        """Whether a user who writes this word means this run: its name, or the beginning of its key or record."""
        return word == self.title or (len(word) >= 4 and any(name.startswith(word) for name in (self.key, *self.names)))


@dataclass(frozen=True)
class Catalogue:
    """What a store held when it was read.

    Attributes:
        uri: the store's address.
        now: when, by the store's clock.
        objects: every stored object, by its sha256.
        artifacts: every artifact by `<stage>/<key>`.
        records: every readable record's item, by its name without `records/` and `.json`.
        runs: finished runs, the latest first.
        references: digests that records of other kinds refer to, by the record's name.
        unreadable: names of manifests and records that cannot be read.
    """

    uri: str
    now: float
    objects: Mapping[str, Item]
    artifacts: Mapping[str, Artifact]
    records: Mapping[str, Item]
    runs: tuple[Run, ...]
    references: Mapping[str, frozenset[str]]
    unreadable: tuple[str, ...]

    @cached_property
    def users(self) -> dict[str, list[Run]]:
        """The runs that use each artifact, by `<stage>/<key>`."""
        users: dict[str, list[Run]] = {name: [] for name in self.artifacts}
        for run in self.runs:
            for name in run.artifacts & self.artifacts.keys():
                users[name].append(run)
        return users

    @cached_property
    def by_digest(self) -> dict[str, list[str]]:
        """The artifacts of each digest: an edit of the code may compute the same bytes under another key."""
        return _by_digest(self.artifacts)

    def named(self, digests: Iterable[str]) -> set[str]:
        """`<stage>/<key>` of all artifacts with these digests."""
        return {name for digest in digests for name in self.by_digest.get(digest, [])}

    def with_ancestors(self, names: Iterable[str]) -> set[str]:
        """These artifacts and all that they were made from."""
        found: set[str] = set()
        pending = [name for name in names if name in self.artifacts]
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += self.named(self.artifacts[name].manifest.inputs.values())
        return found

    @cached_property
    def _only_user(self) -> dict[str, Run | None]:
        """The one run that needs an object; None where that is several runs, or an artifact of no run."""
        found: dict[str, Run | None] = {}
        for name, artifact in self.artifacts.items():
            users = self.users[name]
            only = users[0] if len(users) == 1 else None
            for entry in artifact.manifest.entries:
                found[entry.sha256] = only if found.get(entry.sha256, only) is only else None
        return found

    def bytes_alone(self, run: Run) -> int:
        """Bytes that no other run, and no artifact of no run, needs."""
        return sum(
            self.objects[sha256].size
            for sha256, user in self._only_user.items()
            if user is run and sha256 in self.objects
        )

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of these artifacts' files, shared ones once."""
        entries = {entry.sha256: entry.size for name in names for entry in self.artifacts[name].manifest.entries}
        return sum(entries.values())

    def inputs_gone(self) -> list[tuple[str, str]]:
        """(artifact, input) for every input whose artifact is no longer here: it cannot be computed again from here."""
        return [
            (name, given)
            for name, artifact in sorted(self.artifacts.items())
            for given, digest in artifact.manifest.inputs.items()
            if given not in EXTERNAL_INPUTS and digest not in self.by_digest
        ]

    def orphans(self) -> list[Item]:
        """Objects that no manifest names."""
        named = {entry.sha256 for artifact in self.artifacts.values() for entry in artifact.manifest.entries}
        return [item for sha256, item in self.objects.items() if sha256 not in named]


def read_catalogue(shelves: Shelves, progress: Progress = no_progress) -> Catalogue:
    """Read what a store holds; changes nothing.

    Objects are listed first, then manifests, then records: each refers to what was there before it, so a run that
    publishes meanwhile shows no object of a finished artifact as nobody's.
    """
    now = shelves.now()
    objects = {item.name.removeprefix(OBJECTS): item for item in shelves.items(OBJECTS)}
    unreadable: list[str] = []
    artifacts: dict[str, Artifact] = {}
    found = [item for item in shelves.items(STAGES) if item.name.count("/") == 2 and item.name.endswith(".json")]
    for artifact, item in zip(
        each(lambda it: _artifact(shelves, it), found, "manifests", progress), found, strict=True
    ):
        if isinstance(artifact, Artifact):
            artifacts[artifact.name] = artifact
        elif artifact is not None:
            unreadable.append(item.name)
    items = [item for item in shelves.items(RECORDS) if not item.name.startswith(f"{RECORDS}probe/")]
    named = {item.name.removeprefix(RECORDS).removesuffix(".json"): item for item in items}
    contents = dict(zip(named, each(lambda name: _record(shelves, name), named, "records", progress), strict=True))
    unreadable += [named[name].name for name, content in contents.items() if content is _UNREADABLE]
    records = {name: content for name, content in contents.items() if isinstance(content, dict)}
    runs = _runs(records, artifacts)
    others = (name for name in records if not name.startswith((RUNS, RESULTS)))
    return Catalogue(
        shelves.uri,
        now,
        objects,
        artifacts,
        {name: named[name] for name in records},
        tuple(sorted(runs, key=lambda run: -run.ended_ms)),
        {name: frozenset(refs_in(records[name])) for name in others},
        tuple(unreadable),
    )


def refs_in(value: Any) -> Iterator[str]:
    """Digests of all references to artifacts that a record holds, at any depth."""
    if isinstance(value, Mapping):
        if {"uri", "digest"} <= value.keys():
            yield str(value["digest"])
        for item in value.values():
            yield from refs_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from refs_in(item)


_UNREADABLE = object()


def _artifact(shelves: Shelves, item: Item) -> Artifact | object | None:
    _, stage, file = item.name.split("/")
    text = shelves.read(item.name)
    try:
        return None if text is None else Artifact(parse_manifest(text, stage, file.removesuffix(".json")), item)
    except CorruptArtifact:
        return _UNREADABLE


def _record(shelves: Shelves, name: str) -> dict[str, Any] | object | None:
    text = shelves.read(f"{RECORDS}{name}.json")
    try:
        return None if text is None else parse_record(text, name)
    except CorruptArtifact:
        return _UNREADABLE


def _by_digest(artifacts: Mapping[str, Artifact]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, artifact in artifacts.items():
        found.setdefault(artifact.manifest.digest, []).append(name)
    return found


def _runs(records: Mapping[str, dict[str, Any]], artifacts: Mapping[str, Artifact]) -> list[Run]:
    results = {name: record for name, record in records.items() if name.startswith(RESULTS)}
    runs = []
    for name, record in records.items():
        if name.startswith(RUNS):
            given = str(record.get("result") or "")
            names = (name, given) if given in results else (name,)
            runs.append(_run(names, record, results.get(given, {}), frozenset(record.get("artifacts", ()))))
    listed = {name for run in runs for name in run.names}
    digests = _by_digest(artifacts)
    for name, result in results.items():
        if name not in listed:
            made = _made_from(result, artifacts, digests)
            facts = {"kind": "experiment", "key": name.removeprefix(RESULTS).rpartition("-")[0]}
            runs.append(_run((name,), {**result, **facts}, result, made, is_listed=False))
    return runs


def _run(
    names: tuple[str, ...],
    record: Mapping[str, Any],
    result: Mapping[str, Any],
    artifacts: frozenset[str],
    *,
    is_listed: bool = True,
) -> Run:
    tracking = result.get("tracking") or record.get("tracking") or {}
    return Run(
        names,
        str(record.get("kind", "")),
        str(record.get("key", "")),
        str(record.get("name", "")),
        str(result.get("status", record.get("status", ""))),
        int(record.get("ended_ms") or 0),
        artifacts,
        is_listed,
        str((result.get("policy") or {}).get("digest", "")),
        frozenset(refs_in(result)),
        {key: str(tracking[key]) for key in ("run_id", "uri") if tracking.get(key)},
    )


def _made_from(
    result: Mapping[str, Any], artifacts: Mapping[str, Artifact], digests: Mapping[str, list[str]]
) -> frozenset[str]:
    """What the result refers to, and everything that was ever computed from its data."""
    found: set[str] = set()
    followers: dict[str, list[str]] = {}
    for name, artifact in artifacts.items():
        for digest in artifact.manifest.inputs.values():
            followers.setdefault(digest, []).append(name)
    pending = [str((result.get("data") or {}).get("digest", ""))]
    found.update(digests.get(pending[0], []))
    while pending:
        for name in followers.get(pending.pop(), []):
            if name not in found:
                found.add(name)
                pending.append(artifacts[name].manifest.digest)
    return frozenset(found).union(*(digests.get(digest, []) for digest in refs_in(result)))

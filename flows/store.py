"""`cdpo store`: what a store holds and who uses it, whether it is whole, what can go.

cdpo store ls
cdpo store verify --repair
cdpo store gc --older-than 30d --yes
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from cdpo_core.errors import InputError
from flows.command_line import ANY_LIMIT, check_writable, write_json
from flows.terminal import PlainConsole, showing_progress
from tasks.environment import cdpo_home

if TYPE_CHECKING:
    from cdpo_core.upkeep.catalogue import Catalogue, Run
    from cdpo_core.upkeep.collection import Plan
    from cdpo_core.upkeep.shelves import Shelves
    from tasks.registered import Version

DONE, CORRUPT = 0, 1
LEAST_AGE = 86400.0
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(w|d|h|m|s)")
_SECONDS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}

StoreUri = Annotated[
    str,
    Parameter(
        name="--store", help="Artifact store: a folder, or s3://bucket/prefix.", metavar="URI", show_default=False
    ),
]
Json = Annotated[Path | None, Parameter(name="--json", help="Write what is found to this file.", metavar="FILE")]
Overrides = Annotated[dict[str, str] | None, Parameter(parse=False)]

store = App(
    name="store",
    sort_key=8,
    help="What the artifact store holds, whether it is whole, what can go.",
    help_format="plaintext",
    help_epilogue="",
    usage="Usage: cdpo store COMMAND [ARGUMENTS]",
)


@store.command(sort_key=1, help_epilogue="")
def ls(
    ref: Annotated[
        str, Parameter(help="One artifact: <stage>/<beginning of its key>, or a reference.", show_default=False)
    ] = "",
    /,
    *,
    run: Annotated[
        str, Parameter(help="One run, by its name or the beginning of its key.", metavar="NAME", show_default=False)
    ] = "",
    all_: Annotated[bool, Parameter(name="--all", negative="", show_default=False, help="List each artifact.")] = False,
    store: StoreUri = "",
    json: Json = None,
    overrides: Overrides = None,
) -> int:
    """Show what the store holds: artifacts, policies, runs, and which runs use what."""
    from cdpo_core.upkeep.catalogue import read_catalogue
    from cdpo_core.upkeep.inventory import artifact_details, find_artifact
    from flows.store_report import print_artifact

    address, found, _ = ref.removeprefix("cdpo://").rpartition("/stages/")
    shelves = _begin(address if found else store, json)
    with showing_progress() as progress:
        catalogue = read_catalogue(shelves, progress)
    if ref:
        record = artifact_details(catalogue, find_artifact(catalogue, ref))
        print_artifact(record, _stdout())
    elif run:
        record = {"runs": _show_runs(catalogue, run)}
    else:
        record = _show_all(shelves, catalogue, overrides, every=all_)
    return _written(record, json)


@store.command(sort_key=2, help_epilogue="")
def verify(
    *,
    repair: Annotated[
        bool, Parameter(negative="", show_default=False, help="Set aside what is corrupt: the next run computes it.")
    ] = False,
    store: StoreUri = "",
    json: Json = None,
) -> int:
    """Read every manifest, object and record in full; exit code 1 if anything is corrupt."""
    from cdpo_core.upkeep.verification import verify_store
    from flows.store_report import print_verification

    shelves = _begin(store, json)
    with showing_progress() as progress:
        found = verify_store(shelves, repair=repair, progress=progress)
    print_verification(found, _stdout())
    _written(asdict(found), json)
    return CORRUPT if found.faults else DONE


@store.command(sort_key=3, help_epilogue="")
def gc(
    *,
    older_than: Annotated[
        str, Parameter(help="Spare what is younger, or was used later: 30d, 12h.", metavar="AGE")
    ] = "30d",
    drop_run: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            show_default=False,
            help="Release a run, by its name or the beginning of its key.",
            metavar="NAME",
        ),
    ] = None,
    drop_idle: Annotated[
        str,
        Parameter(help="Release runs whose own artifacts nobody used for so long.", metavar="AGE", show_default=False),
    ] = "",
    with_policies: Annotated[
        bool,
        Parameter(
            negative="",
            show_default=False,
            help="Release the certified policies of these runs too, but no registered one.",
        ),
    ] = False,
    idle: Annotated[
        bool, Parameter(negative="", show_default=False, help="No run works on this store: AGE may be less than a day.")
    ] = False,
    yes: Annotated[
        bool, Parameter(negative="", show_default=False, help="Delete; without it only show what would go.")
    ] = False,
    store: StoreUri = "",
    json: Json = None,
    overrides: Overrides = None,
) -> int:
    """Take away what nobody needs, or show what that is.

    What a finished run used stays, and all that a certified or a registered policy was made from and certified on.
    MLflow is asked which policies are registered; --tracking.enabled false says that none of them is needed.
    """
    from cdpo_core.upkeep.catalogue import read_catalogue
    from cdpo_core.upkeep.collection import Wishes, collect, idle_runs, plan_collection
    from flows.store_report import print_plan

    age = _age(older_than, "--older-than", idle=idle)
    shelves = _begin(store, json)
    with showing_progress() as progress:
        catalogue = read_catalogue(shelves, progress)
        released = _released(catalogue, drop_run or [])
        if drop_idle:
            released += idle_runs(catalogue, _age(drop_idle, "--drop-idle", idle=idle))
        versions = _versions(catalogue, overrides)
        registered = frozenset(version.digest for version in versions)
        wishes = Wishes(age, released, with_policies, registered, cdpo_home())
        plan = plan_collection(shelves, catalogue, wishes)
        if yes:
            plan = collect(shelves, plan, progress)
    print_plan(plan, _stdout(), done=yes)
    return _written(_plan_record(plan, done=yes), json)


def _show_runs(catalogue: Catalogue, word: str) -> list[dict[str, Any]]:
    from cdpo_core.upkeep.inventory import artifact_record, run_record
    from flows.store_report import print_run

    records = []
    for run in _released(catalogue, [word]):
        record = run_record(catalogue, run)
        here = sorted(run.artifacts & catalogue.artifacts.keys())
        print_run(record, [artifact_record(catalogue, catalogue.artifacts[name]) for name in here], _stdout())
        records.append(record)
    return records


def _show_all(
    shelves: Shelves, catalogue: Catalogue, overrides: Mapping[str, str] | None, *, every: bool
) -> dict[str, Any]:
    from cdpo_core.upkeep.inventory import inventory
    from cdpo_core.upkeep.machine import scratch_folders
    from cdpo_core.upkeep.shelves import ASIDE
    from flows.store_report import print_inventory

    registered: dict[str, list[str]] = {}
    note = ""
    try:
        for version in _versions(catalogue, overrides):
            registered.setdefault(version.digest, []).append(str(version))
    except InputError as error:
        note = f"MLflow was not asked which policies are registered: {error.what} ({error.where})"
    scratch = scratch_folders(cdpo_home(), catalogue.artifacts)
    found = inventory(catalogue, registered, shelves.items(ASIDE), shelves.leftovers(), scratch)
    print_inventory(found, _stdout(), every=every)
    if note:
        _stdout().print(note, soft_wrap=True)
    return {**found, "mlflow": note or "asked"}


def _released(catalogue: Catalogue, words: list[str]) -> tuple[Run, ...]:
    from cdpo_core.upkeep.collection import find_runs

    runs, unknown = find_runs(catalogue, words)
    if unknown:
        known = ", ".join(sorted({run.title for run in catalogue.runs})) or "none"
        raise InputError(
            "no finished run of this store has this name or key",
            where=f"run: {unknown[0]}",
            fix=f"`cdpo store ls` lists them: {known[:200]}",
        )
    return runs


def _versions(catalogue: Catalogue, overrides: Mapping[str, str] | None) -> list[Version]:
    from cdpo_core.config_loading import load_config
    from tasks.registered import registered_policies

    tracking = load_config("", overrides or {}, limit=ANY_LIMIT).tracking
    return registered_policies(tracking, cdpo_home(), [run.tracking for run in catalogue.runs if run.tracking])


def _age(text: str, option: str, *, idle: bool) -> float:
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise InputError("this is no age", where=f"{option} {text}", fix="write a number and w, d, h, m or s: 30d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds < LEAST_AGE and not idle:
        raise InputError(
            "what is younger than a day may belong to a run that is not finished",
            where=f"{option} {text}",
            fix="give at least 1d; or add --idle if no run works on this store",
        )
    return seconds


def _plan_record(plan: Plan, *, done: bool) -> dict[str, Any]:
    items = {name: [item.name for item in getattr(plan, name)] for name in ("records", "objects", "aside", "leftovers")}
    return {
        "deleted": done,
        "bytes": plan.bytes,
        **items,
        "artifacts": [artifact.name for artifact in plan.artifacts],
        "copies": [{"path": str(copy.path), "what": copy.what, "bytes": copy.size} for copy in plan.copies],
        "kept": plan.kept,
    }


def _begin(uri: str, json: Path | None) -> Shelves:
    """The store to work on: that of a running `cdpo up`, whose MLflow is asked too, unless another is named."""
    from flows.up import join_running
    from tasks.shelves import open_shelves

    if json is not None:
        check_writable(json, "--json")
    join_running()
    return open_shelves(uri)


def _written(record: Mapping[str, Any], json: Path | None) -> int:
    if json is not None:
        write_json(json, record)
    return DONE


def _stdout() -> PlainConsole:
    return PlainConsole()

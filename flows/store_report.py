"""What `cdpo store` says: what a store holds, what is wrong with it, what can go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cdpo_core.plain_text import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from cdpo_core.upkeep.collection import Plan
    from cdpo_core.upkeep.verification import Verification

Record = Mapping[str, Any]

SHOWN = 20
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SPANS = (("d", 86400), ("h", 3600), ("min", 60))


def size(number: float) -> str:
    """Bytes in words."""
    unit = 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 or number >= 10 else f"{number:.1f} {_UNITS[unit]}"


def span(seconds: float) -> str:
    """An age in words."""
    for unit, length in _SPANS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def print_inventory(found: Record, console: Console, *, every: bool) -> None:
    """Stages, policies, runs and totals; with `every`, each artifact too."""
    table = _table("Artifacts", "stage", "kind", "number", "size", "last used", "runs", "unused")
    for row in found["stages"]:
        ages = f"{span(row['youngest_seconds'])} – {span(row['oldest_seconds'])} ago"
        cells = (str(row["artifacts"]), size(row["bytes"]), ages, f"≤ {row['most_runs']}", str(row["unused"] or ""))
        table.add_row(row["stage"], row["kind"], *cells)
    console.print(table)
    if every:
        console.print(_artifacts(found["artifacts"]))
    if found["policies"]:
        console.print(_policies(found["policies"]))
    if found["runs"]:
        console.print(_runs(found["runs"]))
    totals = found["totals"]
    records = ", ".join(f"{number} {kind}" for kind, number in found["records"].items()) or "none"
    lines = [
        f"{totals['artifacts']} artifacts in {totals['objects']} objects, {size(totals['bytes'])}; "
        f"{totals['unused_artifacts']} artifacts are used by no run",
        f"records: {records}",
    ]
    names = {"orphans": "objects of no artifact", "aside": "set aside as corrupt", "leftovers": "left half-written"}
    lines += [
        f"{words}: {found[key]['number']} ({size(found[key]['bytes'])})"
        for key, words in names.items()
        if found[key]["number"]
    ]
    if found["scratch"]:
        done = sum(item["finished"] for item in found["scratch"])
        held = sum(item["bytes"] for item in found["scratch"])
        lines.append(
            f"scratch on this machine: {len(found['scratch']) - done} unfinished, {done} finished ({size(held)})"
        )
    if found["unreadable"]:
        lines.append(f"cannot be read: {len(found['unreadable'])}; see cdpo store verify")
    _print(console, *lines)


def print_artifact(found: Record, console: Console) -> None:
    """One artifact: its files, what it was made from and for, and who uses it."""
    _print(console, f"{found['name']}: {found['kind']}, {size(found['bytes'])}, computed {found['created']}")
    _print(console, f"  digest     {found['digest']}", f"  last used  {span(found['age_seconds'])} ago")
    for name, source in found["made_from"].items():
        _print(console, f"  made from  {name}: {source}")
    for name in found["made_of_it"][:SHOWN]:
        _print(console, f"  made of it {name}")
    _more(console, found["made_of_it"])
    for name, number in list(found["files"].items())[:SHOWN]:
        _print(console, f"  file       {name} ({size(number)})")
    _more(console, list(found["files"]))
    if found["runs"]:
        console.print(_runs(found["runs"]))
    else:
        _print(console, "  no finished run uses it")


def print_run(found: Record, artifacts: Sequence[Record], console: Console) -> None:
    """One run and each artifact it uses."""
    console.print(_runs([found]))
    if not found["lists_its_artifacts"]:
        _print(console, "recorded before runs listed what they use: shown is all that was computed from its data;")
        _print(console, "repeat the run, which finds everything there, and it lists its own")
    console.print(_artifacts(artifacts))
    for name in found["missing"]:
        _print(console, f"gone: {name}")


def print_verification(found: Verification, console: Console) -> None:
    """What was read and what is corrupt."""
    _print(
        console,
        f"{found.uri}: {found.artifacts} manifests, {found.objects} objects ({size(found.bytes)}), "
        f"{found.records} records read in full",
    )
    for fault in found.faults:
        uses = f" ({', '.join(fault.artifacts[:3])})" if fault.artifacts else ""
        _print(console, f"corrupt: {fault.name} {fault.what}{uses}")
    for name, given in found.inputs_gone[:SHOWN]:
        _print(console, f"note: {name} can be used, but not computed again from here: its input {given} is gone")
    _more(console, found.inputs_gone)
    if found.orphans:
        total = size(sum(item.size for item in found.orphans))
        _print(console, f"note: {len(found.orphans)} objects of no artifact ({total}); cdpo store gc takes them away")
    if not found.faults:
        console.print("The store is whole.", style="bold green")
    elif found.repaired:
        _print(console, f"{len(found.faults)} corrupt things were set aside: the next run computes them again.")
    else:
        _print(console, f"{len(found.faults)} corrupt things; cdpo store verify --repair sets them aside.")


def print_plan(plan: Plan, console: Console, *, done: bool) -> None:
    """What can go, or what has gone."""
    table = _table("Gone" if done else "Can go", "what", "number", "size")
    aside, copies = plan.aside, plan.copies
    rows: list[tuple[str, Sequence[Any]]] = [
        ("records of released runs, old outcomes", plan.records),
        ("artifacts that nobody needs", [item.item for item in plan.artifacts]),
        ("their objects, and objects of no artifact", plan.objects),
        ("set aside long ago", aside),
        ("left half-written", plan.leftovers),
        *((f"on this machine: {what}", [copy for copy in copies if copy.what == what]) for what in _kinds(plan)),
    ]
    for words, items in rows:
        if items:
            table.add_row(words, str(len(items)), size(sum(item.size for item in items)))
    if table.row_count:
        console.print(table)
    for artifact in plan.artifacts[:SHOWN]:
        _print(console, f"  {_short(artifact.name)} ({artifact.manifest.kind}, {size(artifact.size)})")
    _more(console, plan.artifacts)
    kept = ", ".join(f"{number} {reason}" for reason, number in plan.kept.items() if number) or "nothing"
    _print(console, f"kept (an artifact may have several reasons): {kept}")
    if done:
        _print(console, f"{size(plan.bytes)} freed.")
    elif plan.bytes or plan.copies:
        _print(console, f"{size(plan.bytes)} can go; nothing was deleted. The same command with --yes deletes it.")
    else:
        _print(console, "Nothing can go.")


def _kinds(plan: Plan) -> list[str]:
    return sorted({copy.what for copy in plan.copies})


def _artifacts(rows: Sequence[Record]) -> Table:
    table = _table("Each artifact", "artifact", "kind", "size", "last used", "runs")
    for row in rows:
        cells = (size(row["bytes"]), f"{span(row['age_seconds'])} ago", str(len(row["used_by"]) or "none"))
        table.add_row(_short(row["name"]), row["kind"], *cells)
    return table


def _policies(rows: Sequence[Record]) -> Table:
    table = _table("Policies", "policy", "status", "registered as", "run", "size")
    for row in rows:
        names = ", ".join(dict.fromkeys(row["runs"]))
        status = row["status"].replace("_", " ")
        table.add_row(_short(row["name"]), status, ", ".join(row["registered"]), names, size(row["bytes"]))
    return table


def _runs(rows: Sequence[Record]) -> Table:
    table = _table("Runs", "run", "key", "status", "ended", "artifacts", "size", "its alone")
    for row in rows:
        ended = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["ended_ms"] / 1000)) if row["ended_ms"] else ""
        status = row["status"].replace("_", " ") or row["kind"]
        cells = (str(len(row["artifacts"])), size(row["bytes"]), size(row["bytes_alone"]))
        table.add_row(row["name"], row["key"][:12], status, ended, *cells)
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, overflow="fold", justify="right" if head in ("number", "size", "its alone") else "left")
    return table


def _short(name: str) -> str:
    """What `cdpo store ls` and `cdpo export` take for an artifact."""
    stage, _, key = name.partition("/")
    return f"{stage}/{key[:12]}"


def _more(console: Console, items: Sequence[Any]) -> None:
    if len(items) > SHOWN:
        _print(console, f"  … and {len(items) - SHOWN} more (--json FILE lists all)")


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(one_line(line), soft_wrap=True)

"""What a run would do, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from cdpo_core.config import ExperimentConfig


def print_plan(plan: Mapping[str, Any], config: ExperimentConfig, console: Console) -> None:
    """The stages with what is there already, the planned margin, and the warnings.

    Args:
        plan: stages [{name, cached, estimate}], margin, share, warnings, as `plan_experiment` returns it; an estimate
            is in seconds, or words.
        config: the experiment.
        console: where to print.
    """
    title = Text(f"{config.name}: what a run would do")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for head in ("stage", "state"):
        table.add_column(head)
    table.add_column("about", justify="right")
    for stage in plan["stages"]:
        table.add_row(stage["name"], "there already" if stage["cached"] else "to compute", _estimate(stage))
    console.print(table)
    ahead = [stage.get("estimate") for stage in plan["stages"] if not stage["cached"]]
    seconds = sum(value for value in ahead if isinstance(value, (int, float)))
    lines = [f"{len(ahead)} of {len(plan['stages'])} stages to compute{_time(ahead, seconds)}"]
    if plan.get("memory"):
        lines.append(f"memory: about {plan['memory']}")
    limits = ", ".join(f"{item.name} ≤ {item.limit:g}" for item in config.constraints)
    lines.append(f"limits: {limits}; training aims lower, by {_margin(plan.get('margin'))}")
    lines.append(_share(plan.get("share"), config))
    lines += plan.get("lengths") or []
    lines += [f"warning: {warning}" for warning in plan.get("warnings") or []]
    for line in lines:
        console.print(line, soft_wrap=True)
    if plan.get("price"):
        console.print(_price(plan["price"], config))
    for item in plan.get("reach") or []:
        said = f"the tightest limit on {item['name']} that would likely be certified: {item['certifiable']:.2f}"
        console.print(f"{said} (lowest mean cost {item['lowest']:.2f}, {item['lowest_by']})", soft_wrap=True)


def _price(rows: Sequence[Mapping[str, Any]], config: ExperimentConfig) -> Table:
    """What each limit would cost in reward, as the reference's samples predict it."""
    title = Text(f"what a limit on {config.constraints[0].name} costs, predicted from the reference's samples")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for head in ("limit", "λ", "reward", "KL", "samples that count", ""):
        table.add_column(head, justify="right")
    for row in rows:
        figures = (f"{row['limit']:.2f}", f"{row['lambda']:.3g}", f"{row['reward']:.2f}", f"{row['kl']:.2f}")
        note = "yours" if row["asked"] else ""
        note += "" if row["reachable"] else (", " if note else "") + "out of reach"
        table.add_row(*figures, f"{row['effective_samples']:.0f}", note)
    return table


def _estimate(stage: Mapping[str, Any]) -> str:
    value = stage.get("estimate")
    if stage["cached"] or value is None:
        return ""
    return f"{value:.0f} s" if isinstance(value, (int, float)) else str(value)


def _time(ahead: Sequence[Any], seconds: float) -> str:
    """How long the stages ahead take, as far as this store's earlier runs tell."""
    if not ahead:
        return ""
    if not seconds:
        return "; nothing like them ran in this store yet, so their time is not known"
    known = all(isinstance(value, (int, float)) for value in ahead)
    return f", {'about' if known else 'at least'} {seconds:.0f} s"


def _share(share: Mapping[str, Any] | None, config: ExperimentConfig) -> str:
    asked = f"δ = {config.certificate.delta:g}"
    if config.certificate.spending == "none":
        return f"certificate: at {asked}, for this test alone (certificate.spending is none)"
    if share is None:
        return f"certificate: at its share of {asked}, which is known once the held-out prompts are"
    among = f", divided among {share['tests']} tests" if share["tests"] > 1 else ""
    use = f"as use {share['uses']} of these prompts{among}"
    return f"certificate: at δ = {share['delta']:.3g} of the {share['asked']:g} asked, {use}"


def _margin(value: Any) -> str:
    if value is None:
        return "a margin that is planned once the reference's costs are known"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_margin, value))
    return f"{value:.3f}"

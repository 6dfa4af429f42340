"""What a sweep leaves for its readers: `report.html`, the parent's description, the saved view, the chosen alias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import ArtifactRef, Store
from cdpo_core.errors import CorruptArtifact
from cdpo_core.evaluation.result import spending_in_words
from cdpo_core.evaluation.sweep_result import line_name
from cdpo_core.plain_text import markdown_text
from cdpo_core.stages import resolve
from tasks.html_report import inlined, page, provenance, table
from tasks.prefect_records import flow_run_url, interval_cell, link_to_report, markdown_table
from tasks.report_store import FILE, copy_report, publish_report, report_key
from tasks.report_words import STATES, interval, signed
from tasks.review import VARIES, artifact_address, figure_lines, opening
from tasks.review_tracking import ReviewTracker
from tasks.review_views import review_state, saved_view

Record = Mapping[str, Any]

ALIAS = "chosen"
FIGURES = {
    "frontier": "Reward over cost: a policy for each limit, the baselines and, on the testbed, the exact optimum",
    "along_limits": "The price λ along the limits, and how far each certificate is from its limit",
}
# What a child's params in MLflow are called where it is not the config's own path.
PARAM_NAMES = {"dpo.beta": "beta", "dpo.labels": "labels", "dual.update": "update", "data.source": "data"}


def sweep_report(result: Record, figures: list[Path], links: Mapping[int, str]) -> str:
    """The report's HTML.

    Args:
        result: the sweep's record.
        figures: PNG files, put in.
        links: by place among the children, the address of a child's own report.
    """
    chosen = chosen_child(result)
    return page("sweep.html").render(
        title=f"Sweep of {result['name']}",
        status="certified" if chosen else "none",
        headline=_headline(result),
        words=[choice_in_words(result)],
        frontier=_frontier(result, chosen),
        figures=inlined(figures, FIGURES),
        children=[
            {
                "title": child["name"],
                "state": STATES[child["status"]],
                "verdict": child["verdict"],
                "chosen": child is chosen,
                "link": links.get(place, ""),
                "provenance": provenance(child),
            }
            for place, child in enumerate(result["children"])
        ],
        failed=result["failed"],
    )


def publish_sweep_report(store: Store, result: Record, folder: Path) -> ArtifactRef:
    """The sweep's report with its children's, in the store and in the folder; returns the store's reference."""
    pages = child_pages(store, result)
    links = {place: f"children/{place + 1:02d}.html" for place in pages}
    html = sweep_report(result, sorted(folder.glob("*.png")), links)
    named = {f"children/{place + 1:02d}.html": text for place, text in pages.items()}
    inputs = {child["name"]: child["policy"]["digest"] for child in result["children"] if child["policy"]}
    # The children's own reports stay as they were; so does the sweep's, as long as it says the same of them.
    key = report_key(sweep_report(_unspent(result), sorted(folder.glob("*.png")), links), sorted(named.items()))
    ref = publish_report(store, key, {FILE: html, **named}, inputs)
    copy_report(store, ref, folder)
    return ref


def child_pages(store: Store, result: Record) -> dict[int, str]:
    """The children's reports by their place; one that the store has lost is left out."""
    pages = {}
    for place, child in enumerate(result["children"]):
        try:
            pages[place] = (resolve(ArtifactRef(**child["report_artifact"]), store) / FILE).read_text(encoding="utf-8")
        except (CorruptArtifact, KeyError):
            continue
    return pages


def tell_reviewers(tracker: ReviewTracker, run_id: str, key: str, result: Record, model: str, folder: Path) -> None:
    """The parent's description, report, saved view and the alias of the choice in MLflow; a link in Prefect.

    Args:
        tracker: of the sweep.
        run_id: its MLflow run.
        key: the sweep's.
        result: its record.
        model: the registered model that the children's policies are versions of.
        folder: with `report.html` and the figures.
    """
    if not tracker.enabled:
        return
    ended = max((child["ended_ms"] for child in result["children"]), default=0)
    view = f"sweep-{key[:12]}"
    # MLflow shows a page in a frame out of which no link leads: the children's reports are linked in the description.
    tracker.log_text(run_id, sweep_report(result, sorted(folder.glob("*.png")), {}), FILE)
    tracker.tag_experiment(run_id, saved_view(view, f"Sweep of {result['name']}", _state(result, run_id), ended))
    pages = {
        "Report": tracker.run_page(run_id, f"/artifacts/{FILE}"),
        "Experiments side by side": tracker.view_page(view),
        "Prefect run": flow_run_url(),
    }
    figure = artifact_address(run_id, "figures/frontier.png") if (folder / "frontier.png").exists() else ""
    reports = [tracker.run_page(child["tracking"]["run_id"], f"/artifacts/{FILE}") for child in result["children"]]
    tracker.set_tags(run_id, {"mlflow.note.content": sweep_note(result, pages, reports, figure)})
    chosen = chosen_child(result)
    child = {"child": chosen["tracking"]["run_id"], "digest": chosen["policy"]["digest"]} if chosen else {}
    delta = {"chosen.delta": f"{result['chosen']['delta']:g}"} if chosen else {}
    tracker.point_alias(run_id, model, ALIAS, {"chosen.by": run_id, **delta}, **child)
    link_to_report(tracker.run_url(run_id, f"/artifacts/{FILE}"), key)


def sweep_note(result: Record, pages: Mapping[str, str], reports: Sequence[str], figure: str) -> str:
    """The description of a sweep's run (markdown): the choice first.

    Args:
        result: the sweep's record.
        pages: link text to address.
        reports: addresses of the children's reports.
        figure: address of the frontier, "" for none.
    """
    chosen = chosen_child(result)
    cells = [
        [
            _bold(f"[{markdown_text(_limit_cell(point))}]({report})", child is chosen),
            STATES[point["status"]],
            signed(point["lambda"], ".3g"),
            interval_cell(point["reward"]),
            interval_cell(point["cost"]),
        ]
        for point, child, report in zip(result["frontier"], result["children"], reports, strict=True)
    ]
    heads = ["limit", "verdict", "λ", "reward", "cost"]
    said = markdown_text(choice_in_words(result))
    parts = [opening(markdown_text(_headline(result)), pages), said, markdown_table(heads, cells)]
    return "\n\n".join([*parts, *figure_lines("reward over cost", figure)])


def choice_in_words(result: Record) -> str:
    """Why this policy of the sweep was chosen, or none."""
    tried = len(result["children"]) + len(result["failed"])
    if not result["chosen"]:
        return f"No policy is certified when the error probability is shared among the {tried} experiments."
    reward, delta = signed(result["chosen"]["test"]["reward"]["mean"]), result["chosen"]["delta"]
    certificate = (chosen_child(result) or {}).get("certificate") or {}
    if certificate.get("spending") == "squares":
        return (
            f"Of the certified policies it earns the most reward on test prompts ({reward}). "
            f"{spending_in_words(certificate)} So the choice among the {tried} experiments is paid for."
        )
    return (
        f"Of the policies that are still certified at δ = {delta:.3g}, the error probability divided by the {tried} "
        f"experiments that one is picked from, it earns the most reward on test prompts ({reward})."
    )


def chosen_child(result: Record) -> Record | None:
    """The child whose policy the sweep chose."""
    chosen = result["chosen"]
    if not chosen:
        return None
    same = ("limit", "settings", "policy")
    return next(child for child in result["children"] if all(child[key] == chosen[key] for key in same))


def _headline(result: Record) -> str:
    chosen = result["chosen"]
    return f"Chosen: the policy of {_named(chosen)}" if chosen else "No policy was chosen"


def _named(point: Record) -> str:
    settings = line_name(point["settings"])
    return f"limit {signed(point['limit'], 'g')}" + (f" ({settings})" if settings else "")


def _limit_cell(point: Record) -> str:
    return ", ".join(filter(None, [signed(point["limit"], "g"), line_name(point["settings"])]))


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _frontier(result: Record, chosen: Record | None) -> dict[str, Any]:
    knows_truth = any(point["true_cost"] is not None for point in result["frontier"])
    heads = ["limit", "verdict", "λ", "reward", "cost", "bound", *["true cost", "captured"] * knows_truth]
    rows, ours = [], ""
    for point, child in zip(result["frontier"], result["children"], strict=True):
        captured = point["captured"]
        truth = [signed(point["true_cost"]), "–" if captured is None else f"{100 * captured:.1f} %"]
        rows.append(
            [
                _limit_cell(point),
                STATES[point["status"]],
                signed(point["lambda"], ".3g"),
                interval(point["reward"]),
                interval(point["cost"]),
                signed((point["certificate"] or {}).get("upper"), ".3f"),
                *truth * knows_truth,
            ]
        )
        ours = rows[-1][0] if child is chosen else ours
    notes = [
        "Reward and cost are means over test prompts with 95 % intervals. The bound is each experiment's own "
        "certificate; picking the best of several certified policies is several tests, so the error probability is "
        "divided among them."
    ]
    return table(heads, rows, notes, ours)


def _state(result: Record, run_id: str) -> dict[str, Any]:
    """The saved view: the sweep's children alone, over what it varies."""
    children = result["children"]
    costs = [item["name"] for item in children[0]["constraints"]] if children else []
    several = len(costs) > 1
    varied = [PARAM_NAMES.get(path, path) for child in children[:1] for path in child["settings"]]
    names = [*(f"limit.{name}" for name in costs if several), *VARIES, *varied]
    params = [name for name in dict.fromkeys(names) if not (several and name == "limit")]
    return review_state(params, costs if several else (), run_id)


def _unspent(result: Record) -> dict[str, Any]:
    """The record without what other experiments change: how often the held-out prompts were used."""
    return {**result, "children": [{**child, "verdict": ""} for child in result["children"]]}

"""What a reviewer reads in MLflow: descriptions in words with links, the data as inputs, the saved view."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.evaluation.result import mean_figures, verdict
from cdpo_core.plain_text import markdown_text
from tasks.prefect_records import interval_cell, markdown_table
from tasks.records import Prepared, Scored
from tasks.report_words import explained, headline
from tasks.review_views import review_state, saved_view
from tasks.workbench import Workbench

VARIES = ("limit", "beta", "seed")
VIEW = "review"
EXPERIMENT_NOTE = (
    "Constrained DPO: each run is an experiment (from data to a policy tested against its limit) or a sweep, with its "
    "experiments as children. The saved view [Review]({view}) shows λ, cost against limit, and reward of all of them."
)


def run_note(result: Mapping[str, Any], pages: Mapping[str, str], figure: str) -> str:
    """The description of an experiment's run (markdown): the verdict and the links first.

    Args:
        result: the result record.
        pages: link text to address.
        figure: address of the figure below the table, "" for none.
    """
    heads = mean_figures(result)
    rows = {**result["baselines"], **({"**this policy**": result["test"]} if result["test"] else {})}
    cells = [[name, *(interval_cell(row.get(key)) for key in heads.values())] for name, row in rows.items()]
    said = [opening(markdown_text(headline(result)), pages), *map(markdown_text, explained(result))]
    parts = [*said, markdown_table(["method", *heads], cells)]
    return "\n\n".join([*parts, *figure_lines("λ and cost against the limit", figure)])


def version_note(result: Mapping[str, Any], page: str) -> str:
    """The description of a registered policy: what is certified of it, and the commands for it (markdown)."""
    stage, key = result["policy"]["uri"].removesuffix(".json").split("/")[-2:]
    # The list of versions shows the first words as plain text.
    parts = [markdown_text(text) for text in (verdict(result), *explained(result)[1:])]
    parts += [f"The weights are in the artifact store: `cdpo export {stage}/{key[:12]} DIR` writes them as a folder."]
    return "\n\n".join([*parts, f"[The run]({page})"])


def datasets(bench: Workbench, prepared: Prepared, scored: Scored) -> list[dict[str, str]]:
    """The data that a run reads and how it was split, as `ReviewTracker.log_datasets` takes them."""
    config = bench.config
    prompts = bench.table(prepared.data, "prompts")
    parts = prompts["split"].value_counts().sort_index()
    profile = {"pairs": len(bench.table(prepared.data, "preferences")), "prompts": len(prompts)}
    profile |= {f"prompts: {name}": int(count) for name, count in parts.items()}
    splits = bench.table(scored.splits, "splits")["split"].value_counts().sort_index()
    name = f"testbed, seed {config.testbed.seed}" if config.on_testbed else Path(config.data.source).name
    return [
        _dataset(name, prepared.data, profile, "preferences"),
        _dataset(
            f"splits of {name}", scored.splits, {f"prompts: {key}": int(n) for key, n in splits.items()}, "splits"
        ),
    ]


def review_view(costs: Sequence[str], time_ms: int) -> dict[str, str]:
    """The experiment's saved view on all experiments, as its tag."""
    named = costs if len(costs) > 1 else []
    params = [*(f"limit.{name}" for name in named), *VARIES] if named else list(VARIES)
    return saved_view(VIEW, "Review", review_state([p for p in params if p != "limit" or not named], named), time_ms)


def artifact_address(run_id: str, path: str) -> str:
    """Where MLflow's server hands out a run's file, within its UI."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"


def _dataset(name: str, ref: ArtifactRef, profile: Mapping[str, int], context: str) -> dict[str, str]:
    source = json.dumps({"uri": ref.uri})
    return {
        "name": name,
        "digest": ref.digest,
        "source": source,
        "source_type": "s3" if ref.uri.startswith("s3://") else "local",
        "profile": json.dumps(profile),
        "context": context,
    }


def opening(headline: str, pages: Mapping[str, str]) -> str:
    """The verdict and the links in one line (markdown), which MLflow shows of a folded description.

    Args:
        headline: a few words.
        pages: link text to address, "" for those that lead nowhere.
    """
    return " · ".join([f"**{headline}**", *(f"[{text}]({address})" for text, address in pages.items() if address)])


def figure_lines(title: str, address: str) -> list[str]:
    """A picture (markdown), or nothing without an address."""
    return [f"![{title}]({address})"] if address else []

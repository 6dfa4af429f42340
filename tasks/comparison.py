"""A comparison's own work: what a method's training cost, how its settings are judged, its records and pages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.evaluation.comparison_figure import comparison_figure
from cdpo_core.evaluation.measure import Measured
from cdpo_core.plain_text import markdown_text
from tasks.environment import cdpo_home
from tasks.journal import tell_failure
from tasks.metric_points import MetricPoint
from tasks.prefect_records import (
    announce_run,
    flow_run_url,
    interval_cell,
    link_to_mlflow,
    markdown_table,
    show_markdown,
)
from tasks.report import report_folder, write_json, written_whole
from tasks.tracking import Tracker, experiment_key
from tasks.workbench import Workbench, open_workbench


def compute_spent(bench: Workbench, refs: Sequence[ArtifactRef]) -> dict[str, float]:
    """What it took to make these artifacts, each counted once, whenever and by whomever they were made.

    Returns:
        updates (optimizer steps of a policy), generated_tokens, cpu_seconds (of the computing processes).
    """
    spent = {"updates": 0.0, "generated_tokens": 0.0, "cpu_seconds": 0.0}
    for ref in {ref.uri: ref for ref in refs}.values():
        spent["cpu_seconds"] += bench.cpu_seconds(ref)
        if ref.kind in ("policy", "conditional-policy"):
            training = json.loads((bench.folder(ref) / "training.json").read_text())
            spent["updates"] += training["updates"] if "updates" in training else training["steps"][-1]["step"]
            spent["generated_tokens"] += training.get("generated_tokens", 0)
        elif ref.kind == "responses":
            spent["generated_tokens"] += float(bench.table(ref, "responses")["tokens"].map(len).sum())
    return spent


def value_on(measured: Measured, names: Sequence[str], lambda_: Sequence[float], beta: float) -> float:
    """E[r] − λᵀE[c] − β KL(π‖π_ref) on measured prompts: what a method's training is to make large."""
    price = sum(value * measured.cost(name).mean for value, name in zip(lambda_, names, strict=True))
    return measured.reward().mean - price - beta * measured.kl().mean


class ComparisonJournal:
    """The parent's MLflow run, a child run for each method, and the Prefect artifact; all may be repeated."""

    def __init__(self, config: ExperimentConfig, identity: Mapping[str, Any]) -> None:
        self.config = config
        self.bench = bench = open_workbench(config)
        base = experiment_key(config, bench.external_digests())
        self.key = hashlib.sha256(json.dumps(["compare", base, identity], sort_keys=True).encode()).hexdigest()[:32]
        announce_run(self.key)
        self.tracker = Tracker.open(config.tracking, bench.store, cdpo_home())
        self.run_id = self.tracker.run_for(self.key, f"comparison of {config.name}", prefect_url=flow_run_url())
        self.tracker.log_params(self.run_id, {name: ", ".join(map(str, values)) for name, values in identity.items()})
        link_to_mlflow(self.tracker.run_url(self.run_id), self.key)

    def record(self) -> dict[str, str]:
        """Where the parent run is."""
        return {"run_id": self.run_id, "uri": self.tracker.uri, "url": self.tracker.run_url(self.run_id)}

    def closed(self, result: Mapping[str, Any], ended_ms: int) -> Path:
        """Table, figure and records as files, MLflow artifacts and a Prefect artifact; returns the folder."""
        folder = report_folder(self.key, f"comparison-{self.config.name}")
        markdown = comparison_markdown(result["table"])
        with written_whole(folder) as drafts:
            (drafts / "comparison.md").write_text(markdown + "\n", encoding="utf-8")
            comparison_figure(result["table"], result["exact_frontier"], drafts / "comparison.png")
            write_json(result, drafts / "result.json")
        for name in ("comparison.md", "comparison.png", "result.json"):
            self.tracker.log_file(self.run_id, folder / name, f"comparison/{name}")
        for method in dict.fromkeys(row["method"] for row in result["table"]):
            self._method_run(method, result["table"], ended_ms)
        show_markdown(f"comparison-{self.key}", markdown, "methods side by side at each limit")
        self.tracker.finish(self.run_id, "FINISHED", ended_ms)
        return folder

    def failed(self) -> None:
        """The comparison ended by an error; the same command continues it."""
        tell_failure(self.tracker, self.run_id)

    def _method_run(self, method: str, table: Sequence[Mapping[str, Any]], ended_ms: int) -> None:
        rows = [row for row in table if row["method"] == method]
        key = hashlib.sha256(f"{self.key} {method}".encode()).hexdigest()[:32]
        run_id = self.tracker.run_for(key, rows[0]["title"], parent_run_id=self.run_id)
        points = []
        for step, row in enumerate(rows):
            values = {
                f"compare/{name}": (row[name] or {}).get("mean")
                for name in ("reward", "objective", "cost", "kl", "captured")
            }
            values |= {"compare/limit": row["limit"], "compare/kept": row["kept"] / row["seeds"]}
            values |= {f"compare/{name}": value for name, value in row["compute"].items()}
            points += [
                MetricPoint(name, float(value), step, ended_ms) for name, value in values.items() if value is not None
            ]
        self.tracker.log_points(run_id, points)
        self.tracker.finish(run_id, "FINISHED", ended_ms)


HEADS = (
    "limit",
    "method",
    "kept",
    "reward",
    "ours ahead by",
    "reward − β KL",
    "ours ahead by",
    "cost",
    "captured",
    "rounds",
    "updates",
    "tokens",
    "CPU s",
)


def comparison_rows(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text, one list of cells a row under `HEADS`."""
    return [
        [
            f"{row['limit_name']} ({row['limit']:.2f})",
            row["title"],
            f"{row['kept']}/{row['seeds']}",
            interval_cell(row["reward"]),
            interval_cell(row["ahead"]),
            interval_cell(row["objective"]),
            interval_cell(row["ahead_objective"]),
            interval_cell(row["cost"]),
            "" if row["captured"] is None else f"{row['captured']['mean']:.3f}",
            "" if row["rounds"] is None else f"{row['rounds']['mean']:.1f}",
            f"{row['compute']['updates']:.0f}",
            f"{row['compute']['generated_tokens'] / 1e6:.2f} M",
            f"{row['compute']['cpu_seconds']:.0f}",
        ]
        for row in table
    ]


def comparison_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    return markdown_table(list(HEADS), [[markdown_text(cell) for cell in row] for row in comparison_rows(table)])

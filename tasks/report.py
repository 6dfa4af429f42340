"""The report: the result record, the figures and the samples table, as files under the state folder."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.evaluation import figures
from cdpo_core.evaluation.measure import Measured
from cdpo_core.evaluation.result import cost_figures
from cdpo_core.tables import write_table
from tasks.dual import OfflinePlan, predicted_curve
from tasks.environment import cdpo_home
from tasks.html_report import experiment_report
from tasks.records import Prepared
from tasks.report_store import FILE, copy_report, publish_report, report_key
from tasks.workbench import Workbench


def report_folder(key: str, name: str) -> Path:
    """Where an experiment's or sweep's report goes: `reports/<name>-<key>` under the state folder."""
    # A name is free text; only what every file system takes in a file's name goes into the path.
    slug = re.sub(r"[^\w.=≤-]+", "-", name).strip("-.")[:60]
    folder = cdpo_home() / "reports" / f"{slug or 'report'}-{key[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder whose files move into `folder` when the block ends without error, each at once.

    Two attempts at one run write the same report; neither may read what the other has half written.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as drafts:
        yield Path(drafts)
        for file in sorted(path for path in Path(drafts).rglob("*") if path.is_file()):
            target = folder / file.relative_to(drafts)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write a record into a folder that nobody else reads yet (`written_whole`)."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_figures(
    bench: Workbench,
    result: Mapping[str, Any],
    plan: OfflinePlan,
    history: list[Any],
    test: Mapping[str, Measured],
    folder: Path,
) -> None:
    """The lambda trajectory; for each constraint reward and cost per round, the predicted cost curve, the histogram.

    The first constraint's files have no suffix, another's ends in its name.
    """
    names = bench.names
    limits = [item.limit for item in bench.config.constraints]
    rounds = result["rounds"]
    if rounds:
        figures.lambda_trajectory(rounds, names, limits, folder / "lambda_trajectory.png")
    lambdas, costs = predicted_curve(plan)
    figures.price_of_limits(plan.price, limits[0], folder / "price_of_limits.png", names[0])
    headings = cost_figures(result)
    for index, (limit, (name, figure)) in enumerate(zip(limits, headings.items(), strict=True)):
        suffix = f"_{name}" if index else ""
        rows = {method: {"reward": row["reward"], "cost": row[figure]} for method, row in result["baselines"].items()}
        path = folder / f"reward_and_cost{suffix}.png"
        figures.reward_and_cost_per_round(rounds, limit, path, rows, index, name)
        measured = [(max(item.lambda_), item.cost[index], item.half_width[index]) for item in history]
        path, what = folder / f"predicted_cost{suffix}.png", "λ" if len(names) == 1 else "largest λ"
        figures.predicted_curve(lambdas, costs[:, index], limit, path, measured, names[index], what)
        columns = {method: item.costs(names)[:, index] for method, item in test.items()}
        what = f"{name} of a response"
        figures.cost_histogram(columns, limit, folder / f"cost_histogram{suffix}.png", what)


def write_samples(bench: Workbench, prepared: Prepared, test: Mapping[str, Measured], folder: Path) -> None:
    """The first answers of the reference and of the policy to some test prompts, side by side."""
    if "policy" not in test:
        return
    prompts = bench.table(prepared.data, "prompts").set_index("prompt_id")["prompt"]
    shown: int = bench.config.evaluation.samples_shown
    columns = ["prompt_id", "response", "reward", *(f"cost_{name}" for name in bench.names)]
    sides = []
    for name in ("reference", "policy"):
        first = test[name].table.query("sample == 0")[columns].set_index("prompt_id")
        sides.append(first.add_prefix(f"{name}_"))
    table = pd.concat(sides, axis=1)
    # Evenly spaced over the reference's cost, so that the table shows harmless and harmful prompts alike.
    order = table[f"reference_cost_{bench.names[0]}"].argsort(kind="stable").to_numpy()
    rows = order[np.unique(np.linspace(0, len(order) - 1, min(shown, len(order))).round().astype(int))]
    chosen = table.iloc[rows].reset_index()
    chosen.insert(1, "prompt", chosen["prompt_id"].map(prompts))
    write_table(chosen.round(4), folder / "samples.parquet")


def write_report(bench: Workbench, result: Mapping[str, Any], folder: Path) -> ArtifactRef:
    """The report for people, `report.html`, in the store and in the folder; returns the store's reference.

    Args:
        bench: of the experiment.
        result: its result record.
        folder: with its figures and samples.
    """
    figures_ = sorted(folder.glob("*.png"))
    table = folder / "samples.parquet"
    samples = pd.read_parquet(table) if table.exists() else None
    html = experiment_report(result, bench.config, figures_, samples)
    # How often the held-out prompts were used grows with other experiments; this one's report stays as it was.
    key = report_key(experiment_report(_unspent(result), bench.config, figures_, samples))
    inputs = {name: result[name]["digest"] for name in ("data", "pool_scores", "policy") if result[name]}
    ref = publish_report(bench.store, key, {FILE: html}, inputs)
    copy_report(bench.store, ref, folder)
    return ref


def _unspent(result: Mapping[str, Any]) -> dict[str, Any]:
    def without(certificate: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None if certificate is None else {**certificate, "spent": None}

    constraints = [{**item, "certificate": without(item["certificate"])} for item in result["constraints"]]
    return {**result, "certificate": without(result["certificate"]), "constraints": constraints}

"""A sweep's own work: the frontier, the choice among the children, the parent's records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.evaluation import sweep_figures
from cdpo_core.evaluation.instrument import failed_units
from cdpo_core.evaluation.result import cost_figures
from cdpo_core.evaluation.sweep_result import choice_words, exact_frontier, line_name
from cdpo_core.plain_text import markdown_text
from tasks.environment import cdpo_home
from tasks.evaluation import certificates_of, foreseen_then
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
from tasks.review_tracking import ReviewTracker
from tasks.rounds import measured_from
from tasks.sweep_review import publish_sweep_report, tell_reviewers
from tasks.tracking import experiment_key
from tasks.uses import enter_run
from tasks.workbench import Workbench, open_workbench

# What a child's MLflow run names by itself.
PARAMS_OF_A_CHILD = ("seed", "testbed.seed", "dpo.beta", "dpo.labels", "dual.update", "data.source")


def choose_for_sweep(found: Sequence[tuple[ExperimentConfig, Mapping[str, Any]]], tested: int) -> dict[str, Any] | None:
    """The certified child with the most test reward when delta is split over all of them; None without one.

    Choosing the best of several tested policies is several tests, so each must pass at delta / number of tests
    (Bonferroni). Children that drew one share of delta together were tested at that (`tasks.ledger`).

    Args:
        found: the children that have a result record, with their configs.
        tested: how many children the sweep has, with those that have no result yet.
    """
    passed = []
    for config, child in found:
        if child["status"] != "certified":
            continue
        is_divided = config.certificate.spending != "none"
        delta = child["certificate"]["delta"] if is_divided else config.certificate.delta / tested
        if is_divided or _passes_at(open_workbench(config), child, delta):
            passed.append((child, delta))
    if not passed:
        return None
    best, delta = max(passed, key=lambda item: item[0]["test"]["reward"]["mean"])
    return {key: best[key] for key in ("limit", "settings", "lambda", "policy", "test")} | {"delta": delta}


def _passes_at(bench: Workbench, child: Mapping[str, Any], delta: float) -> bool:
    evidence = [ArtifactRef(**source) for source in child["certificate"]["evidence"]]
    limits = [item["limit"] for item in child["constraints"]]
    pool_scores, measured = ArtifactRef(**child["pool_scores"]), measured_from(bench, *evidence)
    foreseen = [foreseen_then(item["certificate"]) for item in child["constraints"]]
    certificates = certificates_of(bench, pool_scores, measured, limits, delta, foreseen)
    return all(item.passed for item in certificates) and not any(
        failed_units(name, child["scorers"].get(name, {}), limit, item.upper, others)
        for (name, limit, others), item in zip(_without_limit(child), certificates, strict=True)
    )


def _without_limit(child: Mapping[str, Any]) -> list[tuple[str, float, list[float]]]:
    """Each constraint's name, limit, and mean test costs of the policies that were made without it."""
    keys = cost_figures(child).values()
    return [
        (item["name"], item["limit"], [row[key]["mean"] for row in child["baselines"].values()])
        for item, key in zip(child["constraints"], keys, strict=True)
    ]


def sweep_key(config: ExperimentConfig, limits: Sequence[float], varied: Sequence[Mapping[str, Any]]) -> str:
    """What makes two sweeps the same one, hex.

    Args:
        config: what all children start from.
        limits: of the first constraint.
        varied: the combinations' settings; one empty one when nothing varies besides the limit.
    """
    first, *others = config.constraints
    shared = config.model_copy(update={"constraints": [first.model_copy(update={"limit": 0.0}), *others]})
    base: list[Any] = [experiment_key(shared, open_workbench(config).external_digests()), list(limits)]
    base += [list(varied)] if any(varied) else []
    return hashlib.sha256(json.dumps(["sweep", *base]).encode()).hexdigest()[:32]


class SweepJournal:
    """The parent's MLflow run and Prefect artifacts; every method may be repeated without harm."""

    def __init__(
        self, config: ExperimentConfig, limits: Sequence[float], varied: Sequence[Mapping[str, Any]] = ({},)
    ) -> None:
        self.config = config
        self.bench = bench = open_workbench(config)
        self.key = sweep_key(config, limits, varied)
        announce_run(self.key)
        self.tracker = ReviewTracker.open(config.tracking, bench.store, cdpo_home())
        name = f"sweep of {config.name}"
        self.run_id = self.tracker.run_for(self.key, name, prefect_url=flow_run_url())
        params = {"limits": ", ".join(f"{limit:g}" for limit in limits), "seed": str(config.seed)}
        for path in varied[0]:
            params[path] = ", ".join(dict.fromkeys(str(settings[path]) for settings in varied))
        self.tracker.log_params(self.run_id, params)
        link_to_mlflow(self.tracker.run_url(self.run_id), self.key)

    def record(self) -> dict[str, str]:
        """Where the parent run is."""
        return {"run_id": self.run_id, "uri": self.tracker.uri, "url": self.tracker.run_url(self.run_id)}

    def child_ended(self, child: Mapping[str, Any]) -> None:
        """What a child's MLflow run does not say of its settings by itself, so that the UI compares children by it."""
        params = {path: str(value) for path, value in child["settings"].items() if path not in PARAMS_OF_A_CHILD}
        if params and child["tracking"]["run_id"]:
            self.tracker.log_params(child["tracking"]["run_id"], params)

    def closed(self, result: dict[str, Any]) -> Path:
        """Figures, table, points (step = place of the child), the choice and the report; returns the folder."""
        folder = report_folder(self.key, f"sweep-{self.config.name}")
        with written_whole(folder) as drafts:
            self._draw(result, drafts)
            result["report_artifact"] = publish_sweep_report(self.bench.store, result, drafts).model_dump()
            write_json(result, drafts / "result.json")
        self.tracker.log_points(self.run_id, _points(result))
        failed = ", ".join(item["name"] for item in result["failed"])
        chosen = json.dumps(result["chosen"] and result["chosen"]["limit"])
        self.tracker.set_tags(self.run_id, {"chosen": chosen, "failed": failed})
        model = self.config.tracking.model_name or f"cdpo-{self.config.name}"
        tell_reviewers(self.tracker, self.run_id, self.key, result, model, folder)
        show_markdown(f"frontier-{self.key[:12]}", _markdown(result), "reward over cost along the limits")
        ended = max((child["ended_ms"] for child in result["children"]), default=0)
        report = ArtifactRef(**result["report_artifact"])
        facts = {"ended_ms": ended, "tracking": self.record()}
        enter_run(self.bench.store, "sweep", self.key, self.config.name, [(report, "report")], facts)
        self.tracker.finish(self.run_id, "FAILED" if result["failed"] else "FINISHED", ended)
        return folder

    def failed(self) -> None:
        """The sweep ended by an error; the same command continues it."""
        tell_failure(self.tracker, self.run_id)

    def _draw(self, result: Mapping[str, Any], folder: Path) -> None:
        if not result["children"]:
            return
        lines, exact = _lines(result["frontier"]), _exact_lines(result["children"])
        drawn = {name: [point for point in points if point["cost"] is not None] for name, points in lines.items()}
        first = result["children"][0]["baselines"]
        # The baselines are no policies of a seed's or a beta's own: beside several lines they say nothing.
        baselines = {name: {"reward": row["reward"], "cost": row["cost"]} for name, row in first.items()}
        if any(drawn.values()):
            sweep_figures.frontier(drawn, folder / "frontier.png", exact, baselines if len(lines) == 1 else None)
            sweep_figures.along_limits(lines, folder / "along_limits.png", self.config.constraints[0].name)
            for name in ("frontier.png", "along_limits.png"):
                self.tracker.log_file(self.run_id, folder / name, f"figures/{name}")


def _lines(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The points by combination."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        lines.setdefault(line_name(point["settings"]), []).append(point)
    return lines


def _exact_lines(children: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Each combination's exact frontier; one for all when they are the same."""
    lines: dict[str, list[list[float]]] = {}
    for child in children:
        name, found = line_name(child["settings"]), exact_frontier([child])
        if name not in lines and found and found not in lines.values():
            lines[name] = found
    return lines


def _points(result: Mapping[str, Any]) -> list[MetricPoint]:
    points = []
    for point, child in zip(result["frontier"], result["children"], strict=True):
        values = {"frontier/limit": point["limit"], "frontier/lambda": point["lambda"]}
        values |= {f"frontier/{name}": (point[name] or {}).get("mean") for name in ("reward", "cost")}
        values["frontier/cost_upper"] = (point["certificate"] or {}).get("upper")
        values["frontier/certified"] = point["certified"]
        for name, value in values.items():
            if value is not None:
                points.append(MetricPoint(name, float(value), child["number"], child["ended_ms"]))
    return points


def _markdown(result: Mapping[str, Any]) -> str:
    rows = [
        [
            ", ".join(filter(None, [f"{point['limit']:g}", markdown_text(line_name(point["settings"]))])),
            point["status"].replace("_", " "),
            "" if point["lambda"] is None else f"{point['lambda']:g}",
            interval_cell(point["reward"]),
            interval_cell(point["cost"]),
            "" if point["certificate"] is None else f"{point['certificate']['upper']:.2f}",
        ]
        for point in result["frontier"]
    ]
    rows += [[markdown_text(item["name"]), "failed", "", "", "", ""] for item in result["failed"]]
    table = markdown_table(["limit", "status", "λ", "reward", "cost", "bound"], rows)
    parts = [f"## {markdown_text(choice_words(result))}", table]
    parts += [
        f"- **{markdown_text(item['name'])}** failed: {markdown_text((item['error'].splitlines() or [''])[0])}"
        for item in result["failed"]
    ]
    return "\n\n".join(parts)

"""A sweep's own work: the frontier, the choice among the children, the parent's records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.evaluation import figures
from tasks.environment import cdpo_home
from tasks.evaluation import certificates_of
from tasks.journal import tell_failure
from tasks.metric_points import MetricPoint
from tasks.prefect_records import announce_run, flow_run_url, link_to_mlflow, markdown_table, show_markdown
from tasks.report import report_folder, write_json
from tasks.rounds import measured_from
from tasks.tracking import Tracker, experiment_key
from tasks.workbench import Workbench, open_workbench


def frontier_points(children: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point a child: its limit, lambda, test reward and cost, the truth where it is known."""
    return [
        {
            "limit": child["limit"],
            "status": child["status"],
            "certified": child["status"] == "certified",
            "lambda": child["lambda"],
            "reward": (child["test"] or {}).get("reward"),
            "cost": (child["test"] or {}).get("cost"),
            "true_reward": child["oracle"].get("true_reward"),
            "true_cost": child["oracle"].get("true_cost"),
            "captured": child["oracle"].get("captured"),
        }
        for child in children
    ]


def exact_frontier(children: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[cost, reward] of the exact optimum along the limits on the testbed, from loose to tight; [] elsewhere."""
    known = [child["oracle"]["frontier"] for child in children if child["oracle"].get("frontier")]
    return sorted([point["cost"], point["reward"]] for point in known[0]) if known else []


def choose_for_sweep(bench: Workbench, children: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The certified child with the most test reward when delta is split over all limits; None without one.

    Choosing the best of several tested policies is several tests, so each must pass at
    delta / number of limits (Bonferroni).
    """
    delta = bench.config.certificate.delta / len(children)
    passed = [child for child in children if child["status"] == "certified" and _passes_at(bench, child, delta)]
    if not passed:
        return None
    best = max(passed, key=lambda child: child["test"]["reward"]["mean"])
    return {key: best[key] for key in ("limit", "lambda", "policy", "test")} | {"delta": delta}


def _passes_at(bench: Workbench, child: Mapping[str, Any], delta: float) -> bool:
    evidence = [ArtifactRef(**source) for source in child["certificate"]["evidence"]]
    limits = [item["limit"] for item in child["constraints"]]
    data = ArtifactRef(**child["data"])
    pool_scores = ArtifactRef(**child["pool_scores"])
    certificates = certificates_of(bench, data, pool_scores, measured_from(bench, *evidence), limits, delta)
    return all(item.passed for item in certificates)


class SweepJournal:
    """The parent's MLflow run and Prefect artifacts; every method may be repeated without harm."""

    def __init__(self, config: ExperimentConfig, limits: Sequence[float]) -> None:
        self.config = config
        self.bench = bench = open_workbench(config)
        first, *others = config.constraints
        shared = config.model_copy(update={"constraints": [first.model_copy(update={"limit": 0.0}), *others]})
        base = [experiment_key(shared, bench.external_digests()), list(limits)]
        self.key = hashlib.sha256(json.dumps(["sweep", *base]).encode()).hexdigest()[:32]
        announce_run(self.key)
        self.tracker = Tracker.open(config.tracking, bench.store, cdpo_home())
        name = f"sweep of {config.name}"
        self.run_id = self.tracker.run_for(self.key, name, prefect_url=flow_run_url())
        params = {"limits": ", ".join(f"{limit:g}" for limit in limits), "seed": str(config.seed)}
        self.tracker.log_params(self.run_id, params)
        link_to_mlflow(self.tracker.run_url(self.run_id), self.key)

    def record(self) -> dict[str, str]:
        """Where the parent run is."""
        return {"run_id": self.run_id, "uri": self.tracker.uri, "url": self.tracker.run_url(self.run_id)}

    def closed(self, result: Mapping[str, Any]) -> Path:
        """The frontier as figure, table and points (step = place of the limit), and the choice; returns the folder."""
        folder = report_folder(self.key, f"sweep-{self.config.name}")
        drawn = [point for point in result["frontier"] if point["cost"] is not None]
        if drawn:
            first = result["children"][0]["baselines"]
            baselines = {name: {"reward": row["reward"], "cost": row["cost"]} for name, row in first.items()}
            exact = [tuple(point) for point in result["exact_frontier"]]
            figures.frontier(drawn, folder / "frontier.png", exact, baselines)
            self.tracker.log_file(self.run_id, folder / "frontier.png", "figures/frontier.png")
        write_json(result, folder / "result.json")
        self.tracker.log_points(self.run_id, _points(result))
        self.tracker.set_tags(self.run_id, {"chosen": json.dumps(result["chosen"] and result["chosen"]["limit"])})
        show_markdown(f"frontier-{self.key}", _markdown(result), "reward over cost along the limits")
        self.tracker.finish(self.run_id, "FINISHED", max(child["ended_ms"] for child in result["children"]))
        return folder

    def failed(self) -> None:
        """The sweep ended by an error; the same command continues it."""
        tell_failure(self.tracker, self.run_id)


def _points(result: Mapping[str, Any]) -> list[MetricPoint]:
    points = []
    for step, (point, child) in enumerate(zip(result["frontier"], result["children"], strict=True)):
        values = {"frontier/limit": point["limit"], "frontier/lambda": point["lambda"]}
        values |= {f"frontier/{name}": (point[name] or {}).get("mean") for name in ("reward", "cost")}
        time = child["ended_ms"]
        points += [MetricPoint(name, float(value), step, time) for name, value in values.items() if value is not None]
    return points


def _markdown(result: Mapping[str, Any]) -> str:
    def mean(figure: Mapping[str, float] | None) -> str:
        return "" if figure is None else f"{figure['mean']:.2f}"

    rows = [
        [f"{p['limit']:g}", p["status"].replace("_", " "), f"{p['lambda'] or 0:g}", mean(p["reward"]), mean(p["cost"])]
        for p in result["frontier"]
    ]
    chosen = result["chosen"]
    words = f"Chosen: limit {chosen['limit']:g}" if chosen else "No policy is certified at delta / number of limits"
    return f"## {words}\n\n{markdown_table(['limit', 'status', 'λ', 'reward', 'cost'], rows)}"

"""Saved views of MLflow's UI: which runs, columns and charts it opens on.

MLflow itself has no call for them. Its UI keeps each as a tag of the experiment, `mlflow.sharedViewState.<key>`, lists
them under *Views*, and opens one by `?viewStateShareKey=<key>`; these are written as MLflow 3.17's UI writes them. The
charts of a single run's page cannot be arranged from here: they go by the metrics' names.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

VIEW_TAG = "mlflow.sharedViewState."
# Folded below the review's own charts; a section is what stands before a metric's last slash.
SECTIONS = ("dual", "policy", "returned", "test", "oracle", "scorer/harm", "scorer/reward", "train", "frontier")
OWN_SECTION = "Review"
FIGURES = ("test/reward", "test/cost")
EXPERIMENTS = "tags.status LIKE '%'"


def saved_view(key: str, name: str, state: Mapping[str, Any], time_ms: int) -> dict[str, str]:
    """The experiment's tag that holds a view.

    Args:
        key: names it in an address; letters, digits and dashes.
        name: shown under *Views*.
        state: `review_state`'s.
        time_ms: when it was made; the same view has the same time, so that it is written once.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    envelope = {"name": name, "createdAt": time_ms, "updatedAt": time_ms, "state": f"deflate;{packed}"}
    return {VIEW_TAG + key: json.dumps(envelope)}


def review_state(params: Sequence[str], costs: Sequence[str] = (), parent_run_id: str = "") -> dict[str, Any]:
    """Charts of λ, of cost against limit and of reward, and parallel coordinates; the columns to go with them.

    The charts go by round. Those of a sweep, whose children mostly need one round only, have a point for each child: λ
    and cost over the limit, reward over cost, of the policy that it returned, which table and tags speak of too.

    Args:
        params: what varies, for parallel coordinates and columns (limit, beta, seed).
        costs: with several constraints their names, else none.
        parent_run_id: only the children of this sweep; "" is every experiment.
    """
    suffixes = [f"/{name}" for name in costs] or [""]
    charts = _over_limits(suffixes) if parent_run_id else _by_round(suffixes)
    charts.append(_parallel(params))
    sections = [_section(OWN_SECTION, shown=True)]
    sections += [_section(name, shown=False) for name in (*SECTIONS, "Model metrics", "System metrics")]
    columns = ["tags.`status`", *(f"params.`{name}`" for name in params), *(f"metrics.`{name}`" for name in FIGURES)]
    return {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent_run_id}'" if parent_run_id else EXPERIMENTS,
        # Params are compared as text, so the order by limit is that of its metric; any order but by time lists
        # children beside each other instead of folded under their parent.
        "orderByKey": f"metrics.`{'returned' if parent_run_id else 'dual'}/limit{suffixes[0]}`",
        "orderByAsc": True,
        "selectedColumns": columns,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
    }


def _by_round(suffixes: Sequence[str]) -> list[dict[str, Any]]:
    return [
        _line("lambda", *(f"dual/lambda{suffix}" for suffix in suffixes)),
        *(_line(f"cost{index}", f"dual/cost{s}", f"dual/limit{s}") for index, s in enumerate(suffixes)),
        _line("reward", "dual/reward"),
    ]


def _over_limits(suffixes: Sequence[str]) -> list[dict[str, Any]]:
    over = [
        _scatter(f"{name}{index}", f"returned/limit{suffix}", f"returned/{name}{suffix}")
        for name in ("lambda", "cost")
        for index, suffix in enumerate(suffixes)
    ]
    rewards = [_scatter(f"reward{index}", f"returned/cost{s}", "returned/reward") for index, s in enumerate(suffixes)]
    return over + rewards


def _section(name: str, *, shown: bool) -> dict[str, Any]:
    # Two cards a row leave parallel coordinates the room their labels need.
    look = {"display": shown, "isReordered": True, "deleted": False, "isGenerated": False, "columns": 2}
    return {"uuid": name, "name": name, **look}


def _line(uuid: str, *metrics: str) -> dict[str, Any]:
    return {
        **_card(uuid, "LINE", 20),
        "metricKey": metrics[0],
        "selectedMetricKeys": list(metrics),
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "xAxisKey": "step",
        "selectedXAxisMetricKey": "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _scatter(uuid: str, x: str, y: str) -> dict[str, Any]:
    axes = {name: {"key": key, "type": "METRIC"} for name, key in (("xaxis", x), ("yaxis", y))}
    return {**_card(uuid, "SCATTER", 100), **axes}


def _parallel(params: Sequence[str]) -> dict[str, Any]:
    chosen = {"selectedParams": list(params), "selectedMetrics": list(FIGURES)}
    return {**_card("parallel", "PARALLEL", 100), **chosen, "showAllRuns": True}


def _card(uuid: str, kind: str, runs: int) -> dict[str, Any]:
    return {
        "uuid": uuid,
        "type": kind,
        "runsCountToCompare": runs,
        "metricSectionId": OWN_SECTION,
        "deleted": False,
        "isGenerated": False,
    }

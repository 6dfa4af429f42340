"""What the durable records say, as MLflow metric points, params and tags.

A point carries its record's own timestamp, so that a point sent twice is one point. Figures that are
missing or not finite make no point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdpo_core.evaluation.decoding import decoding_words
from cdpo_core.evaluation.instrument import words
from cdpo_core.evaluation.result import ORACLE_FIGURES

if TYPE_CHECKING:
    from cdpo_core.config import ExperimentConfig

INTERVAL_ENDS = ("low", "high")
# What else the exact judge notes, and what a certificate rests on: for the record, not for charts and tags.
NO_FIGURES = ("prompts", "feasible")
NO_TAGS = ("evidence", "note")


@dataclass(frozen=True)
class MetricPoint:
    """One point of one metric: its step and its record's time (milliseconds since 1970, UTC)."""

    name: str
    value: float
    step: int
    timestamp_ms: int


def timestamp_ms(created: str) -> int:
    """Milliseconds since 1970 of a manifest's `created` (ISO 8601 with an offset)."""
    return round(datetime.fromisoformat(created).timestamp() * 1000)


def round_points(
    record: Mapping[str, Any], names: Sequence[str], limits: Sequence[float], timestamp: int
) -> list[MetricPoint]:
    """The points of one round, at step = round.

    Args:
        record: {round, lambda, reward, cost, cost_upper, kl, [safe_rate], [unfinished]}; lambda, cost and
            cost_upper are one number, or one for each constraint.
        names: the constraints' names [m].
        limits: the constraints' limits [m], calibrated cost units.
        timestamp: of the record, milliseconds.

    Returns:
        dual/* (lambda, cost, limit, reward, and violation, the largest E[c_i] - C_i) and policy/*. The charts of a run
        are in the order of their names, so what is reviewed first is told under dual/. With m > 1 lambda, cost, limit
        and cost_upper have a point for each constraint, dual/lambda/<name>; the bare policy/cost and policy/cost_upper
        are the first one's.
    """
    lambdas, costs, uppers = (_each(record.get(key)) for key in ("lambda", "cost", "cost_upper"))
    values: dict[str, Any] = {f"policy/{key}": record.get(key) for key in ("reward", "kl", "safe_rate", "unfinished")}
    values |= {"policy/cost": costs[0], "policy/cost_upper": uppers[0], "dual/reward": record.get("reward")}
    gaps = [cost - limit for cost, limit in zip(costs, limits, strict=False) if _is_finite(cost)]
    values["dual/violation"] = max(gaps, default=None)
    by_constraint = {"dual/lambda": lambdas, "dual/cost": costs, "dual/limit": limits}
    if len(names) > 1:
        by_constraint |= {"policy/cost": costs, "policy/cost_upper": uppers}
    for key, figures in by_constraint.items():
        for name, figure in zip(names, figures, strict=False):
            values[key if len(names) == 1 else f"{key}/{name}"] = figure
    return _points(values, int(record["round"]), timestamp)


def training_points(
    steps: Iterable[Mapping[str, Any]], round_: int, per_round: int, timestamp: int
) -> list[MetricPoint]:
    """train/loss and train/accuracy of one round's training.json.

    Args:
        steps: records {step, loss, [accuracy]}; a record without a figure makes no point of it.
        round_: the round, counted from 1.
        per_round: steps of each round; a point's step is (round - 1)·per_round + step.
        timestamp: when the round's policy was published, milliseconds.
    """
    return [
        point
        for record in steps
        for point in _points(
            {f"train/{key}": record.get(key) for key in ("loss", "accuracy")},
            (round_ - 1) * per_round + int(record["step"]),
            timestamp,
        )
    ]


def scorer_points(scorers: Mapping[str, Mapping[str, Any]], timestamp: int) -> list[MetricPoint]:
    """scorer/<name>/accuracy with its 95 % interval as _low and _high, from the scorers' report by name."""
    values = {}
    for name, report in scorers.items():
        values[f"scorer/{name}/accuracy"] = report.get("accuracy")
        values |= {f"scorer/{name}/accuracy_{end}": report.get(end) for end in INTERVAL_ENDS}
    return _points(values, 0, timestamp)


def result_points(result: Mapping[str, Any], timestamp: int) -> list[MetricPoint]:
    """test/* (with _low and _high), returned/* and oracle/* of a result record, at step 0; scorer/* were told before.

    With several constraints also oracle/true_cost/<name> and so on, one for each. MLflow draws a metric that never
    leaves step 0 as a bar with its value, and any other as a line, which of one point shows nothing.
    """
    values: dict[str, Any] = {}
    for figure, estimate in (result.get("test") or {}).items():
        if isinstance(estimate, Mapping):
            values[f"test/{figure}"] = estimate.get("mean")
            values |= {f"test/{figure}_{end}": estimate.get(end) for end in INTERVAL_ENDS}
        else:
            values[f"test/{figure}"] = estimate
    for figure, value in (result.get("oracle") or {}).items():
        if figure not in NO_FIGURES:
            values[f"oracle/{figure}"] = value
    for name, gap in ((result.get("oracle") or {}).get("proxy_gap") or {}).items():
        values[f"oracle/proxy_gap/{name}"] = gap.get("gap")
    values |= _returned(result)
    constraints = result.get("constraints") or []
    for item in constraints if len(constraints) > 1 else []:
        values |= {f"oracle/{figure}/{item['name']}": item.get(figure) for figure in ORACLE_FIGURES}
    return _points(values, 0, timestamp)


def _returned(result: Mapping[str, Any]) -> dict[str, Any]:
    """returned/*: limit, lambda, cost and reward of the round whose policy is returned, which need not be the last.

    Charts of several runs take these: a chart over runs shows a metric's last point, and that of policy/* and dual/* is
    the last round's.
    """
    constraints = result.get("constraints") or []
    chosen = result.get("chosen_round")
    rounds = {item["round"]: item for item in result.get("rounds") or []}
    values: dict[str, Any] = {"returned/reward": rounds[chosen]["reward"] if chosen in rounds else None}
    for item in constraints:
        suffix = f"/{item['name']}" if len(constraints) > 1 else ""
        values |= {f"returned/{key}{suffix}": item.get(key) for key in ("limit", "lambda", "cost")}
    return values


def varying_params(config: ExperimentConfig) -> dict[str, str]:
    """The few params that experiments are compared by: seeds, limits, beta, labels, update, data."""
    only = len(config.constraints) == 1
    limits = {("limit" if only else f"limit.{item.name}"): f"{item.limit:g}" for item in config.constraints}
    source = config.data.source
    return {
        "seed": str(config.seed),
        **({"testbed.seed": str(config.testbed.seed)} if config.on_testbed else {}),
        **limits,
        "beta": f"{config.dpo.beta:g}",
        "labels": config.dpo.labels,
        "update": config.dual.update,
        "data": Path(source).name if Path(source).is_absolute() else source,
    }


def result_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """The verdict as tags: status, the chosen lambda and the certificate's figures."""
    values = {
        "status": result.get("status"),
        "lambda": result.get("lambda"),
        "instrument": words(result.get("instrument") or []) or None,
        **certificate_tags(result.get("certificate") or {}),
        **constraint_tags(result),
    }
    return {name: tag_text(value) for name, value in values.items() if value is not None}


def certificate_tags(certificate: Mapping[str, Any]) -> dict[str, str]:
    """The certificate's figures as tags `certificate.<field>`, without the references it rests on."""
    values = {key: value for key, value in certificate.items() if key not in NO_TAGS}
    if decoding := values.get("decoding"):
        values["decoding"] = decoding_words(decoding)
    return {f"certificate.{key}": tag_text(value) for key, value in values.items()}


def constraint_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """With several constraints, each one's limit, lambda and certificate: limit.<name>, lambda.<name>, and so on."""
    constraints = result.get("constraints") or []
    tags: dict[str, str] = {}
    for item in constraints if len(constraints) > 1 else []:
        values = {"limit": item["limit"], "lambda": item["lambda"]}
        certificate = item.get("certificate") or {}
        values |= {f"certificate.{key}": certificate.get(key) for key in ("mean", "upper", "passed")}
        tags |= {f"{key}.{item['name']}": tag_text(value) for key, value in values.items() if value is not None}
    return tags


def tag_text(value: Any) -> str:
    """A figure as a tag: six digits of a float, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _each(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _points(values: Mapping[str, Any], step: int, timestamp: int) -> list[MetricPoint]:
    return [MetricPoint(name, float(value), step, timestamp) for name, value in values.items() if _is_finite(value)]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

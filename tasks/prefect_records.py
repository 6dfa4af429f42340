"""What a reader of the Prefect UI sees of a run: its identity, progress, rounds, verdict and links.

Nothing here may stop a run: without a flow run there is nothing to record on, and a Prefect server that
does not answer is a warning.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

from tasks.attempts import end_dead_runs, end_former_attempt, this_process
from tasks.environment import TEMPORARY_PREFECT
from tasks.orphan import outlive_the_worker
from tasks.prefect_patience import asking_once, wait_for_server

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

log = logging.getLogger(__name__)

# Mermaid's own first colours can hardly be seen on a light page; these are the figures'.
MERMAID_LOOK = '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#0072B2, #D55E00, #009E73, #CC79A7"}}}}%%'
PROGRESS_SECONDS = 2.0
AWAY_SECONDS = 30.0
"""How long no progress is shown after it could not be: training does not wait for a server that is away."""

P = ParamSpec("P")
T = TypeVar("T")


def _recorded(function: Callable[P, T]) -> Callable[P, T | None]:
    """A function that does nothing outside a flow run, and whose failure is a warning."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T | None:
        if _this_run() is None:
            return None
        try:
            return function(*args, **kwargs)
        except Exception as error:  # Whatever Prefect's client raises, the run itself is sound.
            log.warning("Prefect: %s not recorded: %s", function.__name__.strip("_"), error)
            return None

    return call


@_recorded
def announce_run(identity: str) -> None:
    """Mark this flow run as working on an experiment, and what killed runs of it left running as Crashed.

    A killed run may be another one, or this one when it is retried.

    Args:
        identity: of the experiment or sweep; the run gets the tag `experiment:<identity>` and, as labels, the
            process that runs it.
    """
    run = _this_run()
    assert run is not None
    outlive_the_worker(run)
    tag = experiment_tag(identity)
    with get_client(sync_client=True) as client:
        former = client.read_flow_run(run.id)
        client.update_flow_run(run.id, tags=sorted({*run.tags, tag}))
        client.update_flow_run_labels(run.id, this_process())
        end_former_attempt(client, former)
        end_dead_runs(client, tag, run)


def experiment_tag(identity: str) -> str:
    """The tag of every flow run that works on this experiment or sweep."""
    return f"experiment:{identity}"


def flow_run_id() -> str:
    """The id of the running flow's run; "" outside a flow run."""
    run = _this_run()
    return "" if run is None else str(run.id)


def flow_run_url() -> str:
    """The page of the running flow; "" outside a flow run or on a server that ends with this process."""
    run = _this_run()
    if run is None or not PREFECT_API_URL.value() or os.environ.get(TEMPORARY_PREFECT):
        return ""
    return url_for("flow-run", obj_id=run.id) or ""


@_recorded
def link_to_mlflow(url: str, identity: str) -> None:
    """A link artifact from the flow run to its MLflow run; nothing when there is no page (`url` is "")."""
    if url:
        create_link_artifact(url, "MLflow run", key=f"mlflow-{_short(identity)}", description="The run in MLflow")


@_recorded
def link_to_report(url: str, identity: str) -> None:
    """A link artifact to the report for people; nothing when no server shows it (`url` is "")."""
    if url:
        create_link_artifact(url, "Report", key=f"report-{_short(identity)}", description="The report, in plain words")


@_recorded
def show_markdown(key: str, markdown: str, description: str = "") -> None:
    """A markdown artifact of the flow run (the rounds, the verdict).

    Args:
        key: what the Artifacts page lists it by; versions of one key follow each other.
        markdown: may hold Mermaid charts.
        description: one line.
    """
    wait_for_server()
    create_markdown_artifact(markdown, key=_slug(key), description=description)


class ProgressArtifacts:
    """A `Progress` that keeps one progress artifact for each part of the run that takes seconds.

    A part is shown from its second report on, at most every two seconds and when it is done, so that cached stages
    leave no artifact and recording costs nothing beside the work.
    """

    def __init__(self, every_seconds: float = PROGRESS_SECONDS) -> None:
        self._every = every_seconds
        self._last: dict[str, float] = {}
        self._artifacts: dict[str, UUID] = {}
        self._away_until = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of the part `what` are done."""
        now = time.monotonic()
        first = self._last.setdefault(what, now)
        ended = done >= total
        if now - first < self._every and not (ended and what in self._artifacts):
            return
        self._last[what] = now
        self._show(what, 100.0 * done / max(total, 1))
        if ended:
            self._artifacts.pop(what, None)
            del self._last[what]

    def _show(self, what: str, percent: float) -> None:
        if time.monotonic() < self._away_until or _this_run() is None:
            return
        with asking_once():
            known = self._artifacts.get(what)
            shown = _create_progress(what, percent) if known is None else _update_progress(known, percent)
        if shown is None:
            self._away_until = time.monotonic() + AWAY_SECONDS
        else:
            self._artifacts[what] = shown


@_recorded
def _create_progress(what: str, percent: float) -> UUID:
    return cast(UUID, create_progress_artifact(percent, key=_slug(what), description=what))


@_recorded
def _update_progress(artifact: UUID, percent: float) -> UUID:
    return cast(UUID, update_progress_artifact(artifact, percent))


def rounds_markdown(rounds: Sequence[Mapping[str, Any]], names: Sequence[str], limits: Sequence[float]) -> str:
    """The rounds as a table and, from two rounds on, the λ and cost trajectories as Mermaid charts.

    Args:
        rounds: records {round, lambda, reward, cost, cost_upper, kl, seconds}; lambda, cost and cost_upper are a
            number, or one for each constraint.
        names: the constraints' names [m].
        limits: their limits [m].
    """
    heads = [
        "round",
        *_headed("λ", names),
        "reward",
        *_headed("cost", names),
        *_headed("bound", names),
        "KL",
        "seconds",
    ]
    rows = [
        [str(record["round"])]
        + [_number(value) for value in _each(record.get("lambda"), names)]
        + [_number(record.get("reward"))]
        + [_number(value) for key in ("cost", "cost_upper") for value in _each(record.get(key), names)]
        + [_number(record.get("kl")), _number(record.get("seconds"), ".1f")]
        for record in rounds
    ]
    targets = ", ".join(f"{name} ≤ {limit:g}" for name, limit in zip(names, limits, strict=True))
    parts = [f"## Rounds\n\nLimits on the mean cost: {targets}", markdown_table(heads, rows)]
    if len(rounds) > 1:
        at = [record["round"] for record in rounds]
        for title, key in (("λ by round", "lambda"), ("mean cost by round", "cost")):
            lines = list(zip(*(_each(record.get(key), names) for record in rounds), strict=True))
            flat = [[limit] * len(at) for limit in limits] if key == "cost" else []
            parts.append(_mermaid_lines(title, at, [*lines, *flat]))
    return "\n\n".join(parts)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, numbers to the right of its first column."""
    rule = ["---"] + ["--:"] * (len(heads) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def interval_cell(figure: Mapping[str, float] | None) -> str:
    """A figure with its interval for a table's cell; empty where there is none."""
    return "" if figure is None else f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _mermaid_lines(title: str, at: Sequence[int], lines: Sequence[Sequence[float]]) -> str:
    low, high = min(map(min, lines)), max(map(max, lines))
    room = 0.1 * (high - low) or 0.5
    # Mermaid reads no exponents.
    body = "\n".join(f"  line [{', '.join(f'{value:.4f}' for value in line)}]" for line in lines)
    axis = f'  x-axis "round" [{", ".join(map(str, at))}]\n  y-axis {low - room:.4f} --> {high + room:.4f}'
    return f'```mermaid\n{MERMAID_LOOK}\nxychart-beta\n  title "{title}"\n{axis}\n{body}\n```'


def _this_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context is not None else None


def _slug(text: str) -> str:
    """Lower-case letters, digits and dashes, which is all an artifact's key may hold."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("λ", "lambda")).strip("-")[:200]


def _short(identity: str) -> str:
    """As much of an identity as tells experiments apart and fits a card."""
    return _slug(identity)[:12]


def _headed(head: str, names: Sequence[str]) -> list[str]:
    return [f"{head} {name}" for name in names] if len(names) > 1 else [head]


def _each(value: Any, names: Sequence[str]) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * len(names)


def _number(value: Any, spec: str = ".3f") -> str:
    return "" if value is None else format(float(value), spec)

"""The running record of one experiment: what MLflow and the Prefect UI are told, and when.

A point goes out only after its record is durable in the store, with the record's own time, so a
continued or repeated run adds nothing that is there already.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import CdpoError
from cdpo_core.evaluation.result import mean_figures, tail_figures, verdict
from cdpo_core.plain_text import markdown_text
from tasks.environment import cdpo_home
from tasks.metric_points import (
    constraint_tags,
    result_points,
    result_tags,
    round_points,
    scorer_points,
    timestamp_ms,
    training_points,
)
from tasks.prefect_records import (
    announce_run,
    flow_run_url,
    interval_cell,
    link_to_mlflow,
    link_to_report,
    markdown_table,
    rounds_markdown,
    show_markdown,
)
from tasks.records import Prepared, Scored
from tasks.review import (
    EXPERIMENT_NOTE,
    VIEW,
    artifact_address,
    datasets,
    review_view,
    run_note,
    version_note,
)
from tasks.review_tracking import ReviewTracker
from tasks.tracking import Tracker, experiment_key
from tasks.workbench import Workbench, store_of

log = logging.getLogger(__name__)


def announce(bench: Workbench) -> None:
    """Tell Prefect which experiment this flow run works on; killed runs of the same one become Crashed.

    Comes first: a run that is killed before it said so would stay Running for ever.
    """
    announce_run(experiment_key(bench.config, bench.external_digests()))


class Journal:
    """One experiment's entries; every method may be repeated without harm."""

    def __init__(self, bench: Workbench) -> None:
        config = bench.config
        self.bench = bench
        self.key = experiment_key(config, bench.external_digests())
        self.tracker = ReviewTracker.open(config.tracking, bench.store, cdpo_home())
        self.run_id = self.tracker.run_for(
            self.key, config.name, config, parent_run_id=config.tracking.parent_run, prefect_url=flow_run_url()
        )
        link_to_mlflow(self.tracker.run_url(self.run_id), self.key)

    @property
    def limits(self) -> list[float]:
        """The constraints' limits, in order."""
        return [item.limit for item in self.bench.config.constraints]

    def _time_of(self, ref: ArtifactRef) -> int:
        return timestamp_ms(self.bench.created(ref))

    def scorers(self, reports: Mapping[str, Any], scorers: Sequence[ArtifactRef]) -> None:
        """Held-out accuracy of the reward and cost models."""
        if scorers:
            self.tracker.log_points(self.run_id, scorer_points(reports, self._time_of(scorers[-1])))

    def data(self, prepared: Prepared, scored: Scored) -> None:
        """The data and its splits, as inputs of the run."""
        self.tracker.log_datasets(self.run_id, datasets(self.bench, prepared, scored))

    def price(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What each limit would cost, for the Prefect UI, before any round."""
        heads = ["limit", "λ", "predicted reward", "KL", "samples that count", ""]
        cells = [
            [
                *(f"{row[key]:.3g}" for key in ("limit", "lambda", "reward", "kl", "effective_samples")),
                " ".join([*["asked for"] * row["asked"], *["out of reach"] * (not row["reachable"])]),
            ]
            for row in rows
        ]
        table = markdown_table(heads, cells)
        show_markdown(f"price-{self.key[:12]}", f"## What a limit costs\n\n{table}", "predicted from reference samples")

    def round(self, rounds: Sequence[Mapping[str, Any]], policy: ArtifactRef) -> None:
        """The latest of the rounds: its training curve, its figures, the table in the Prefect UI."""
        record = rounds[-1]
        training = json.loads((self.bench.folder(policy) / "training.json").read_text())["steps"]
        points = training_points(training, record["round"], self.bench.config.dpo.steps, self._time_of(policy))
        points += round_points(record, self.bench.names, self.limits, self._time_of(policy))
        self.tracker.log_points(self.run_id, points)
        show_markdown(f"rounds-{self.key[:12]}", rounds_markdown(rounds, self.bench.names, self.limits))

    def closed(self, result: Mapping[str, Any], folder: Path) -> None:
        """The result: figures, files, tags, the verdict, and the registered policy if it is certified.

        Args:
            folder: report files (PNG, HTML, JSON) to attach.
        """
        ended = self.ended_ms()
        self.tracker.log_points(self.run_id, result_points(result, ended))
        self.tracker.set_tags(self.run_id, result_tags(result))
        self.tracker.log_file(self.run_id, folder / "report.html", "report.html")
        for file in sorted(folder.iterdir()):
            if file.suffix == ".png":
                self.tracker.log_file(self.run_id, file, f"figures/{file.name}")
        samples = folder / "samples.parquet"
        if samples.exists():
            import pandas as pd

            self.tracker.log_table(self.run_id, pd.read_parquet(samples), "samples.json")
        self._describe(result, ended)
        self._register(result)
        show_markdown(f"verdict-{self.key[:12]}", verdict_markdown(result), result["status"].replace("_", " "))
        # MLflow knows no end but these: where no policy was found, a green one would be read as a success.
        self.tracker.finish(self.run_id, "FAILED" if result["status"] == "infeasible" else "FINISHED", ended)

    def ended_ms(self) -> int:
        """When the newest artifact of the experiment was computed, milliseconds since 1970."""
        return max(timestamp_ms(done.created) for done in self.bench.results)

    def failed(self) -> None:
        """The run ended by an error, which is what the user is told even if MLflow cannot be; a later run continues."""
        tell_failure(self.tracker, self.run_id)

    def _describe(self, result: Mapping[str, Any], ended: int) -> None:
        """In MLflow the verdict in words with links, and the saved view; in Prefect a link to the report."""
        if not self.tracker.enabled:
            return
        tracker, run_id = self.tracker, self.run_id
        pages = {
            "Report": tracker.run_page(run_id, "/artifacts/report.html"),
            "Charts": tracker.run_page(run_id, "/model-metrics"),
            "Sample answers": tracker.run_page(run_id, "/artifacts/samples.json") if result["test"] else "",
            "All experiments": tracker.view_page(VIEW),
            "Prefect run": flow_run_url(),
        }
        figure = artifact_address(run_id, "figures/lambda_trajectory.png") if result["rounds"] else ""
        tracker.set_tags(run_id, {"mlflow.note.content": run_note(result, pages, figure)})
        note = EXPERIMENT_NOTE.format(view=tracker.view_page(VIEW))
        tracker.tag_experiment(run_id, {"mlflow.note.content": note, **review_view(self.bench.names, ended)})
        link_to_report(tracker.run_url(run_id, "/artifacts/report.html"), self.key)

    def _register(self, result: Mapping[str, Any]) -> None:
        config = self.bench.config
        if result["status"] != "certified" or not config.tracking.register_model:
            return
        tags = {"limit": f"{result['limit']:g}", "lambda": f"{result['lambda']:g}", "experiment": self.key}
        tags |= constraint_tags(result)
        policy = ArtifactRef(**result["policy"])
        name = config.tracking.model_name or f"cdpo-{config.name}"
        note = version_note(result, self.tracker.run_page(self.run_id))
        self.tracker.register_policy(self.run_id, name, policy, result["certificate"], tags, note)


def tell_failure(tracker: Tracker, run_id: str) -> None:
    """Mark an MLflow run as failed, or as killed when it was cancelled or interrupted.

    That MLflow cannot be told must not hide the failure itself.
    """
    is_failure = isinstance(sys.exc_info()[1], Exception)
    try:
        tracker.finish(run_id, "FAILED" if is_failure else "KILLED")
    except CdpoError as error:
        log.warning("MLflow was not told that the run failed: %s", error)


def verdict_markdown(result: Mapping[str, Any]) -> str:
    """The verdict, the methods' figures, the rounds with the charts of λ and cost, for the Prefect UI."""
    means, tails = _by_method(result, mean_figures(result)), _by_method(result, tail_figures(result))
    parts = [f"## {markdown_text(verdict(result))}", means]
    if result["rounds"]:
        names, limits = ([item[key] for item in result["constraints"]] for key in ("name", "limit"))
        parts.append(rounds_markdown(result["rounds"], names, limits))
    return "\n\n".join([*parts, "### Beyond the mean", tails])


def _by_method(result: Mapping[str, Any], heads: Mapping[str, str]) -> str:
    rows = [
        [name, *(interval_cell(figures.get(figure)) for figure in heads.values())]
        for name, figures in methods(result).items()
    ]
    return markdown_table(["method", *heads], rows)


def methods(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Test figures by method: the baselines, then the returned policy."""
    rows = dict(result["baselines"])
    if result["test"]:
        lambdas = ", ".join(f"{item['lambda']:g}" for item in result["constraints"])
        rows[f"C-DPO (λ = {lambdas})"] = result["test"]
    return rows


def sweep_tracker(config: ExperimentConfig) -> Tracker:
    """The tracker of a sweep's parent run."""
    return Tracker.open(config.tracking, store_of(config), cdpo_home())

"""What the tracker does for a reader's sake: figures among the charts, data sets, aliases, saved views.

As everything of the tracker, each may be repeated without harm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import file_sha256
from tasks.tracking import FILES_TAG, TRAINING_UI, Tracker, _tracked, registered_name


class ReviewTracker(Tracker):
    """The tracker, with what makes a run readable in MLflow's UI."""

    @_tracked(None)
    def point_alias(
        self, name: str, alias: str, run_id: str = "", digest: str = "", tags: Mapping[str, str] | None = None
    ) -> None:
        """Let an alias of a registered model name the version of one run's policy; without one, remove the alias.

        Args:
            name: the registered model.
            alias: moved here if it names another version.
            run_id: the run that found the policy; "" for none.
            digest: of the policy.
            tags: set on that version. When the alias is removed, only if the version it names carries them.
        """
        name = registered_name(name)
        former = self._aliased(name, alias)
        version = self._version_of(name, run_id, digest) if run_id else ""
        if version:
            for key, value in (tags or {}).items():
                self._client.set_model_version_tag(name, version, key, value)
            if former is None or str(former.version) != version:
                self._client.set_registered_model_alias(name, alias, version)
        elif former is not None and (tags or {}).items() <= former.tags.items():
            self._client.delete_registered_model_alias(name, alias)

    @_tracked(None)
    def log_datasets(self, run_id: str, datasets: Sequence[Mapping[str, str]]) -> None:
        """Name the data a run read; what is there already stays single.

        Args:
            datasets: records {name, digest, source, source_type, profile, context}; source and profile are JSON.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for item in datasets:
            # MLflow keeps 36 characters of a digest; half of a sha256 names the content as well.
            dataset = Dataset(
                item["name"], item["digest"][:32], item["source_type"], item["source"], profile=item["profile"]
            )
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])]))
        self._client.log_inputs(run_id, inputs)

    @_tracked(None)
    def log_image(self, run_id: str, file: Path, key: str, timestamp_ms: int) -> None:
        """Show a figure among the run's charts, unless the same bytes are there already.

        Args:
            key: the section of the charts, `/`, and the figure's title.
            timestamp_ms: of its record.
        """
        from PIL import Image

        sent, digest = self._files.setdefault(run_id, {}), file_sha256(file)[:16]
        if sent.get(key) != digest:
            with Image.open(file) as picture:
                self._client.log_image(run_id, picture, key=key, step=0, timestamp=timestamp_ms)
            sent[key] = digest
            self._set_tags(run_id, {FILES_TAG: json.dumps(sent, sort_keys=True)})

    @_tracked(None)
    def tag_experiment(self, tags: Mapping[str, str], *, keep: bool = False) -> None:
        """Set tags of the experiment (its description, saved views); `keep` leaves those that are there as they are."""
        there = self._client.get_experiment(self._experiment_id).tags
        for key, value in tags.items():
            if there.get(key) != value and not (keep and key in there):
                self._client.set_experiment_tag(self._experiment_id, key, value)

    def view_page(self, key: str) -> str:
        """The page of a saved view (`tasks.review_views`) within MLflow's UI."""
        return f"#/experiments/{self._experiment_id}/runs?viewStateShareKey={key}&compareRunsMode=CHART&{TRAINING_UI}"

    def _aliased(self, name: str, alias: str) -> Any:
        """The version an alias names, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

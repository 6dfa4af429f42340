"""The calls that MLflow is sent, each of which may be repeated without harm, now or after an outage.

Points carry their records' timestamps, files are sent by digest, model versions are looked for first: what is there
is not there twice. The arguments are plain values, so that a call can be kept and sent by another process.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cdpo_core.artifacts import file_sha256
from tasks.metric_points import tag_text

FILES_TAG = "cdpo.files"
TABLES_TAG = "mlflow.loggedArtifacts"
POINTS_A_BATCH = 1000

Content = bytes | Path


class Calls:
    """Sends to MLflow by its client; remembers which files of a run are there."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._files: dict[str, dict[str, str]] = {}

    def send(self, run_id: str, call: str, arguments: Mapping[str, Any]) -> Any:
        """Make the call of this name for a run; returns what it returns."""
        return getattr(self, call)(run_id, **arguments)

    def points(self, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Metric points (name, value, step, timestamp in ms); those that are there already stay single."""
        from mlflow.entities import Metric

        metrics = [Metric(name, value, timestamp, step) for name, value, step, timestamp in points]
        for first in range(0, len(metrics), POINTS_A_BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + POINTS_A_BATCH])

    def params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Params; MLflow refuses to change one that is there."""
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Tags, replacing their former values."""
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def file(self, run_id: str, path: str, content: Content) -> None:
        """A file at `path`, unless the same bytes are there already."""
        sent = self._sent_files(run_id)
        digest = (file_sha256(content) if isinstance(content, Path) else sha256(content).hexdigest())[:16]
        if sent.get(path) == digest:
            return
        folder, _, name = path.rpartition("/")
        if isinstance(content, Path):
            self._client.log_artifact(run_id, str(content), folder or None)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                (Path(temporary) / name).write_bytes(content)
                self._client.log_artifact(run_id, str(Path(temporary) / name), folder or None)
        sent[path] = digest
        self.tags(run_id, {FILES_TAG: json.dumps(sent, sort_keys=True)})

    def table(self, run_id: str, path: str, content: Content) -> None:
        """A file that the UI shows as a table.

        MLflowClient.log_table appends to a table that is there, which would double it on every resume.
        """
        self.file(run_id, path, content)
        shown = json.loads(self._client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in shown:
            self.tags(run_id, {TABLES_TAG: json.dumps([*shown, entry])})

    def policy(
        self, run_id: str, name: str, uri: str, digest: str, certificate: Mapping[str, Any], tags: Mapping[str, str]
    ) -> str:
        """A model version that points at the policy in the artifact store, once for each run and policy."""
        name = re.sub(r"[/:'\"`]", "-", name)
        self._ensure_registered_model(name)
        for version in self._client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
            if version.tags.get("policy.digest") == digest:
                return str(version.version)
        # A server refuses local paths as sources, so those get a scheme of their own.
        source = uri if "://" in uri else f"cdpo://{uri}"
        all_tags = {"policy.uri": uri, "policy.digest": digest, **tags}
        all_tags |= {f"certificate.{key}": tag_text(value) for key, value in certificate.items()}
        version = self._client.create_model_version(name, source, run_id=run_id, tags=all_tags)
        return str(version.version)

    def end(self, run_id: str, status: str, ended_ms: int) -> None:
        """The run's end."""
        self._client.set_terminated(run_id, status, end_time=ended_ms)

    def know_files(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Take note of a run's files from its tags."""
        self._files[run_id] = json.loads(tags.get(FILES_TAG, "{}"))

    def _sent_files(self, run_id: str) -> dict[str, str]:
        if run_id not in self._files:
            self.know_files(run_id, self._client.get_run(run_id).data.tags)
        return self._files[run_id]

    def _ensure_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

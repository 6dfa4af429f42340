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
from tasks.metric_points import certificate_tags

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
        """A file at `path`, unless the same bytes are there already.

        Another process may send files of the same run meanwhile, so the list of them is read again before it is
        written. A file that two writes at one moment leave out of it is only sent once more.
        """
        digest = (file_sha256(content) if isinstance(content, Path) else sha256(content).hexdigest())[:16]
        if self._sent_files(run_id).get(path) == digest:
            return
        folder, _, name = path.rpartition("/")
        if isinstance(content, Path):
            self._client.log_artifact(run_id, str(content), folder or None)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                (Path(temporary) / name).write_bytes(content)
                self._client.log_artifact(run_id, str(Path(temporary) / name), folder or None)
        self.know_files(run_id, self._client.get_run(run_id).data.tags)
        self._files[run_id][path] = digest
        self.tags(run_id, {FILES_TAG: json.dumps(self._files[run_id], sort_keys=True)})

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
        self,
        run_id: str,
        name: str,
        uri: str,
        digest: str,
        certificate: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str = "",
    ) -> str:
        """A model version that points at the policy in the artifact store, once for each run and policy.

        Two processes that look at the same moment both make one; the first stays.
        """
        name = _registered_name(name)
        self._ensure_registered_model(name)
        if not self._versions_of(name, run_id, digest):
            self._register(name, run_id, uri, digest, {**tags, **certificate_tags(certificate)}, description)
        first, *doubled = self._versions_of(name, run_id, digest)
        for version in doubled:
            self._delete_version(name, version)
        return first

    def _register(
        self, name: str, run_id: str, uri: str, digest: str, tags: Mapping[str, str], description: str
    ) -> None:
        # A server refuses local paths as sources, so those get a scheme of their own.
        source = uri if "://" in uri else f"cdpo://{uri}"
        all_tags = {"policy.uri": uri, "policy.digest": digest, **tags}
        self._client.create_model_version(name, source, run_id=run_id, tags=all_tags, description=description or None)

    def alias(self, run_id: str, name: str, alias: str, child: str, digest: str, tags: Mapping[str, str]) -> None:
        """An alias of a registered model, moved to the version of one run's policy; without one, removed.

        Args:
            run_id: the sweep's.
            name: the registered model.
            alias: what it is called.
            child: the run that found the policy; "" for none.
            digest: of the policy.
            tags: set on that version. An alias is removed only from a version that carries them.
        """
        name = _registered_name(name)
        former = self._aliased(name, alias)
        version = next(iter(self._versions_of(name, child, digest)), "") if child else ""
        if version:
            for key, value in tags.items():
                self._client.set_model_version_tag(name, version, key, value)
            if former is None or str(former.version) != version:
                self._client.set_registered_model_alias(name, alias, version)
        elif former is not None and tags.items() <= former.tags.items():
            self._client.delete_registered_model_alias(name, alias)

    def datasets(self, run_id: str, datasets: Sequence[Mapping[str, str]]) -> None:
        """The data a run read: records {name, digest, source, source_type, profile, context}, once each."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for item in datasets:
            # MLflow keeps 36 characters of a digest; half of a sha256 names the content as well.
            where = (item["source_type"], item["source"])
            dataset = Dataset(item["name"], item["digest"][:32], *where, profile=item["profile"])
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", item["context"])]))
        self._client.log_inputs(run_id, inputs)

    def experiment_tags(self, run_id: str, experiment_id: str, tags: Mapping[str, str]) -> None:
        """Tags of the whole experiment (its description, saved views); what is there stays as it is."""
        there = self._client.get_experiment(experiment_id).tags
        for key, value in tags.items():
            if key not in there:
                self._client.set_experiment_tag(experiment_id, key, value)

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

    def _versions_of(self, name: str, run_id: str, digest: str) -> list[str]:
        """The versions a run registered of a policy, oldest first; there is one but for a moment."""
        found = self._client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        return sorted((str(item.version) for item in found if item.tags.get("policy.digest") == digest), key=int)

    def _delete_version(self, name: str, version: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_model_version(name, version)
        except MlflowException as error:  # another process has deleted it
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _aliased(self, name: str, alias: str) -> Any:
        """The version an alias names, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _ensure_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _registered_name(name: str) -> str:
    """The name without the signs that MLflow forbids in a registered model's."""
    return re.sub(r"[/:'\"`]", "-", name)

"""The tracker: MLflow runs by explicit id, every call of which may be repeated without harm.

There is no active run and no autolog. A run belongs to an identity (its parent run and its
experiment's key), is claimed once in the artifact store, and is continued by whoever comes with that
identity. Points carry their records' timestamps, files their digests: what is there is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import yaml

from cdpo_core.artifacts import ArtifactRef, Store, file_sha256
from cdpo_core.errors import CdpoError
from tasks.metric_points import MetricPoint, certificate_tags, varying_params
from tasks.mlflow_connection import connect, is_http, mlflow_errors, while_contended, without_secrets

if TYPE_CHECKING:
    import pandas as pd

    from cdpo_core.config import ExperimentConfig, TrackingConfig

IDENTITY_TAG = "cdpo.identity"
FILES_TAG = "cdpo.files"
POINTS_A_BATCH = 1000
# MLflow 3's UI opens for GenAI traces unless an address says otherwise.
TRAINING_UI = "workflowType=machine_learning"

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Tracker")


def experiment_key(config: ExperimentConfig, inputs: Mapping[str, str] | None = None) -> str:
    """What makes two experiments the same one, hex: all of the config that can change a result.

    Args:
        config: the experiment; its name, store, tracking and machine do not count.
        inputs: digests of the external inputs (data files, ready models) by the config field that names them
            (`data.source`, `policy.base`, `constraints.0.base`); the digest stands for the path.
    """
    values = config.model_dump(mode="json", exclude={"name", "store", "tracking", "compute"})
    for path, digest in (inputs or {}).items():
        *sections, last = path.split(".")
        target: Any = values
        for name in sections:
            target = target[int(name) if isinstance(target, list) else name]
        target[last] = digest
    return _digest(values)


def _tracked(default: T) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """A method that does nothing and returns `default` when tracking is off, and whose errors are the user's."""

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @wraps(method)
        def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
            if not self.enabled:
                return default
            with mlflow_errors(CdpoError, self.uri, "run the same command again: it continues and sends the rest"):
                return while_contended(lambda: method(self, *args, **kwargs))

        return call

    return decorate


class Tracker:
    """Sends what an experiment records to MLflow; a disabled one does nothing and returns empty ids.

    MLflow's own client retries for some minutes when its server is away. After that a call raises CdpoError;
    everything computed is kept, and the same command sends what is missing.
    """

    def __init__(self, client: Any = None, uri: str = "", experiment_id: str = "", store: Store | None = None) -> None:
        self._client, self._uri, self._experiment_id, self._store = client, uri, experiment_id, store
        self._files: dict[str, dict[str, str]] = {}

    @classmethod
    def open(cls, tracking: TrackingConfig, store: Store, home: Path) -> Self:
        """Connect to MLflow and find or make the experiment.

        Args:
            tracking: the config's section; its uri, else MLFLOW_TRACKING_URI, else sqlite under `home`.
            store: the artifact store, where runs are claimed.
            home: the state folder (`cdpo_home()`).

        Raises:
            InputError: MLflow cannot be reached or refuses, within 30 seconds.
        """
        if not tracking.enabled:
            return cls()
        client, uri, experiment_id = connect(tracking, home)
        return cls(client, uri, experiment_id, store)

    @property
    def enabled(self) -> bool:
        """Whether anything is tracked."""
        return self._client is not None

    @property
    def uri(self) -> str:
        """MLflow's address without secrets; "" when disabled."""
        return without_secrets(self._uri)

    @_tracked("")
    def run_for(
        self,
        identity_key: str,
        name: str,
        config: ExperimentConfig | None = None,
        *,
        parent_run_id: str = "",
        prefect_url: str = "",
    ) -> str:
        """The run of an identity: found, made, or made anew when it was deleted; it is Running afterwards.

        Args:
            identity_key: the experiment's key (`experiment_key`), or the sweep's.
            name: shown in the UI.
            config: logged as few params and, whole but without secrets, as `config.yaml`.
            parent_run_id: the sweep's run; an experiment in two sweeps is two runs.
            prefect_url: the page of the Prefect run that works on it ("" when there is none).

        Returns:
            The MLflow run id; the same one to every process that asks with the same identity.
        """
        identity = _digest([parent_run_id, identity_key])
        run_id = self._claimed(identity, name, parent_run_id)
        run = self._client.get_run(run_id)
        if run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        self._files[run_id] = json.loads(run.data.tags.get(FILES_TAG, "{}"))
        if prefect_url:
            note = f"[Prefect run]({prefect_url})"
            self._set_tags(run_id, {"prefect.flow_run": prefect_url, "mlflow.note.content": note})
        if config is not None:
            # A data file that was moved is the same experiment under another name; the first name stays.
            params = {key: value for key, value in varying_params(config).items() if key not in run.data.params}
            self._log_params(run_id, params)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            self._log_bytes(run_id, without_secrets(text).encode(), "config.yaml")
        return run_id

    @_tracked(None)
    def log_points(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Send metric points; those that are there already (name, step, time, value) stay single."""
        from mlflow.entities import Metric

        metrics = [Metric(point.name, point.value, point.timestamp_ms, point.step) for point in points]
        for first in range(0, len(metrics), POINTS_A_BATCH):
            self._client.log_batch(run_id, metrics=metrics[first : first + POINTS_A_BATCH])

    @_tracked(None)
    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Send params; MLflow refuses to change one that is there."""
        self._log_params(run_id, params)

    @_tracked(None)
    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, replacing their former values."""
        self._set_tags(run_id, tags)

    @_tracked(None)
    def log_file(self, run_id: str, file: Path, artifact_path: str) -> None:
        """Send a local file (a figure, a report) to `artifact_path`, unless the same bytes are there already."""
        self._log_file(run_id, file, artifact_path)

    @_tracked(None)
    def log_record(self, run_id: str, record: Mapping[str, Any], artifact_path: str) -> None:
        """Send a JSON record to `artifact_path`."""
        self._log_bytes(run_id, json.dumps(record, indent=2, ensure_ascii=False).encode(), artifact_path)

    @_tracked(None)
    def log_table(self, run_id: str, table: pd.DataFrame, artifact_path: str) -> None:
        """Send a table the UI shows as one; `artifact_path` ends in .json.

        MLflowClient.log_table appends to a table that is there, which would double it on every resume.
        """
        text = table.to_json(orient="split", index=False)
        self._log_bytes(run_id, text.encode(), artifact_path)
        logged = json.loads(self._client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": artifact_path, "type": "table"}
        if entry not in logged:
            self._set_tags(run_id, {"mlflow.loggedArtifacts": json.dumps([*logged, entry])})

    @_tracked("")
    def register_policy(
        self,
        run_id: str,
        name: str,
        policy: ArtifactRef,
        certificate: Mapping[str, Any],
        tags: Mapping[str, str],
        description: str = "",
    ) -> str:
        """Register a policy as a model version that points at the artifact store, once for each run and policy.

        Args:
            run_id: the run that found it.
            name: the registered model; made when it does not exist. Signs MLflow forbids in it become dashes.
            policy: the chosen policy's reference; nothing is copied into MLflow.
            certificate: the certificate's record, which becomes tags `certificate.<field>`.
            tags: further tags (limit, lambda).
            description: of the version (markdown).

        Returns:
            The version.
        """
        name = registered_name(name)
        self._ensure_registered_model(name)
        if known := self._version_of(name, run_id, policy.digest):
            return known
        # A server refuses local paths as sources, so those get a scheme of their own.
        source = policy.uri if "://" in policy.uri else f"cdpo://{policy.uri}"
        all_tags = {"policy.uri": policy.uri, "policy.digest": policy.digest, **tags}
        all_tags |= certificate_tags(certificate)
        version = self._client.create_model_version(
            name, source, run_id=run_id, tags=all_tags, description=description or None
        )
        return str(version.version)

    @_tracked(None)
    def finish(self, run_id: str, status: str = "FINISHED", ended_ms: int = 0) -> None:
        """End the run as FINISHED, FAILED or KILLED.

        Args:
            ended_ms: when its last record was made (milliseconds), so that repeating a finished run does not
                lengthen it; 0 is now.
        """
        self._client.set_terminated(run_id, status, end_time=ended_ms or None)

    def run_url(self, run_id: str, part: str = "") -> str:
        """The run's page on the MLflow server, or a part of it (see `run_page`); "" without a server."""
        if not (self.enabled and run_id and is_http(self._uri)):
            return ""
        return f"{self.uri.rstrip('/')}/{self.run_page(run_id, part)}"

    def run_page(self, run_id: str, part: str = "") -> str:
        """The run's page within MLflow's UI, for links from its own texts; `part` as `/artifacts/report.html`."""
        return f"#/experiments/{self._experiment_id}/runs/{run_id}{part}?{TRAINING_UI}"

    def _claimed(self, identity: str, name: str, parent_run_id: str) -> str:
        """The run that holds the identity's newest claim, after making and claiming one if none is alive."""
        assert self._store is not None
        place = _digest([self._uri, self._experiment_id, identity])
        for generation in range(1_000_000):
            claim = f"mlflow/{place}-{generation}"
            record = self._store.get_record(claim)
            if record is None:
                record = self._claim(claim, identity, name, parent_run_id)
            if self._is_active(record["run_id"]):
                return str(record["run_id"])
        raise AssertionError("a claim is made at the first free generation")

    def _claim(self, claim: str, identity: str, name: str, parent_run_id: str) -> dict[str, Any]:
        assert self._store is not None
        found = self._client.search_runs(
            [self._experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1, order_by=["start_time ASC"]
        )
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {IDENTITY_TAG: identity, **({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})}
            run_id = self._client.create_run(self._experiment_id, tags=tags, run_name=name).info.run_id
        if self._store.put_record(claim, {"run_id": run_id}):
            return {"run_id": run_id}
        winner = self._store.get_record(claim)
        if not found and winner is not None and winner["run_id"] != run_id:
            self._client.delete_run(run_id)
        return winner or {"run_id": run_id}

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(run_id, params=[Param(key, str(value)) for key, value in params.items()])

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def _log_bytes(self, run_id: str, content: bytes, artifact_path: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(artifact_path).name
            file.write_bytes(content)
            self._log_file(run_id, file, artifact_path)

    def _log_file(self, run_id: str, file: Path, artifact_path: str) -> None:
        sent = self._files.setdefault(run_id, {})
        digest = file_sha256(file)[:16]
        if sent.get(artifact_path) == digest:
            return
        folder, _, name = artifact_path.rpartition("/")
        if file.name != name:
            raise ValueError(f"{file} is sent as {artifact_path}: the file's name must be the path's last part")
        self._client.log_artifact(run_id, str(file), folder or None)
        sent[artifact_path] = digest
        self._set_tags(run_id, {FILES_TAG: json.dumps(sent, sort_keys=True)})

    def _version_of(self, name: str, run_id: str, digest: str) -> str:
        """The version a run registered of a policy; "" without one."""
        found = self._client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        return next((str(item.version) for item in found if item.tags.get("policy.digest") == digest), "")

    def _ensure_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def registered_name(name: str) -> str:
    """The name without the signs that MLflow forbids in a registered model's."""
    return re.sub(r"[/:'\"`]", "-", name)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

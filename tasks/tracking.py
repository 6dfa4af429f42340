"""The tracker: MLflow runs by explicit id, every call of which may be repeated without harm.

There is no active run and no autolog. A run belongs to an identity (its parent run and its
experiment's key), is claimed once in the artifact store, and is continued by whoever comes with that
identity. What cannot be sent because MLflow is away is kept in the store and sent later.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import yaml

from cdpo_core.artifacts import ArtifactRef, Store
from cdpo_core.errors import CdpoError
from tasks.metric_points import MetricPoint, varying_params
from tasks.mlflow_calls import Calls
from tasks.mlflow_connection import (
    address,
    answers,
    connect,
    is_http,
    mlflow_errors,
    while_contended,
    without_secrets,
)
from tasks.outbox import Outbox
from tasks.patience import ServerAway, when_there

if TYPE_CHECKING:
    import pandas as pd

    from cdpo_core.config import ExperimentConfig, TrackingConfig

log = logging.getLogger(__name__)

IDENTITY_TAG = "cdpo.identity"
# MLflow 3's UI opens for GenAI traces unless an address says otherwise.
TRAINING_UI = "workflowType=machine_learning"
AGAIN = "run the same command again: it continues and sends the rest"
GLANCE_EVERY_SECONDS = 5.0
END_SECONDS = 45.0
"""How long the end of a run waits for an MLflow that is away, before what is kept is left to a later run."""

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
    """A method that does nothing and returns `default` when tracking is off."""

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @wraps(method)
        def call(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
            return method(self, *args, **kwargs) if self.enabled else default

        return call

    return decorate


class Tracker:
    """Sends what an experiment records to MLflow; a disabled one does nothing and returns empty ids.

    MLflow must be there when a run begins. When it is away later, its entries go to the store's outbox, in order,
    and are sent as soon as it answers: before the next entry, at the run's end, or by whichever process next opens
    the same MLflow with the same store. What MLflow refuses is a CdpoError.
    """

    def __init__(self, client: Any = None, uri: str = "", experiment_id: str = "", store: Store | None = None) -> None:
        self._client, self._uri, self._experiment_id, self._store = client, uri, experiment_id, store
        self._calls = Calls(client)
        self._outbox = Outbox(store, self.uri) if store is not None else None
        self._behind: set[str] = set()
        self._glanced = -GLANCE_EVERY_SECONDS

    @classmethod
    def open(cls, tracking: TrackingConfig, store: Store, home: Path) -> Self:
        """Connect to MLflow, find or make the experiment, and send what was kept for it while it was away.

        Args:
            tracking: the config's section; its uri, else MLFLOW_TRACKING_URI, else sqlite under `home`.
            store: the artifact store, where runs are claimed.
            home: the state folder (`cdpo_home()`).

        Raises:
            ServerAway: MLflow does not answer within 30 seconds, or some minutes where nobody would type the command
                again (tasks.patience).
            InputError: it refuses.
        """
        if not tracking.enabled:
            return cls()
        where = without_secrets(address(tracking, home))
        client, uri, experiment_id = when_there(where, lambda: connect(tracking, home))
        tracker = cls(client, uri, experiment_id, store)
        tracker.deliver()
        return tracker

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

        Raises:
            ServerAway: MLflow was there and does not come back within some minutes.
        """
        run = when_there(self.uri, lambda: self._asked(lambda: self._running(identity_key, name, parent_run_id)))
        run_id: str = run.info.run_id
        self._calls.know_files(run_id, run.data.tags)
        if prefect_url:
            note = f"[Prefect run]({prefect_url})"
            self.set_tags(run_id, {"prefect.flow_run": prefect_url, "mlflow.note.content": note})
        if config is not None:
            # A data file that was moved is the same experiment under another name; the first name stays.
            params = {key: value for key, value in varying_params(config).items() if key not in run.data.params}
            self.log_params(run_id, params)
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            self._submit(run_id, "file", path="config.yaml", content=without_secrets(text).encode())
        return run_id

    @_tracked(None)
    def log_points(self, run_id: str, points: Sequence[MetricPoint]) -> None:
        """Send metric points; those that are there already (name, step, time, value) stay single."""
        self._submit(
            run_id, "points", points=[[point.name, point.value, point.step, point.timestamp_ms] for point in points]
        )

    @_tracked(None)
    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Send params; MLflow refuses to change one that is there."""
        self._submit(run_id, "params", params=dict(params))

    @_tracked(None)
    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, replacing their former values."""
        self._submit(run_id, "tags", tags=dict(tags))

    @_tracked(None)
    def log_file(self, run_id: str, file: Path, artifact_path: str) -> None:
        """Send a local file (a figure, a report) to `artifact_path`, unless the same bytes are there already."""
        if file.name != artifact_path.rpartition("/")[2]:
            raise ValueError(f"{file} is sent as {artifact_path}: the file's name must be the path's last part")
        self._submit(run_id, "file", path=artifact_path, content=file)

    @_tracked(None)
    def log_text(self, run_id: str, text: str, artifact_path: str) -> None:
        """Send a text to `artifact_path`."""
        self._submit(run_id, "file", path=artifact_path, content=text.encode())

    @_tracked(None)
    def log_record(self, run_id: str, record: Mapping[str, Any], artifact_path: str) -> None:
        """Send a JSON record to `artifact_path`."""
        text = json.dumps(record, indent=2, ensure_ascii=False)
        self._submit(run_id, "file", path=artifact_path, content=text.encode())

    @_tracked(None)
    def log_table(self, run_id: str, table: pd.DataFrame, artifact_path: str) -> None:
        """Send a table the UI shows as one; `artifact_path` ends in .json."""
        text = table.to_json(orient="split", index=False)
        self._submit(run_id, "table", path=artifact_path, content=text.encode())

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
            The version; "" when MLflow is away and will be told later.
        """
        policy_is = {"uri": policy.uri, "digest": policy.digest, "description": description}
        version = self._submit(run_id, "policy", name=name, **policy_is, certificate=dict(certificate), tags=dict(tags))
        return str(version or "")

    @_tracked(None)
    def finish(self, run_id: str, status: str = "FINISHED", ended_ms: int = 0) -> None:
        """End the run as FINISHED, FAILED or KILLED; one that came to its end waits a while for an MLflow that is away.

        Args:
            ended_ms: when its last record was made (milliseconds), so that repeating a finished run does not
                lengthen it; 0 is now.
        """
        self._submit(run_id, "end", status=status, ended_ms=ended_ms or time.time_ns() // 1_000_000)
        if ended_ms and run_id in self._behind:
            left = self.deliver(END_SECONDS)
            if left:
                log.warning("MLflow was away: %d entries are kept in the store and are sent by the next run", left)

    @_tracked(0)
    def kept(self) -> int:
        """How many entries wait in the store for this MLflow."""
        return len(self._outbox.names()) if self._outbox else 0

    @_tracked(0)
    def deliver(self, seconds: float = 0.0) -> int:
        """Send what is kept for this MLflow, of whichever run and process.

        Args:
            seconds: how long to try while it is away.

        Returns:
            How many entries are left.
        """
        deadline = time.monotonic() + seconds
        while (left := self._deliver_once()) and time.monotonic() < deadline:
            time.sleep(1)
        return left

    def run_url(self, run_id: str, part: str = "") -> str:
        """The run's page on the MLflow server, or a part of it (see `run_page`); "" without a server."""
        if not (self.enabled and run_id and is_http(self._uri)):
            return ""
        return f"{self.uri.rstrip('/')}/{self.run_page(run_id, part)}"

    def run_page(self, run_id: str, part: str = "") -> str:
        """The run's page within MLflow's UI, for links from its own texts; `part` as `/artifacts/report.html`."""
        return f"#/experiments/{self._experiment_id}/runs/{run_id}{part}?{TRAINING_UI}"

    def _asked(self, call: Callable[[], T]) -> T:
        """What MLflow answers; its errors are the user's."""
        with mlflow_errors(CdpoError, self.uri, AGAIN, away=ServerAway):
            return while_contended(call)

    def _submit(self, run_id: str, call: str, **arguments: Any) -> Any:
        """Send a call, or keep it behind what is kept already; returns what it returns, None when it is kept."""
        if run_id in self._behind and not self._caught_up(run_id):
            self._keep(run_id, call, arguments)
            return None
        try:
            return self._asked(lambda: self._calls.send(run_id, call, arguments))
        except ServerAway as error:
            log.warning("MLflow does not answer: what it is to be told is kept in the store and sent later")
            log.info("it said: %s", error.what)
            self._keep(run_id, call, arguments)
            return None

    def _keep(self, run_id: str, call: str, arguments: Mapping[str, Any]) -> None:
        assert self._outbox is not None
        self._outbox.keep(run_id, call, arguments)
        self._behind.add(run_id)

    def _caught_up(self, run_id: str) -> bool:
        """Whether nothing of the run waits any more, after a try to send it if the last one was a while ago."""
        assert self._outbox is not None
        if time.monotonic() - self._glanced >= GLANCE_EVERY_SECONDS:
            self._deliver_once()
        if self._outbox.names(run_id):
            return False
        self._behind.discard(run_id)
        return True

    def _deliver_once(self) -> int:
        """Send the entries in order, until MLflow is away; returns how many are left."""
        assert self._outbox is not None
        self._glanced = time.monotonic()
        waiting, stuck, sent = self._outbox.names(), set[str](), 0
        if not waiting or not answers(self._uri):
            return len(waiting)
        for name in waiting:
            entry = self._outbox.read(name)
            # Without an entry another process has sent it; behind one that cannot be sent the run's others wait.
            if entry is None or entry.run_id in stuck:
                continue
            try:
                self._asked(partial(self._calls.send, entry.run_id, entry.call, entry.arguments))
            except ServerAway:
                stuck.add(entry.run_id)
                if not answers(self._uri):
                    break
            except CdpoError as error:
                log.warning("an entry kept for MLflow is refused and set aside: %s", error.what)
                self._outbox.set_aside(name, error.what)
            else:
                self._outbox.remove(name)
                sent += 1
        log.info("MLflow was sent %d entries that had been kept while it was away", sent)
        return self.kept()

    def _running(self, identity_key: str, name: str, parent_run_id: str) -> Any:
        run_id = self._claimed(_digest([parent_run_id, identity_key]), name, parent_run_id)
        run = self._client.get_run(run_id)
        if run.info.status != "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        return run

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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

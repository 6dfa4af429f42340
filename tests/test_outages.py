"""A server that is away for a minute in the middle of a run: the run ends as one that was never disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

import psutil
import pytest
from chain_kit import SECONDS, Finished, Running, config, new_home, numbers
from servers_restarted import FailingS3, restarted_mlflow, restarted_prefect

from cdpo_core.config import ExperimentConfig
from flows.pools import POOL
from flows.processes import http_json
from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

AWAY_SECONDS = 60
FAILING_SHARE = 0.05
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
SCENARIOS = ("mlflow", "s3", "prefect", "all three", "temporary")

Points = Counter[tuple[str, int, float]]


class Outcome(NamedTuple):
    """A disturbed run: its outcome, the servers it used, its store, what it printed, and what went away."""

    code: int
    result: dict[str, Any]
    prefect: str
    mlflow: str
    store: str
    said: str
    outages: list[str]


class Process(Protocol):
    """A run in a process of its own; tests.chain_kit.Running is one."""

    log: Path

    def wait(self) -> tuple[int, dict[str, Any]]:
        """Its exit code and result record."""

    def end(self) -> None:
        """End all of it."""


class UnderAWorker:
    """The experiment as a run of its deployment, and the process worker that picks it up."""

    def __init__(self, home: Path, prefect_api: str, config: ExperimentConfig) -> None:
        self._api, self._home, self.log = prefect_api, home, home / "worker.log"
        environment = {**os.environ, "CDPO_HOME": str(home), "PREFECT_API_URL": prefect_api}
        environment |= {"PREFECT_HOME": str(home / "prefect"), "PREFECT_WORKER_QUERY_SECONDS": "2"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        python = [sys.executable, "-m"]
        subprocess.run([*python, "deployments.bootstrap"], env=environment, check=True, capture_output=True)
        worker = [*python, "prefect", "worker", "start", "--pool", POOL, "--install-policy", "never"]
        with self.log.open("ab") as log:
            self._worker = subprocess.Popen(worker, env=environment, stdout=log, stderr=log, start_new_session=True)
        deployment = http_json(f"{prefect_api}/deployments/name/experiment/experiment-tiny")
        parameters = {"parameters": config.model_dump(mode="json"), "state": {"type": "SCHEDULED"}}
        self._run = http_json(f"{prefect_api}/deployments/{deployment['id']}/create_flow_run", parameters)["id"]

    def wait(self) -> tuple[int, dict[str, Any]]:
        """As `Running.wait`, by the state in which Prefect has the run at its end."""
        deadline = time.monotonic() + SECONDS
        while self.state() not in ENDS:
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(1)
        assert self.state() == "COMPLETED", self.log.read_text()[-3000:]
        (record,) = self._home.glob("reports/*/result.json")
        result = json.loads(record.read_text())
        return {"certified": 0, "not_certified": 3}[result["status"]], result

    def state(self) -> str:
        """Prefect's state of the run; "" while the server is away."""
        run = http_json(f"{self._api}/flow_runs/{self._run}")
        return str(run["state_type"]) if run else ""

    def end(self) -> None:
        """End the worker, and the run with it."""
        for process in [psutil.Process(self._worker.pid), *psutil.Process(self._worker.pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._worker.wait()


class Disturbed:
    """A run, the servers that go away in its middle, and the moments when they do."""

    def __init__(self, running: Process, prefect: str, mlflow: str, store: str) -> None:
        self.running, self.prefect, self.mlflow, self.store = running, prefect, mlflow, store
        self.outages: list[str] = []
        self._moments: list[tuple[str, str, Callable[[float], None]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._disturb)

    def when_stored(self, stage: str, what: str, away: Callable[[float], None]) -> None:
        """Let something be away for a minute as soon as the stage's first artifact is there."""
        self._moments.append((stage, what, away))

    def start(self) -> None:
        """Wait for the moments, one after the other, in a thread."""
        self._thread.start()

    def wait(self) -> Outcome:
        """The outcome, once the run has ended and every server is back."""
        try:
            code, result = self.running.wait()
        finally:
            self._ended.set()
            self._thread.join()
        said = self.running.log.read_text()
        return Outcome(code, result, self.prefect, self.mlflow, self.store, said, self.outages)

    def _disturb(self) -> None:
        store = open_store(self.store)
        for stage, what, away in self._moments:
            while not any(item.stage == stage for item in store.manifests()):
                if self._ended.wait(0.2):
                    return
            if not self._ended.is_set():
                self.outages.append(what)
                away(AWAY_SECONDS)


@pytest.fixture(scope="module")
def s3_bucket(s3_endpoint: str) -> Iterator[str]:
    """An empty bucket of its own, with the environment to reach it."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.session.Session().client("s3").create_bucket(Bucket="outages")
        yield "s3://outages"


@pytest.fixture(scope="module")
def outcomes(
    finished: Finished,
    tmp_path_factory: pytest.TempPathFactory,
    prefect_server: str,
    s3_endpoint: str,
    s3_bucket: str,
    _empty_mlflow_database: Path,
) -> Iterator[dict[str, Outcome]]:
    """Disturbed runs, all at the same time, since they mostly wait; the servers stay until the tests are done."""
    folder = tmp_path_factory.mktemp("outages")
    homes = {name: new_home(folder / name.replace(" ", "-"), _empty_mlflow_database) for name in SCENARIOS}
    with ExitStack() as stack:
        mlflows = [restarted_mlflow(folder / f"mlflow-{number}", _empty_mlflow_database) for number in range(2)]
        prefects = [restarted_prefect(folder / f"prefect-{number}") for number in range(2)]
        proxies = [FailingS3(s3_endpoint, seed) for seed in range(2)]
        for server in (*mlflows, *prefects):
            stack.callback(server.kill)
            server.start()
        for proxy in proxies:
            stack.callback(proxy.close)
            proxy.share = FAILING_SHARE

        def disturbed(name: str, prefect: str, mlflow: str, store: str, proxy: FailingS3 | None = None) -> Disturbed:
            home = homes[name]
            mlflow, store = mlflow or f"sqlite:///{home}/mlflow.db", store or str(home / "store")
            if name == "prefect":
                running: Process = UnderAWorker(home, prefect, config())
            else:
                arguments = ["--store", store, "--tracking.uri", mlflow]
                with mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": proxy.address} if proxy else {}):
                    running = Running(home, prefect, *arguments)
            stack.callback(running.end)
            return Disturbed(running, prefect, mlflow, store)

        runs = {
            "mlflow": disturbed("mlflow", prefect_server, mlflows[0].address, ""),
            "s3": disturbed("s3", prefect_server, "", f"{s3_bucket}/s3", proxies[0]),
            "prefect": disturbed("prefect", prefects[0].address, "", ""),
            "all three": disturbed("all three", prefects[1].address, mlflows[1].address, f"{s3_bucket}/a", proxies[1]),
            "temporary": disturbed("temporary", "", "", ""),
        }
        runs["mlflow"].when_stored("sft", "mlflow", mlflows[0].away)
        runs["s3"].when_stored("sft", "s3", proxies[0].away)
        runs["prefect"].when_stored("sft", "prefect", prefects[0].away)
        runs["all three"].when_stored("sft", "prefect", prefects[1].away)
        runs["all three"].when_stored("scorers", "s3", proxies[1].away)
        runs["all three"].when_stored("round", "mlflow", mlflows[1].away)
        runs["temporary"].when_stored("sft", "temporary", lambda _: _kill_own_server(runs["temporary"].running))
        for run in runs.values():
            run.start()
        found = {name: run.wait() for name, run in runs.items()}
        assert all(proxy.failed for proxy in proxies)
        yield found


def _kill_own_server(running: Process) -> None:
    """`kill -9` the Prefect server that a command started for itself."""
    assert isinstance(running, Running)
    servers = [
        child
        for child in psutil.Process(running.process.pid).children(recursive=True)
        if "prefect.server.api.server:create_app" in child.cmdline()
    ]
    assert servers
    for server in servers:
        server.kill()


@pytest.fixture(params=SCENARIOS)
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Outcome]) -> Outcome:
    found: Outcome = outcomes[request.param]
    assert found.outages == (["prefect", "s3", "mlflow"] if request.param == "all three" else [request.param])
    return found


def points(address: str, run_id: str) -> Points:
    """How often each point (metric, step, value) of an MLflow run is there."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=address)
    names = client.get_run(run_id).data.metrics
    return Counter((name, item.step, item.value) for name in names for item in client.get_metric_history(run_id, name))


def test_disturbed_run_ends_as_one_that_was_not(finished: Finished, outcome: Outcome) -> None:
    assert outcome.code == finished.code, outcome.said[-3000:]
    assert numbers(outcome.result) == numbers(finished.result)


def test_every_point_is_there_exactly_once(finished: Finished, outcome: Outcome) -> None:
    assert not outcome.result["tracking"].get("kept")
    expected = points(f"sqlite:///{finished.home}/mlflow.db", finished.result["tracking"]["run_id"])
    assert max(expected.values()) == 1
    assert points(outcome.mlflow, outcome.result["tracking"]["run_id"]) == expected


def test_the_mlflow_run_is_whole(finished: Finished, outcome: Outcome) -> None:
    from mlflow import MlflowClient

    def whole(address: str, run_id: str) -> tuple[Any, ...]:
        client = MlflowClient(tracking_uri=address)
        run = client.get_run(run_id)
        files = sorted(file.path for folder in ("", "figures") for file in client.list_artifacts(run_id, folder))
        tags = {name: run.data.tags.get(name) for name in ("status", "certificate.upper", "mlflow.loggedArtifacts")}
        return run.info.status, run.data.params, tags, files

    mine = whole(outcome.mlflow, outcome.result["tracking"]["run_id"])
    assert mine == whole(f"sqlite:///{finished.home}/mlflow.db", finished.result["tracking"]["run_id"])


def test_the_store_verifies(outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))  # an empty cache: every byte is read again
    store = open_store(outcome.store)
    manifests = store.manifests()
    assert len(manifests) >= len({stage["name"] for stage in outcome.result["stages"] if not stage["cached"]})
    for manifest in manifests:
        store.check(manifest)
        store.fetch(manifest)


@pytest.mark.parametrize("name", ["prefect", "all three"])
def test_prefect_knows_how_every_part_ended(outcomes: dict[str, Outcome], name: str) -> None:
    api = outcomes[name].prefect
    deadline = time.monotonic() + 60  # the last events are still on their way
    while True:
        runs = {kind: http_json(f"{api}/{kind}/filter", {"limit": 200}) for kind in ("flow_runs", "task_runs")}
        states = Counter((kind, run["state_type"]) for kind, found in runs.items() for run in found)
        if all(state == "COMPLETED" for _, state in states) or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert set(states) == {("flow_runs", "COMPLETED"), ("task_runs", "COMPLETED")}

"""A server that is away for a minute in the middle of a run: the run ends as one that was never disturbed."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from chain_kit import Finished, Running, new_home, numbers
from servers_restarted import FailingS3, restarted_mlflow, restarted_prefect

from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

AWAY_SECONDS = 60
FAILING_SHARE = 0.05
SCENARIOS = ("mlflow", "s3", "prefect", "all three")

Points = Counter[tuple[str, int, float]]


class Outcome(NamedTuple):
    """A disturbed run: its outcome, its MLflow's address, its store's, what it printed, and what went away."""

    code: int
    result: dict[str, Any]
    mlflow: str
    store: str
    said: str
    outages: list[str]


class Disturbed:
    """A run, the servers that go away in its middle, and the moments when they do."""

    def __init__(self, home: Path, prefect_api: str, mlflow: str, store: str, environment: dict[str, str]) -> None:
        self.mlflow, self.store, self.outages = mlflow, store, []
        arguments = ["--store", store] + (["--tracking.uri", mlflow] if mlflow.startswith("http") else [])
        with mock.patch.dict(os.environ, environment):
            self.running = Running(home, prefect_api, *arguments)
        self._moments: list[tuple[str, str, Callable[[float], None]]] = []
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
            self._thread.join()
        return Outcome(code, result, self.mlflow, self.store, self.running.log.read_text(), self.outages)

    def _disturb(self) -> None:
        store = open_store(self.store)
        for stage, what, away in self._moments:
            while not any(item.stage == stage for item in store.manifests()):
                if self.running.process.poll() is not None:
                    return
                time.sleep(0.2)
            if self.running.process.poll() is None:
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
    """Four disturbed runs at the same time, since they mostly wait; the servers stay until the tests are done."""
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
            environment = {"AWS_ENDPOINT_URL": proxy.address} if proxy else {}
            home = homes[name]
            run = Disturbed(
                home, prefect, mlflow or f"sqlite:///{home}/mlflow.db", store or str(home / "store"), environment
            )
            stack.callback(run.running.end)
            return run

        runs = {
            "mlflow": disturbed("mlflow", prefect_server, mlflows[0].address, ""),
            "s3": disturbed("s3", prefect_server, "", f"{s3_bucket}/s3", proxies[0]),
            "prefect": disturbed("prefect", prefects[0].address, "", ""),
            "all three": disturbed(
                "all three", prefects[1].address, mlflows[1].address, f"{s3_bucket}/all", proxies[1]
            ),
        }
        runs["mlflow"].when_stored("sft", "mlflow", mlflows[0].away)
        runs["s3"].when_stored("sft", "s3", proxies[0].away)
        runs["prefect"].when_stored("sft", "prefect", prefects[0].away)
        runs["all three"].when_stored("sft", "prefect", prefects[1].away)
        runs["all three"].when_stored("scorers", "s3", proxies[1].away)
        runs["all three"].when_stored("round", "mlflow", mlflows[1].away)
        for run in runs.values():
            run.start()
        found = {name: run.wait() for name, run in runs.items()}
        assert all(proxy.failed for proxy in proxies)
        yield found


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
    assert outcome.result["tracking"]["kept"] == 0
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


def test_prefect_knows_how_the_run_ended(outcomes: dict[str, Outcome]) -> None:
    assert not [name for name, outcome in outcomes.items() if "Error" in outcome.said and outcome.code not in (0, 3)]

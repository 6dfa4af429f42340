"""Runs of a deployment below a flow: made once, found again, started again, cancelled; and patience with the server."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Crashed
from servers_s3 import free_port

from cdpo_core.errors import CdpoError
from tasks import child_runs
from tasks.child_runs import ChildRuns, deployed_with_workers, patiently, this_flow_run


@flow(name="nothing")
def nothing(number: int = 0) -> None:
    """A flow to deploy; no worker ever runs it."""


class Deployed:
    """A deployment in a pool of its own."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.pool = f"pool-{uuid4().hex[:8]}"
        client.create_work_pool(WorkPoolCreate(name=self.pool, type="process"))
        name = uuid4().hex[:8]
        client.create_deployment(client.create_flow(nothing), name=name, work_pool_name=self.pool)
        self.name = f"nothing/{name}"


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


def _below_a_flow(client: SyncPrefectClient, deployed: Deployed, body: Callable[[ChildRuns], Any], family: str) -> Any:
    @flow(name="parent")
    def parent() -> None:
        deployment = client.read_deployment_by_name(deployed.name)
        found.append(body(ChildRuns(client, deployment, this_flow_run(), family)))

    found: list[Any] = []
    parent()
    return found[0]


def test_a_childs_run_is_made_once_and_hangs_on_its_parent(client: SyncPrefectClient) -> None:
    def body(runs: ChildRuns) -> None:
        run, is_new = runs.start("identity", "a child", {"number": 3})
        again, is_new_again = runs.start("identity", "a child", {"number": 3})
        other, _ = runs.start("another", "another child", {"number": 4})
        assert (is_new, is_new_again) == (True, False)
        assert run.id == again.id != other.id
        assert {"experiment:identity", "family"} <= set(run.tags)
        assert runs.read([run.id])[run.id].parameters == {"number": 3}
        placeholder = client.read_task_run(run.parent_task_run_id)
        assert placeholder.flow_run_id == runs.parent.id
        # the placeholder is found again too: asking twice leaves one
        assert runs._make("key", "identity", "a child", {}).parent_task_run_id == placeholder.id

    _below_a_flow(client, Deployed(client), body, "family")


def test_an_ended_run_is_started_again_and_a_waiting_one_left_alone(client: SyncPrefectClient) -> None:
    def body(runs: ChildRuns) -> None:
        run, _ = runs.start("identity", "a child", {})
        runs.restart(run.id)
        assert len(client.read_flow_run_states(run.id)) == 1
        client.set_flow_run_state(run.id, Crashed(), force=True)
        runs.restart(run.id)
        assert [state.type.value for state in client.read_flow_run_states(run.id)] == [
            "SCHEDULED", "CRASHED", "SCHEDULED",
        ]  # fmt: skip

    _below_a_flow(client, Deployed(client), body, "family")


def test_a_waiting_run_is_cancelled_and_a_deleted_one_is_missing(client: SyncPrefectClient) -> None:
    def body(runs: ChildRuns) -> None:
        ids = [runs.start(name, name, {})[0].id for name in ("one", "two")]
        client.delete_flow_run(ids[1])
        runs.cancel(ids)
        found = runs.read(ids)
        assert list(found) == [ids[0]]
        assert found[ids[0]].state is not None
        assert found[ids[0]].state.is_cancelled()
        assert not runs.parent_is_cancelled()

    _below_a_flow(client, Deployed(client), body, "family")


def test_a_living_child_is_taken_over_by_a_parent_that_does_the_same(client: SyncPrefectClient) -> None:
    deployed = Deployed(client)

    def start(runs: ChildRuns) -> Any:
        return runs.start("identity", "a child", {})

    first, _ = _below_a_flow(client, deployed, start, "one sweep")
    again, is_new = _below_a_flow(client, deployed, start, "one sweep")
    assert (again.id, is_new) == (first.id, False)
    other, is_new = _below_a_flow(client, deployed, start, "another sweep")
    assert other.id != first.id
    assert is_new
    client.set_flow_run_state(first.id, Crashed(), force=True)
    third, is_new = _below_a_flow(client, deployed, start, "one sweep")
    assert third.id != first.id
    assert is_new


def test_why_nothing_would_pick_a_run_up(client: SyncPrefectClient) -> None:
    assert deployed_with_workers(client, "nothing/nowhere") == (
        None,
        "the Prefect server has no deployment nothing/nowhere",
    )
    deployed = Deployed(client)
    assert deployed_with_workers(client, deployed.name)[1] == f"no worker of the work pool {deployed.pool} is online"
    client.send_worker_heartbeat(deployed.pool, "a worker", 30)
    found, reason = deployed_with_workers(client, deployed.name)
    assert found is not None
    assert reason == ""
    client.update_work_pool(deployed.pool, WorkPoolUpdate(is_paused=True))
    assert deployed_with_workers(client, deployed.name)[1] == f"the work pool {deployed.pool} is paused"


class _Answers(http.server.BaseHTTPRequestHandler):
    codes: list[int]

    def do_GET(self) -> None:
        self.send_response(self.codes.pop(0))
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Nothing is printed."""


def _serving(port: int, codes: list[int]) -> http.server.HTTPServer:
    server = http.server.HTTPServer(("127.0.0.1", port), type("Answers", (_Answers,), {"codes": codes}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _get(port: int) -> int:
    answer = httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
    try:
        answer.raise_for_status()
    except httpx.HTTPStatusError as error:
        raise PrefectHTTPStatusError.from_httpx_error(error) from error
    return answer.status_code


def test_a_server_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_runs, "RETRY_SECONDS", 0.05)
    port, servers, tries = free_port(), [], []

    def call() -> int:
        tries.append(port)
        if len(tries) == 3:
            servers.append(_serving(port, [503, 200]))
        return _get(port)

    try:
        assert patiently(call) == 200
        assert len(tries) == 4
    finally:
        for server in servers:
            server.shutdown()


def test_a_refusal_is_an_error_at_once() -> None:
    port = free_port()
    server = _serving(port, [409])
    try:
        with pytest.raises(PrefectHTTPStatusError):
            patiently(lambda: _get(port))
    finally:
        server.shutdown()


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_runs, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(CdpoError, match="has been away"):
        patiently(lambda: _get(free_port()))

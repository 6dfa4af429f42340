"""`cdpo up` for real: servers, deployments and a worker, a run started through Prefect's API, and Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from up_kit import ROOT, Up, ask, up_running

from deployments.definitions import DEFINITIONS
from flows.pools import POOL, SWEEP_POOL
from flows.processes import _marked, taken

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up_running(tmp_path_factory.mktemp("up")) as up:
        yield up


def test_all_is_there_when_the_addresses_are_printed(running: Up) -> None:
    out = (running.home / "out").read_text()
    assert running.state["PREFECT_API_URL"].removesuffix("/api") in out
    assert running.state["MLFLOW_TRACKING_URI"] in out
    deployed = {item["name"]: item for item in running.api("POST", "/deployments/filter", {})}
    for item in DEFINITIONS:
        assert deployed[item.name]["parameters"] == item.all_parameters()
        assert [schedule["active"] for schedule in deployed[item.name]["schedules"]] == [False] * len(item.schedules)
    for pool in (POOL, SWEEP_POOL):
        workers = running.api("POST", f"/work_pools/{pool}/workers/filter", {})
        assert [worker["status"] for worker in workers] == ["ONLINE"]
        assert {item["work_pool_name"] for item in deployed.values()} == {POOL, SWEEP_POOL}


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://localhost:8080"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Host": "evil.example"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_requests_of_foreign_pages_are_refused_and_make_nothing(running: Up, headers: dict[str, str]) -> None:
    prefect = running.prefect.removesuffix("/api")
    for url, method, body in [
        (f"{prefect}/api/flows/", "POST", {"name": "evil"}),
        (f"{prefect}/api/flows/", "OPTIONS", None),
        (f"{prefect}/api/flows/filter", "POST", {}),
        (f"{prefect}/api/health", "GET", None),
        (f"{prefect}/", "GET", None),
        (f"{running.mlflow}/api/2.0/mlflow/experiments/create", "POST", {"name": "evil"}),
        (f"{running.mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=1", "GET", None),
        (f"{running.mlflow}/", "GET", None),
    ]:
        for kind in ("application/json", "text/plain"):
            status, _ = ask(url, method, body, {**headers, "Content-Type": kind})
            assert status == 403, url
    assert "evil" not in [flow["name"] for flow in running.api("POST", "/flows/filter", {})]
    found = running.tracking("experiments/search", {"max_results": 100})["experiments"]
    assert "evil" not in [item["name"] for item in found]


def test_no_answer_lets_every_page_read_it(running: Up) -> None:
    for url in (f"{running.prefect}/health", running.prefect.removesuffix("/api") + "/", f"{running.mlflow}/"):
        with urllib.request.urlopen(url) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] is None
            assert "frame-ancestors 'self'" in answer.headers["Content-Security-Policy"], url
    own = running.prefect.removesuffix("/api").replace("127.0.0.1", "localhost")
    asked = urllib.request.Request(f"{running.prefect}/health", headers={"Origin": own})
    with urllib.request.urlopen(asked) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] == own


def test_a_second_one_is_refused(running: Up) -> None:
    command = [sys.executable, "-m", "flows.cli", "up"]
    done = subprocess.run(command, env=running.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"running already (process {running.state['pid']})" in done.stderr


def test_deploying_again_keeps_what_the_operator_set(running: Up) -> None:
    def nightly() -> Any:
        return running.api("GET", "/deployments/name/sweep/sweep-nightly")

    before = nightly()
    address = f"/deployments/{before['id']}/schedules"
    first = next(item for item in before["schedules"] if item["slug"] == "nightly")
    assert first["parameters"] == {"name": "nightly"}
    running.api("PATCH", f"{address}/{first['id']}", {"active": True, "parameters": {"seed": 3}})
    hourly = {
        "schedule": {"cron": "0 * * * *", "timezone": "Europe/Berlin"},
        "active": False,
        "parameters": {"seed": 5},
    }
    running.api("POST", address, [hourly])
    running.api("PATCH", f"/work_pools/{POOL}", {"concurrency_limit": 7})
    running.api("PATCH", f"/deployments/{before['id']}", {"paused": True})
    running.python("-m", "deployments.bootstrap")
    after = {item["slug"]: item for item in nightly()["schedules"]}
    assert set(after) == {"nightly", "weekly", None}
    assert (after["nightly"]["active"], after["nightly"]["parameters"]) == (True, {"seed": 3})
    assert (after["weekly"]["active"], after[None]["parameters"]) == (False, {"seed": 5})
    assert after[None]["schedule"]["timezone"] == "Europe/Berlin"
    assert nightly()["paused"] is True
    assert running.api("GET", f"/work_pools/{POOL}")["concurrency_limit"] == 7
    assert len(running.api("POST", "/deployments/filter", {})) == len(DEFINITIONS)
    running.python("-m", "deployments.bootstrap", "--concurrency", "2")
    assert running.api("GET", f"/work_pools/{POOL}")["concurrency_limit"] == 2
    # Runs still start where `cdpo up` was started.
    template = running.api("GET", f"/work_pools/{POOL}")["base_job_template"]
    assert template["variables"]["properties"]["working_dir"]["default"] == str(ROOT)


def test_prefects_own_deploy_makes_the_same_from_prefect_yaml(running: Up) -> None:
    running.python("-m", "prefect", "--no-prompt", "deploy", "--all")
    deployed = {item["name"]: item for item in running.api("POST", "/deployments/filter", {})}
    assert len(deployed) == len(DEFINITIONS)
    for item in DEFINITIONS:
        assert deployed[item.name]["parameters"] == item.all_parameters()
        assert deployed[item.name]["entrypoint"] == item.entrypoint
        assert deployed[item.name]["work_pool_name"] == item.pool
        assert (deployed[item.name]["path"], deployed[item.name]["pull_steps"]) == (None, [])
        schedules = {found["slug"]: found for found in deployed[item.name]["schedules"]}
        for when in item.schedules:
            assert (schedules[when.slug]["parameters"], schedules[when.slug]["active"]) == (when.parameters, False)


def test_an_invalid_parameter_is_refused_and_named(running: Up) -> None:
    deployment = running.api("GET", "/deployments/name/experiment/experiment-testbed")
    for parameters, named in [
        ({"dpo": {"beta": -1}}, "dpo.beta"),
        ({"dual": {"update": "adam"}}, "dual.update"),
        ({"dpo": {"bta": 1}}, "bta"),
        ({"constraints": [{"limit": "low"}]}, "limit"),
        ({"constraints": [{"name": "harm"}]}, "limit"),
        ({"constraints": [{"name": "harm", "limit": None}]}, "limit"),
    ]:
        status, text = running.api(
            "POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters}
        )
        assert status in (409, 422)
        assert named in text


def test_a_run_of_a_deployment_with_nested_parameters_changed(running: Up) -> None:
    deployment = running.api("GET", "/deployments/name/experiment/experiment-testbed")
    changed = {key: value for key, value in TINY.items() if key not in ("name", "constraints")}
    run = running.start("experiment/experiment-testbed", changed)
    assert run["parameters"] == {**deployment["parameters"], **changed}
    assert running.ended(run["id"]) == "COMPLETED", running.logs()
    artifacts = running.api("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    link = next(item for item in artifacts if item["key"].startswith("mlflow-"))
    assert running.mlflow in link["data"]
    (tracked,) = running.mlflow_runs()
    tags = {tag["key"]: tag["value"] for tag in tracked["data"]["tags"]}
    assert run["id"] in tags["prefect.flow_run"]
    assert tracked["info"]["run_id"] in link["data"]


def test_ctrl_c_ends_every_process_it_started(running: Up) -> None:
    started = _marked(running.state["marker"])
    assert len(started) >= 3
    ports = [int(address.split(":")[2].split("/")[0]) for address in (running.prefect, running.mlflow)]
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=60) == 0
    assert _marked(running.state["marker"]) == []
    assert not any(process.is_running() for process in started)
    assert not any(map(taken, ports))
    assert not (running.home / "up.json").exists()
    assert (running.home / "out").read_text().endswith("all ended\n")

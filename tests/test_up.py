"""`cdpo up` for real: servers, deployments and a worker, a run started through Prefect's API, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.definitions import DEFINITIONS
from flows.pools import POOL, SWEEP_POOL
from flows.processes import _marked, end_marked, taken

ROOT = Path(__file__).parent.parent
TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
SERVERS = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI")

pytestmark = pytest.mark.slow


@dataclass
class Up:
    """A running `cdpo up`."""

    process: subprocess.Popen[bytes]
    home: Path
    environment: dict[str, str]
    state: dict[str, str]

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """One request to Prefect's API; (status, text) when it is refused."""
        request = urllib.request.Request(
            self.state["PREFECT_API_URL"] + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        return json.loads(text) if text else None

    def python(self, *arguments: str) -> None:
        """Run Python against these servers."""
        environment = {**self.environment, **{name: self.state[name] for name in ("PREFECT_API_URL",)}}
        subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = tmp_path_factory.mktemp("up")
    environment = {key: value for key, value in os.environ.items() if key not in SERVERS}
    environment |= {"CDPO_HOME": str(home), "PREFECT_HOME": str(home / "prefect")}
    command = [sys.executable, "-m", "flows.cli", "up", "--prefect-port", "0", "--mlflow-port", "0"]
    with (home / "out").open("wb") as out:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    state: dict[str, str] = {}
    try:
        _until(lambda: process.poll() is not None or "Ctrl-C ends" in (home / "out").read_text(), 240)
        assert process.poll() is None, (home / "out").read_text()
        state = json.loads((home / "up.json").read_text())
        yield Up(process, home, environment, state)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if state:
            end_marked(state["marker"])


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
    ]:
        status, text = running.api(
            "POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters}
        )
        assert status in (409, 422)
        assert named in text


def test_a_run_of_a_deployment_with_nested_parameters_changed(running: Up) -> None:
    deployment = running.api("GET", "/deployments/name/experiment/experiment-testbed")
    changed = {key: value for key, value in TINY.items() if key not in ("name", "constraints")}
    run = running.api("POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": changed})
    assert run["parameters"] == {**deployment["parameters"], **changed}

    def state() -> Any:
        return running.api("GET", f"/flow_runs/{run['id']}")["state"]

    _until(lambda: state()["type"] in ("COMPLETED", "FAILED", "CRASHED"), 240)
    assert state()["type"] == "COMPLETED", (running.home / "logs" / "worker-cdpo.log").read_text()[-3000:]
    artifacts = running.api("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    link = next(item for item in artifacts if item["key"].startswith("mlflow-"))
    assert running.state["MLFLOW_TRACKING_URI"] in link["data"]
    tracked = _mlflow_runs(running.state["MLFLOW_TRACKING_URI"])
    tags = {tag["key"]: tag["value"] for tag in tracked[0]["data"]["tags"]}
    assert run["id"] in tags["prefect.flow_run"]
    assert tracked[0]["info"]["run_id"] in link["data"]


def test_ctrl_c_ends_every_process_it_started(running: Up) -> None:
    started = _marked(running.state["marker"])
    assert len(started) >= 3
    ports = [
        int(running.state[name].split(":")[2].split("/")[0]) for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    ]
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(timeout=60) == 0
    assert _marked(running.state["marker"]) == []
    assert not any(process.is_running() for process in started)
    assert not any(map(taken, ports))
    assert not (running.home / "up.json").exists()
    assert (running.home / "out").read_text().endswith("all ended\n")


def _mlflow_runs(address: str) -> list[Any]:
    def ask(path: str, body: dict[str, Any]) -> Any:
        url, headers = f"{address}/api/2.0/mlflow/{path}", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    experiments = [item["experiment_id"] for item in ask("experiments/search", {"max_results": 100})["experiments"]]
    runs: list[Any] = ask("runs/search", {"experiment_ids": experiments})["runs"]
    return runs


def _until(is_so: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.3)

"""Row 9: `cdpo up`, a run of the deployment through Prefect's API, and one that must be refused."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from acceptance.evidence import mlflow_client
from acceptance.lab import CDPO, ROOT, Lab
from acceptance.quality import home_of, learned
from acceptance.row import Row

DEPLOYMENT = "/deployments/name/experiment/experiment-testbed"
CHANGED = {"certificate": {"delta": 0.1}}
INVALID, NAMED = {"dpo": {"beta": -1.0}}, "dpo.beta"
READY_SECONDS, RUN_SECONDS, END_SECONDS = 300, 1800, 60
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def deployed(lab: Lab) -> Row:
    """Row 9, in the state folder of the first run, so that only what the changed parameter enters is computed."""
    learned(lab, 0)
    found = lab.once("deployed", lambda: _with_up(lab))
    differences = found["differences"]
    is_as_set = found["parameters_kept"] and differences == ["certificate.delta"]
    run = (
        f"{found['state']} in {found['run_seconds']:.0f} s, config differs from the deployment's in "
        f"{', '.join(differences) or 'nothing'}, link to MLflow {_yes(found['to_mlflow'])}, "
        f"back {_yes(found['to_prefect'])}"
    )
    refused = f"HTTP {found['refusal']}, names {NAMED}: {_yes(found['named'])}, flow runs begun: {found['begun']}"
    return Row(
        9,
        "cdpo up; a deployment run with certificate.delta = 0.1, and one with dpo.beta = -1",
        f"up in {found['ready_seconds']:.0f} s; valid: {run}; invalid: {refused}; after Ctrl-C: exit "
        f"{found['up_code']}, {found['left']} processes left",
        "completes, the rest as the deployment set it, links both ways; refused before anything starts, field named",
        found["state"] == "COMPLETED"
        and is_as_set
        and found["to_mlflow"]
        and found["to_prefect"]
        and found["refusal"] in (409, 422)
        and found["named"]
        and found["begun"] == 0
        and found["up_code"] == found["left"] == 0,
    )


def _with_up(lab: Lab) -> dict[str, Any]:
    with _up(lab) as (process, state, ready_seconds):
        family = psutil.Process(process.pid).children(recursive=True)
        found = {"ready_seconds": ready_seconds, **_valid(state, lab), **_invalid(state)}
        process.send_signal(signal.SIGINT)
        code = process.wait(END_SECONDS)
        left = sum(item.is_running() and item.status() != psutil.STATUS_ZOMBIE for item in family)
    return {**found, "up_code": code, "left": left}


@contextmanager
def _up(lab: Lab) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str], float]]:
    home, out = lab.home(home_of(0)), lab.work / "logs" / "up.log"
    (home / "up.json").unlink(missing_ok=True)
    command = [*CDPO, "up", "--prefect-port", "0", "--mlflow-port", "0"]
    started = time.monotonic()
    with out.open("wb") as log:
        environment = lab.environment(home_of(0))
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        while "Ctrl-C ends" not in out.read_text():
            if process.poll() is not None or time.monotonic() - started > READY_SECONDS:
                raise RuntimeError(f"cdpo up did not start:\n{out.read_text()[-3000:]}")
            time.sleep(0.2)
        yield process, json.loads((home / "up.json").read_text()), time.monotonic() - started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(END_SECONDS)


def _valid(state: dict[str, str], lab: Lab) -> dict[str, Any]:
    api = state["PREFECT_API_URL"]
    deployment = _ask(api, "GET", DEPLOYMENT)
    started = time.monotonic()
    run = _ask(api, "POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": CHANGED})
    while (now := _ask(api, "GET", f"/flow_runs/{run['id']}"))["state"]["type"] not in ENDED:
        if time.monotonic() - started > RUN_SECONDS:
            break
        time.sleep(1)
    seconds = time.monotonic() - started
    artifacts = _ask(api, "POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    links = [str(item["data"]) for item in artifacts if str(item["key"]).startswith("mlflow-")]
    return {
        "state": now["state"]["type"],
        "run_seconds": seconds,
        "parameters_kept": now["parameters"] == {**deployment["parameters"], **CHANGED},
        **_in_mlflow(state["MLFLOW_TRACKING_URI"], run["id"], links, lab.work / "mlflow"),
    }


def _in_mlflow(uri: str, flow_run: str, links: list[str], folder: Path) -> dict[str, Any]:
    """The MLflow run that points at the flow run: its links, and where its config differs from the preset's."""
    from cdpo_core.config_loading import load_config

    client = mlflow_client(folder, uri)
    experiments = [item.experiment_id for item in client.search_experiments()]
    runs = [run for run in client.search_runs(experiments) if flow_run in run.data.tags.get("prefect.flow_run", "")]
    if len(runs) != 1:
        return {"to_prefect": False, "to_mlflow": False, "differences": []}
    folder.mkdir(exist_ok=True)
    config = yaml.safe_load(
        Path(client.download_artifacts(runs[0].info.run_id, "config.yaml", str(folder))).read_text()
    )
    shipped = load_config("testbed").model_dump(mode="json")
    return {
        "to_prefect": True,
        "to_mlflow": any(uri in link and runs[0].info.run_id in link for link in links),
        "differences": _differences(config, shipped),
    }


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted({*one, *other})
        return [p for name in names for p in _differences(one.get(name), other.get(name), f"{path}.{name}".strip("."))]
    return [] if one == other else [path]


def _invalid(state: dict[str, str]) -> dict[str, Any]:
    api = state["PREFECT_API_URL"]
    deployment = _ask(api, "GET", DEPLOYMENT)
    before = _ask(api, "POST", "/flow_runs/count", {})
    answer = _ask(api, "POST", f"/deployments/{deployment['id']}/create_flow_run", {"parameters": INVALID})
    status, text = answer if isinstance(answer, tuple) else (200, "")
    return {"refusal": status, "named": NAMED in text, "begun": _ask(api, "POST", "/flow_runs/count", {}) - before}


def _ask(api: str, method: str, path: str, body: Any = None) -> Any:
    """One request to Prefect's API; (status, text) when it is refused."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(api + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "NO"

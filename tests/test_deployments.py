"""What is deployed, and that nothing `cdpo up` starts outlives it; no server is needed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import yaml

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import CdpoError, InputError
from deployments.definitions import DEFINITIONS, SWEEP, Definition, prefect_yaml
from flows import up
from flows.pools import POOL, SWEEP_POOL
from flows.processes import MARKER, Child, end_all, end_marked, free_port, taken
from flows.stack import Stack
from tasks.environment import default_store

ROOT = Path(__file__).parent.parent
# What a flow takes beside the sections of a config.
OWN = {"limits", "seeds", "methods"}


def test_prefect_yaml_is_written_from_the_definitions() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert text == prefect_yaml(), "run: python -m deployments.bootstrap --write prefect.yaml"


def test_prefect_yaml_holds_no_path_of_a_machine() -> None:
    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert document["pull"] == []
    for deployment in document["deployments"]:
        assert "/" not in deployment["entrypoint"]
        assert not {"path", "pull"} & set(deployment)
    assert not [word for word in prefect_yaml().split() if word.startswith(("/", "~"))]


@pytest.mark.parametrize("item", DEFINITIONS, ids=lambda item: item.name)
def test_a_deployment_is_the_preset_it_names(item: Definition) -> None:
    parameters = item.all_parameters()
    stated = {} if item.preset else {"constraints": [{"limit": 0}]}
    preset = yaml.safe_load((ROOT / "configs" / f"{item.preset}.yaml").read_text()) if item.preset else {}
    assert parameters == {**item.parameters, **preset}
    # What is generic states no limit, and none is made up: whoever starts a run of it must.
    assert ("constraints" in parameters) == bool(item.preset)
    ExperimentConfig.model_validate({key: value for key, value in (parameters | stated).items() if key not in OWN})
    module, name = item.entrypoint.rsplit(".", 1)
    flow = getattr(import_module(module), name)
    assert set(parameters) <= set(flow.parameters.properties)
    assert set(ExperimentConfig.model_fields) <= set(flow.parameters.properties)
    # What the server refuses before anything starts.
    rules = flow.parameters.properties
    assert rules["seed"]["minimum"] == 0
    assert rules["name"]["minLength"] == rules["constraints"]["minItems"] == 1
    assert rules.get("limits", {"minItems": 1})["minItems"] == 1
    assert all(rule["description"] for rule in rules.values())
    slugs = [schedule.slug for schedule in item.schedules]
    assert all(slugs)
    assert len(set(slugs)) == len(slugs)
    for schedule in item.schedules:
        changed = {**parameters, **schedule.parameters}
        ExperimentConfig.model_validate({key: value for key, value in changed.items() if key not in OWN})
        assert set(schedule.parameters) <= set(flow.parameters.properties)


def test_every_preset_is_a_deployment_in_its_own_words() -> None:
    shipped = {path.stem: path.read_text() for path in (ROOT / "configs").glob("*.yaml")}
    deployed = {item.preset: item for item in DEFINITIONS if item.name == f"experiment-{item.preset}"}
    assert set(deployed) == set(shipped)
    for name, text in shipped.items():
        words = deployed[name].description
        assert words.endswith(".")
        assert f"# {words[:40]}" in text


def test_parents_of_sweeps_wait_in_a_pool_of_their_own() -> None:
    assert {item.pool for item in DEFINITIONS if item.entrypoint == SWEEP} == {SWEEP_POOL}
    assert {item.pool for item in DEFINITIONS if item.entrypoint != SWEEP} == {POOL}


def test_a_child_ends_with_its_grandchildren_even_in_sessions_of_their_own(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}], start_new_session=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, MARKER: "test-grandchildren"}
    child = Child("a parent", [sys.executable, "-c", parent], environment, tmp_path / "log")
    _until(lambda: "up" in (tmp_path / "log").read_text())
    grandchild = psutil.Process(int((tmp_path / "log").read_text().split()[0]))
    child.end(grace=0.3)
    assert child.poll() is not None
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE
    assert end_all([child], "test-grandchildren") == 0


def test_what_lost_its_parent_is_found_by_its_mark(tmp_path: Path) -> None:
    environment = {**os.environ, MARKER: "test-orphan"}
    code = f"import subprocess; subprocess.Popen({_sleeping()!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    _until(lambda: end_marked("test-orphan") == 1)
    assert end_marked("test-orphan") == 0


def test_what_a_killed_up_left_is_ended_by_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = Child("left", _sleeping(), {**os.environ, MARKER: "test-left"}, tmp_path / "log")
    (tmp_path / up.STATE).write_text(json.dumps({"pid": 1, "marker": "test-left", "ready": True}))
    _until(lambda: psutil.Process(left._process.pid).environ().get(MARKER) == "test-left")
    up._end_leftovers(tmp_path)
    assert left.poll() is not None
    assert "ended 1 processes" in capsys.readouterr().out


def test_a_died_part_is_noticed_and_its_log_shown(tmp_path: Path) -> None:
    child = Child("the worker", [sys.executable, "-c", "print('no pool'); exit(3)"], dict(os.environ), tmp_path / "log")
    with pytest.raises(CdpoError, match="the worker ended with exit code 3") as caught:
        up._watch([child], threading.Event())
    assert "no pool" in str(caught.value)
    killed = Child("the server", _sleeping(), dict(os.environ), tmp_path / "log")
    os.kill(killed._process.pid, signal.SIGKILL)
    with pytest.raises(CdpoError, match="the server was killed by signal 9"):
        up._watch([killed], threading.Event())


SERVE = """
import sys
from pathlib import Path
from flows import up
from flows.pools import POOL, SWEEP_POOL
from flows.processes import Child
from flows.up_command import UpOptions

def start(stack, children, stop):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = Child("a part", command, stack.for_clients(), stack.home / "log")
    (stack.home / "pid").write_text(str(child._process.pid))
    children.append(child)
    return True

up._start, up._watch = start, lambda children, stop: None
sys.exit(up.serve(UpOptions(prefect_port=0, mlflow_port=0)))
"""


def test_all_ends_when_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "CDPO_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SERVE], env=environment, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert not (tmp_path / up.STATE).exists()


def test_the_part_that_was_waited_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "READY_SECONDS", 0)
    children = [Child(name, _sleeping(), dict(os.environ), tmp_path / name) for name in ("the first", "the last")]
    try:
        with pytest.raises(CdpoError, match="the first was not ready") as caught:
            up._wait(children[0], lambda: False, children, threading.Event())
        assert caught.value.where == str(tmp_path / "the first")
    finally:
        for child in children:
            child.end()


def test_a_port_that_may_not_be_used_is_not_called_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(InputError, match=r"port 80 of 127\.0\.0\.1 cannot be listened on: Permission denied") as caught:
        up._port(80, "--prefect-port")
    assert "from 1024" in caught.value.fix


def test_a_port_in_use_is_an_error_and_0_takes_a_free_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is in use") as caught:
            up._port(port, "--prefect-port")
        assert "--prefect-port" in str(caught.value)
    with pytest.raises(InputError, match="no port"):
        up._port(70000, "--mlflow-port")
    assert not taken(up._port(0, "--mlflow-port"))
    port = free_port()
    assert up._port(port, "--mlflow-port") == port


def test_one_up_for_a_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its servers are joined by other commands while it holds the lock, and not afterwards."""
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    stack = Stack(tmp_path, "mark", "127.0.0.1", 1, 2, store="s3://team/cdpo")
    for name in up.SHARED:
        # Set first, so that monkeypatch takes away what join_running sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with up._only_one(tmp_path):
        up._remember(stack, ready=False)
        with pytest.raises(InputError, match="running already"), up._only_one(tmp_path):
            pass
        up.join_running()
        assert "MLFLOW_TRACKING_URI" not in os.environ
        up._remember(stack, ready=True)
        monkeypatch.setenv("PREFECT_API_URL", "http://mine/api")
        up.join_running()
        assert os.environ["PREFECT_API_URL"] == "http://mine/api"
        assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"
        assert default_store() == "s3://team/cdpo"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    up.join_running()
    assert "MLFLOW_TRACKING_URI" not in os.environ


def _sleeping() -> list[str]:
    return [sys.executable, "-c", "import time; time.sleep(60)"]


def _until(is_so: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)

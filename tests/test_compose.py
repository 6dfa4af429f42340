"""compose.yaml and the Dockerfile, without an engine: what they say must be what the same programs here take."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_kit import experiment_config

from flows.page_guard import HOSTS, ORIGINS
from flows.pools import POOL, SWEEP_POOL
from flows.stack import Stack
from tasks.access import Login
from tasks.environment import HEARTBEAT_SECONDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "compose.yaml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "deployments" / "env.example").read_text(encoding="utf-8")
# What a reader of compose.yaml must never find in it.
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|FLASK_KEY|ACCESS_KEY_ID")
REFERENCE = re.compile(r"\$\{(\w+)(?P<rest>[^}]*)\}")


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(TEXT)["services"]
    return found


def command(service: str) -> list[str]:
    return [REFERENCE.sub("", word) or "set-by-environment" for word in services()[service]["command"]]


def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path, "mark", "127.0.0.1", 4200, 5000, store="s3://cdpo/store", login=Login("name", "word"))


def test_every_part_of_the_stack_is_there() -> None:
    found = services()
    assert set(found) == {"postgres", "s3", "prefect", "mlflow", "bootstrap", "worker", "sweep-worker"}
    assert found["worker"]["deploy"]["replicas"] == 2
    for name, service in found.items():
        waited_for = service.get("depends_on", {})
        for other, condition in waited_for.items():
            assert other in found
            if condition["condition"] == "service_healthy":
                assert (
                    "healthcheck" in found[other] or "HEALTHCHECK" in (ROOT / "deployments/s3/Dockerfile").read_text()
                )
        assert service["restart"] == ("no" if name == "bootstrap" else "unless-stopped")
    used = {volume.split(":")[0] for service in found.values() for volume in service.get("volumes", [])}
    assert {name for name in used if not name.startswith("./")} == set(yaml.safe_load(TEXT)["volumes"])
    for name in (name for name in used if name.startswith("./")):
        assert (ROOT / name).is_file(), name


def test_secrets_come_from_the_environment_and_are_demanded() -> None:
    for service, settings in services().items():
        for name, value in settings.get("environment", {}).items():
            if SECRET.search(name) and not name.startswith("MLFLOW_AUTH_CONFIG"):
                assert REFERENCE.sub("", str(value)) in ("", ":"), f"{service}: {name}"
                assert all(rest.startswith(":?") for _, rest in REFERENCE.findall(str(value))), f"{service}: {name}"
        for word in settings.get("command", []):
            assert not SECRET.search(word), f"{service}: {word}"
    demanded = {name for name, rest in REFERENCE.findall(TEXT) if rest.startswith(":?")}
    assert demanded == set(re.findall(r"^(\w+)=$", EXAMPLE, re.MULTILINE))
    assert all(rest.startswith((":?", ":-")) for _, rest in REFERENCE.findall(TEXT))


def test_ports_are_on_loopback_and_images_are_pinned() -> None:
    for name, service in services().items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if "build" not in service:
            assert re.search(r":\d+\.\d+", service["image"]), name
    for file in ("Dockerfile", "deployments/s3/Dockerfile"):
        base = re.findall(r"^FROM (.+)$", (ROOT / file).read_text(), re.MULTILINE)
        assert base, file
        assert all(re.search(r":\d+\.\d+", image) for image in base), file


def test_the_servers_are_started_as_cdpo_up_starts_them(tmp_path: Path) -> None:
    prefect, mlflow = (part.command[2:] for part in stack(tmp_path).servers())
    assert prefect[:2] == ["flows.prefect_server", "prefect"]
    for service, mine in (("prefect", prefect), ("mlflow", mlflow)):
        assert options(command(service)) == options(mine), service
        assert command(service)[2:4] == mine[:2]
        guarded = stack(tmp_path).servers()
        assert all({HOSTS, ORIGINS} <= part.environment.keys() for part in guarded)
        assert {HOSTS, ORIGINS} <= services()[service]["environment"].keys(), service
    workers = {pool: part.command[2:] for pool, _, part in stack(tmp_path).pool_workers()}
    for service, pool in (("worker", POOL), ("sweep-worker", SWEEP_POOL)):
        # A name is given where there is one of it; Prefect names the others by their process.
        assert options(command(service)) | {"--name"} == options(workers[pool]), service
        assert pool in command(service)


def options(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def test_the_commands_are_ones_the_programs_take() -> None:
    from mlflow.cli import server

    with server.make_context("server", command("mlflow")[4:], resilient_parsing=False) as context:
        assert context.params["app_name"] == "basic-auth"
        assert "localhost:5000" not in context.params["allowed_hosts"]  # the default stands in ${…}
    for service in ("prefect", "worker", "sweep-worker"):
        words = command(service)[3 if service == "prefect" else 0 :]
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *words[1:3], "--help"], capture_output=True, text=True, check=True
        )
        for option in options(words):
            assert option in done.stdout, f"{service}: {option}"


def test_the_parts_know_each_other() -> None:
    found = services()
    for name in ("prefect", "mlflow", "bootstrap", "worker", "sweep-worker"):
        environment = found[name]["environment"]
        assert environment["PREFECT_API_URL"] == "http://prefect:4200/api"
        assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_SECONDS)
        if name != "prefect":
            assert environment["AWS_ENDPOINT_URL"].endswith("http://s3:8000}")
            assert environment["CDPO_STORE"].startswith("${CDPO_STORE:-s3://")
    auth = configparser.ConfigParser()
    auth.read(ROOT / "deployments" / "mlflow-auth.ini")
    assert auth["mlflow"]["database_uri"] == command("mlflow")[command("mlflow").index("--backend-store-uri") + 1]
    assert auth["mlflow"]["default_permission"] == "EDIT"
    assert "admin_password" not in auth["mlflow"]
    assert experiment_config().store.uri == ""  # else CDPO_STORE would be read by nobody


def test_the_image_is_made_by_the_steps_of_make_env() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    upgrade = re.search(r'install --quiet --upgrade ("pip>=\d+")', makefile)
    assert upgrade
    assert f"install --quiet --upgrade {upgrade[1]}" in DOCKERFILE
    assert "install --quiet --constraint constraints.txt --editable" in makefile
    assert "install --quiet --constraint constraints.txt ." in DOCKERFILE
    assert "compileall -q -j 0" in makefile
    assert "compileall -q -j 0" in DOCKERFILE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = re.findall(r"^COPY (\w+) \1$", DOCKERFILE, re.MULTILINE)
    assert sorted(copied) == sorted(packages)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in [*packages, "pyproject.toml", "constraints.txt", *project["project"]["license-files"]]:
        assert f"!{name}" in ignored, name
    assert "\nUSER cdpo\n" in DOCKERFILE


@pytest.mark.parametrize("script", ["deployments/s3/serve.sh"])
def test_the_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)

"""The work pools' templates: what a container of a run is given, and that Prefect's server takes them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.workers.base import BaseJobConfiguration
from pydantic import ConfigDict

from cdpo_core.errors import InputError
from deployments import pools
from deployments.pools import TYPES, PoolOptions, base_template, make_pools
from tasks.environment import RUN_SETTINGS

IMAGE = "registry.example.com/cdpo:0.1"


class _Any(BaseJobConfiguration):
    """The rendering that every worker's own configuration inherits, whatever its fields."""

    model_config = ConfigDict(extra="allow")


def rendered(kind: str, **values: Any) -> dict[str, Any]:
    """What a worker makes of the template for a run with these job variables."""
    template = pools._with(PoolOptions(image=IMAGE), kind, base_template(kind))
    made = asyncio.run(_Any.from_template_and_values(template, values, client=object()))  # type: ignore[arg-type]
    return made.model_dump()


@pytest.fixture(autouse=True)
def _stack(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in pools.TOLD:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CDPO_STORE", "s3://team/cdpo")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")


def test_a_run_on_kubernetes_is_a_job() -> None:
    made = rendered("kubernetes", gpus=2, memory_limit="64Gi")
    job = made["job_manifest"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "prefect-job"  # prefect-kubernetes refuses every other
    assert container["image"] == IMAGE
    assert container["envFrom"] == [{"secretRef": {"name": "cdpo"}}]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 2}
    told = {"CDPO_STORE": "s3://team/cdpo", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert made["env"] == {**told, **RUN_SETTINGS}
    assert job["spec"]["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 30
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # What nobody set is left out, instead of being sent as a template or as null.
    assert "serviceAccountName" not in pod
    assert "{{" not in json.dumps({name: value for name, value in made.items() if name != "env"})


def test_a_run_on_docker_is_a_container() -> None:
    made = rendered("docker", mem_limit="64g")
    assert (made["image"], made["mem_limit"], made["auto_remove"]) == (IMAGE, "64g", True)
    assert all(volume.endswith(":ro") or volume == "cdpo-state:/cdpo" for volume in made["volumes"])
    assert made["env"]["CDPO_STORE"] == "s3://team/cdpo"
    assert "{{" not in json.dumps({name: value for name, value in made.items() if name != "env"})


@pytest.mark.parametrize("kind", TYPES)
def test_every_variable_is_used_and_every_one_used_is_there(kind: str) -> None:
    template = base_template(kind)
    used = json.dumps(template["job_configuration"])
    for name, variable in template["variables"]["properties"].items():
        assert f"{{{{ {name} }}}}" in used, name
        assert variable["title"], name
        assert variable["description"], name
    assert used.count("{{") >= len(template["variables"]["properties"])


def test_a_password_does_not_get_into_a_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@mlflow:5000")
    with pytest.raises(InputError, match="holds a password") as caught:
        base_template("kubernetes")
    assert "hunter2" not in str(caught.value)
    assert base_template("process")  # told nothing: its environment is its worker's


def test_pools_are_made_once_and_kept(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real server, which checks a template before it takes it."""
    for kind in ("kubernetes", "docker", "process"):
        names = {f"{kind}-pool": "Experiments.", f"{kind}-parents": "Parents."}
        monkeypatch.setattr(pools, "WORDS", names)
        monkeypatch.setattr(pools, "POOL", f"{kind}-pool")
        image = "" if kind == "process" else IMAGE
        with get_client(sync_client=True) as client:
            make_pools(client, PoolOptions(kind, image, concurrency=3))
            make_pools(client, PoolOptions())
            found = {name: client.read_work_pool(name) for name in names}
            assert {pool.type for pool in found.values()} == {kind}
            assert found[f"{kind}-pool"].concurrency_limit == 3
            assert found[f"{kind}-parents"].concurrency_limit is None
            if image:
                make_pools(client, PoolOptions(image="another"))
                template = client.read_work_pool(f"{kind}-pool").base_job_template
                assert template["variables"]["properties"]["image"]["default"] == "another"
            other = next(item for item in TYPES if item != kind)
            with pytest.raises(InputError, match=f"of type {kind}, not {other}"):
                make_pools(client, PoolOptions(other, image))


def test_containers_need_an_image_and_processes_have_none(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "WORDS", {"no-such-pool": "None."})
    with get_client(sync_client=True) as client:
        with pytest.raises(InputError, match="need an image"):
            make_pools(client, PoolOptions("kubernetes"))
        with pytest.raises(InputError, match="have no image"):
            make_pools(client, PoolOptions("process", IMAGE))

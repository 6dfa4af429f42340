"""Sweeps whose children run on two workers: shared work is done once, and retries, deaths and cancels leave no mess."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from chain_kit import OVERRIDES, computed, digests, new_home, run_here, stage_counts
from servers_postgres import Postgres
from sweep_kit import Team, team, until

from cdpo_core.config_loading import load_config
from tasks.result import outcome_name
from tasks.storage import open_store

pytestmark = [pytest.mark.slow, pytest.mark.faults]

LIMITS = [-0.3, -0.25, -0.2, -0.15, -0.1, 0.3]
WORKERS = ("first", "second")
SHARED = ["data", "enumeration", "scorers", "sft", "splits"]


class Swept(NamedTuple):
    """A sweep that a killed and retried parent completed."""

    team: Team
    run_id: str
    before: list[dict[str, Any]]


def _parameters(store: Path, **own: Any) -> dict[str, Any]:
    return load_config("tiny", {**OVERRIDES, "store.uri": str(store)}).model_dump(mode="json") | own


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory, postgres: Postgres, _empty_mlflow_database: Path) -> Iterator[Team]:
    home = new_home(tmp_path_factory.mktemp("team"), _empty_mlflow_database)
    with team(home, postgres, "sweeps", WORKERS) as found:
        yield found


@pytest.fixture(scope="module")
def swept(crew: Team) -> Swept:
    """Six limits; the parent's process is killed in mid-sweep, and the parent is retried."""
    run_id = crew.start("sweep/sweep", _parameters(crew.home / "store", limits=LIMITS))
    until(lambda: len(crew.children()) == 6 and crew.children()[0]["state"]["type"] == "COMPLETED")
    crew.kill(run_id)
    assert crew.ended(run_id)["state"]["type"] == "CRASHED"
    before = crew.children()
    crew.set_state(run_id, "SCHEDULED", force=True)
    # The worker reports the death once more within seconds: the retried run shows Crashed until it says otherwise.
    until(lambda: crew.run(run_id)["state"]["type"] in ("COMPLETED", "FAILED"))
    assert crew.run(run_id)["state"]["type"] == "COMPLETED", crew.logs()
    return Swept(crew, run_id, before)


def _result(swept: Swept) -> dict[str, Any]:
    (file,) = (swept.team.home / "reports").glob("sweep-tiny-*/result.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _outcomes(swept: Swept) -> list[dict[str, Any]]:
    store = open_store(str(swept.team.home / "store"))
    found = [store.get_record(outcome_name(run["id"])) for run in swept.team.children()[:6]]
    return [record for record in found if record is not None]


def test_a_killed_and_retried_parent_finds_its_children_again(swept: Swept) -> None:
    after = swept.team.children()[:6]
    assert [run["id"] for run in after] == [run["id"] for run in swept.before]
    assert [(run["state"]["type"], run["run_count"]) for run in after] == [("COMPLETED", 1)] * 6
    parent = swept.team.run(swept.run_id)
    assert parent["run_count"] == 2
    assert {run["deployment_id"] for run in after} != {parent["deployment_id"]}
    tasks = swept.team.api("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [swept.run_id]}}})
    assert {run["parent_task_run_id"] for run in after} == {task["id"] for task in tasks}


def test_children_run_on_both_workers(swept: Swept) -> None:
    assert {name for run in swept.team.children()[:6] for name in swept.team.worker_of(run["id"])} == set(WORKERS)


def test_nothing_is_computed_twice_by_two_workers(swept: Swept) -> None:
    counts = stage_counts(swept.team.home / "store")
    assert {stage: counts[stage] for stage in SHARED} == dict.fromkeys(SHARED, 1)
    outcomes = _outcomes(swept)
    assert len(outcomes) == 6
    del counts["report"]  # written when all stages are done
    assert sum(len(computed(record)) for record in outcomes) == sum(counts.values())


def test_the_parents_record_is_its_childrens(swept: Swept) -> None:
    result = _result(swept)
    assert [child["limit"] for child in result["children"]] == LIMITS
    assert result["failed"] == []
    kept = {child.pop("limit"): child["policy"] for child in _outcomes(swept)}
    assert {child["limit"]: child["policy"] for child in result["children"]} == kept
    (folder,) = (swept.team.home / "reports").glob("sweep-tiny-*")
    assert {"frontier.png", "along_limits.png"} <= {file.name for file in folder.iterdir()}


@pytest.fixture
def alone(tmp_path: Path, prefect_server: str, _empty_mlflow_database: Path) -> tuple[Path, dict[str, Any]]:
    """The same sweep in one process, in an empty store."""
    home = new_home(tmp_path / "alone", _empty_mlflow_database)
    return home, run_here(home, "--limits", ",".join(map(str, LIMITS)), command="sweep")[1]


def test_verdicts_are_those_of_one_process(swept: Swept, alone: tuple[Path, dict[str, Any]]) -> None:
    home, result = alone
    assert [_verdict(child) for child in _result(swept)["children"]] == [
        _verdict(child) for child in result["children"]
    ]
    assert _stages(home) == _stages(swept.team.home)


def _stages(home: Path) -> dict[str, str]:
    """What was computed; a report tells of circumstances too."""
    return {name: digest for name, digest in digests(home / "store").items() if not name.startswith("report/")}


def _verdict(child: dict[str, Any]) -> dict[str, Any]:
    certificate = {key: child["certificate"][key] for key in ("mean", "upper", "passed")}
    return {**{key: child[key] for key in ("limit", "status", "lambda", "test", "rounds")}, **certificate} | {
        "rounds": [{**record, "seconds": 0} for record in child["rounds"]],
        "policy": child["policy"]["digest"],
    }


def test_a_completed_parent_retried_starts_nothing(swept: Swept) -> None:
    before = swept.team.children()
    swept.team.set_state(swept.run_id, "SCHEDULED", force=True)
    until(lambda: swept.team.run(swept.run_id)["run_count"] == 3)
    assert swept.team.ended(swept.run_id)["state"]["type"] == "COMPLETED", swept.team.logs()
    assert [(run["id"], run["run_count"]) for run in swept.team.children()] == [
        (run["id"], run["run_count"]) for run in before
    ]


def test_a_killed_child_is_named_and_a_retry_runs_it_alone(swept: Swept) -> None:
    crew, known = swept.team, {run["id"] for run in swept.team.children()}
    parameters = _parameters(crew.home / "store", limits=[-0.12, -0.08], at_once=1)
    run_id = crew.start("sweep/sweep", parameters)

    def mine() -> list[dict[str, Any]]:
        return [run for run in crew.children() if run["id"] not in known]

    until(lambda: bool(mine()) and "cdpo.pid" in crew.run(mine()[0]["id"])["labels"])
    crew.kill(mine()[0]["id"])
    ended = crew.ended(run_id)
    assert ended["state"]["type"] == "FAILED"
    assert ended["state"]["message"].startswith("1 of 2 children failed: tiny, harm ≤ -0.12 (Crashed")
    assert [run["state"]["type"] for run in mine()] == ["CRASHED", "COMPLETED"]
    crew.set_state(run_id, "SCHEDULED", force=True)
    until(lambda: crew.run(run_id)["run_count"] == 2)
    assert crew.ended(run_id)["state"]["type"] == "COMPLETED", crew.logs()
    assert [(run["state"]["type"], run["run_count"]) for run in mine()] == [("COMPLETED", 2), ("COMPLETED", 1)]


def test_a_cancelled_parent_cancels_its_children(swept: Swept) -> None:
    crew, known = swept.team, {run["id"] for run in swept.team.children()}
    # Another seed shares nothing, so that the first child has long work before it.
    run_id = crew.start("sweep/sweep", _parameters(crew.home / "store", limits=[-0.2, 0.0], seeds=[5]))

    def mine() -> list[dict[str, Any]]:
        return [run for run in crew.children() if run["id"] not in known]

    until(lambda: bool(mine()) and "cdpo.pid" in crew.run(mine()[0]["id"])["labels"])
    processes = [crew.process_of(run["id"]) for run in (mine()[0], crew.run(run_id))]
    crew.set_state(run_id, "CANCELLING")
    assert crew.ended(run_id)["state"]["type"] == "CANCELLED"
    assert crew.ended(mine()[0]["id"])["state"]["type"] == "CANCELLED", crew.logs()
    until(lambda: not any(map(_is_alive, processes)))
    assert len(mine()) == 1


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

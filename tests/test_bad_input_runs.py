"""What goes wrong while a run computes: the exit code, the words, and that everything finished is kept."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from chain_kit import Finished, words
from command_line_kit import Said, command_line
from test_data_input import pair_rows, write_lines

from cdpo_core.artifacts import Manifest
from cdpo_core.local_store import LocalStore

pytestmark = pytest.mark.slow

SMALL = {
    "name": "small",
    "data": {"splits": {"preferences": 0.5, "policy": 0.2, "selection": 0.1, "certificate": 0.1, "test": 0.1}},
    "policy": {"hidden_size": 16, "layers": 1, "heads": 2, "vocabulary_size": 320, "max_response_tokens": 8},
    "sft": {"steps": 4, "batch": 8},
    "reward": {"epochs": 1, "batch": 16},
    "constraints": [{"limit": 100.0}],
    "dpo": {"steps": 4, "prompts_per_step": 4, "responses_per_prompt": 4},
    "dual": {"rounds": 1},
    "sampling": {"reference": 4, "pool": 2, "selection": 2, "test": 2},
    "compute": {"threads": 1},
}


class Place(NamedTuple):
    """A state folder, and the config of the runs in it."""

    home: Path
    config: Path

    def run(self, *words: str) -> Said:
        """`cdpo run` of the config."""
        return command_line(["run", str(self.config), *words], self.home)

    def manifests(self) -> list[Manifest]:
        return LocalStore(self.home / "store").manifests()

    def stages(self) -> set[str]:
        return {manifest.stage for manifest in self.manifests()}

    def tracked(self) -> dict[str, str]:
        """The status of every MLflow run, by its id."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{self.home}/mlflow.db")
        runs = client.search_runs([item.experiment_id for item in client.search_experiments()])
        return {run.info.run_id: run.info.status for run in runs}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, _empty_mlflow_database: Path) -> Place:
    """Small data whose labels are drawn at random, and an empty state folder."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "home").mkdir()
    shutil.copy(_empty_mlflow_database, folder / "home" / "mlflow.db")
    toss = random.Random(0)
    drawn = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
    rows = [{**row, **{name: toss.randrange(2) for name in drawn[:2]}} for row in pair_rows(80)]
    rows = [{**row, **{name: toss.random() < 0.5 for name in drawn[2:]}} for row in rows]
    data = {**SMALL["data"], "source": str(write_lines(folder / "pairs.jsonl", rows))}
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "data": data}))
    return Place(folder / "home", folder / "small.yaml")


@pytest.fixture(scope="module")
def ended(place: Place) -> tuple[Said, dict[str, Any]]:
    """A run to its end: what it said and its result."""
    said = place.run("--json", str(place.home / "result.json"))
    return said, json.loads((place.home / "result.json").read_text())


def assert_failed(said: Said, what: str, where: str) -> None:
    """Exit 1, and after the progress one short error."""
    assert said.code == 1, said
    assert "Traceback" not in said.err
    assert len(said.error.splitlines()) <= 12
    assert what in said.error
    assert where in said.error
    assert said.out == ""


def test_a_loss_that_is_not_finite_keeps_what_is_finished(place: Place) -> None:
    command = ("--sft.learning_rate", "1e30", "--json", str(place.home / "failed.json"))
    first = place.run(*command)
    assert_failed(first, "loss is not finite", "sft, step 2")
    assert place.stages() == {"data"}
    assert set(place.tracked().values()) == {"FAILED"}
    assert not (place.home / "failed.json").exists()
    kept = place.manifests()
    again = place.run(*command)
    assert_failed(again, "loss is not finite", "sft, step 2")
    assert place.manifests() == kept
    assert len(place.tracked()) == 1


def test_a_loss_that_is_not_finite_in_a_round_keeps_the_models(
    place: Place, ended: tuple[Said, dict[str, Any]]
) -> None:
    kept = place.manifests()
    said = place.run("--dpo.learning_rate", "1e30")
    assert_failed(said, "loss is not finite", "dpo, step 2")
    assert place.manifests() == kept


def test_scorers_that_rank_at_random_are_a_warning_with_their_interval(
    ended: tuple[Said, dict[str, Any]],
) -> None:
    said, result = ended
    assert said.code == {"certified": 0, "not_certified": 3}[result["status"]]
    for name in ("reward", "harm"):
        scorer = result["scorers"][name]
        assert scorer["low"] <= 0.5
        assert f"95 % interval {scorer['low']:.2f} to {scorer['high']:.2f}" in scorer["warning"]
        line = next(line for line in said.out.splitlines() if line.startswith(f"{name} model:"))
        assert f"[{scorer['low']:.3f}, {scorer['high']:.3f}]" in line
        assert "no better than chance" in line or "against its labels" in line


def test_corrupted_objects_are_set_aside_and_computed_again(place: Place, ended: tuple[Said, dict[str, Any]]) -> None:
    store = place.home / "store"
    before = {(item.stage, item.key): item.digest for item in place.manifests()}
    spoiled = {name: next(item for item in place.manifests() if item.stage == name) for name in ("data", "scorers")}
    flip(store / "objects" / spoiled["data"].files["preferences.parquet"].sha256)
    cut(store / "objects" / spoiled["scorers"].files["model.safetensors"].sha256)
    said = place.run("--json", str(place.home / "again.json"))
    assert said.code == ended[0].code
    for stage in spoiled:
        assert any("set aside" in line and f"{stage} is computed again" in line for line in said.err.splitlines())
    assert {(item.stage, item.key): item.digest for item in place.manifests()} == before
    assert list((store / "aside" / "objects").iterdir())
    again = json.loads((place.home / "again.json").read_text())
    assert again["policy"] == ended[1]["policy"]
    assert {stage["name"] for stage in again["stages"] if not stage["cached"]} == {"data", "reward and harm model"}


def test_a_limit_below_the_floor_ends_infeasible(place: Place, ended: tuple[Said, dict[str, Any]]) -> None:
    said = place.run("--limit", "-1000", "--json", str(place.home / "infeasible.json"))
    result = json.loads((place.home / "infeasible.json").read_text())
    assert said.code == 3
    assert "the limit lies below the lowest mean cost" in said.err
    assert "Infeasible: harm ≤ -1000 is out of reach" in said.out
    assert result["status"] == "infeasible"
    assert result["certificate"] is None
    assert [record["lambda"] for record in result["rounds"]] == [20.0]
    assert result["reachable"]["floor"] > -1000


def test_a_limit_below_the_exact_floor_trains_no_round(finished: Finished) -> None:
    path = finished.home / "infeasible.json"
    said = command_line(["run", *words("--limit", "-9", "--json", str(path))], finished.home)
    result = json.loads(path.read_text())
    assert said.code == 3
    assert "Infeasible: harm ≤ -9 is out of reach" in said.out
    assert (result["status"], result["rounds"], result["policy"]) == ("infeasible", [], None)


def flip(path: Path) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Take the end of a file away."""
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[: len(content) // 2])

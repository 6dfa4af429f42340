"""A store with real runs, cleaned: what was kept is cached, registered policies work, what went is computed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chain_kit import Finished, computed, digests, numbers, run_here
from command_line_kit import command_line

from cdpo_core.config import TrackingConfig
from tasks import evaluation
from tasks.registered import registered_policies
from tasks.storage import open_store

pytestmark = pytest.mark.slow

COMPUTED_FIGURES = ("status", "lambda", "rounds", "policy", "test", "baselines", "oracle", "scorers")
SLACK = ["--limit", "9", "--name", "slack"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, finished: Finished) -> Path:
    """A store with the finished run, and one whose limit does not bind: certified and registered."""
    home = tmp_path_factory.mktemp("upkeep") / "home"
    shutil.copytree(finished.home, home, symlinks=True)
    code, result = run_here(home, *SLACK)
    assert (code, result["status"]) == (0, "certified")
    return home


def store(home: Path, *words: str) -> tuple[int, dict[str, Any]]:
    record = home / "upkeep.json"
    said = command_line(["store", *words, "--json", str(record)], home)
    return said.code, json.loads(record.read_text())


def test_each_run_lists_what_it_used(home: Path, finished: Finished) -> None:
    _, found = store(home, "ls")
    by_name = {run["name"]: run for run in found["runs"]}
    assert {"tiny", "slack"} <= by_name.keys()
    names = {run["name"] for run in found["runs"] if run["lists_its_artifacts"]}
    assert {"tiny", "slack"} <= names
    assert by_name["slack"]["missing"] == []
    slack = next(policy for policy in found["policies"] if "slack" in policy["runs"])
    assert (slack["status"], slack["registered"]) == ("certified", ["cdpo-slack v1"])
    data = next(item for item in found["artifacts"] if item["stage"] == "data")
    assert len(data["used_by"]) == len(found["runs"])
    code, shown = store(home, "ls", "--run", "slack")
    assert code == 0
    stages = {name.split("/")[0] for name in shown["runs"][0]["artifacts"]}
    assert stages >= {"data", "sft", "responses", "scorers", "scores", "splits", "round", "enumeration", "judgement"}


def test_after_a_cleaning_all_that_was_kept_works(home: Path, finished: Finished, tmp_path: Path) -> None:
    before = digests(home / "store")
    words = ["gc", "--drop-run", "tiny", "--older-than", "0s", "--idle"]
    code, planned = store(home, *words)
    assert code == 0
    assert planned["artifacts"]
    assert digests(home / "store") == before
    code, gone = store(home, *words, "--yes")
    assert code == 0
    assert gone["artifacts"] == planned["artifacts"]
    assert digests(home / "store").keys() == before.keys() - set(gone["artifacts"])
    assert {name.split("/")[0] for name in gone["artifacts"]} >= {"round", "responses", "scores", "judgement"}
    code, verified = store(home, "verify")
    assert (code, verified["orphans"], verified["inputs_gone"]) == (0, [], [])

    code, result = run_here(home, *SLACK)
    assert (code, computed(result)) == (0, [])
    versions = registered_policies(TrackingConfig(), home, [])
    assert "cdpo-slack" in {version.model for version in versions}
    for number, version in enumerate(versions):
        found = [
            manifest for manifest in open_store(str(home / "store")).manifests() if manifest.digest == version.digest
        ]
        reference = f"{home}/store/stages/round/{found[0].key}.json"
        assert command_line(["export", reference, str(tmp_path / str(number))], home).code == 0
        assert (tmp_path / str(number) / "model.safetensors").exists()
        said = command_line(["sample", reference, "how do I bake bread?", "-n", "1"], home)
        assert said.code == 0
        assert said.out.startswith("how do I bake bread?\n  ")

    code, result = run_here(home)
    assert code == finished.code
    assert computed(result)
    for name in COMPUTED_FIGURES:
        assert numbers(result[name]) == numbers(finished.result[name])
    _, shown = store(home, "ls", "--run", "tiny")
    (used,) = [set(run["artifacts"]) for run in shown["runs"] if run["policy"] == result["policy"]["digest"]]
    assert used & set(gone["artifacts"])
    reports = {name for name in used if name.startswith("report/")}  # a report tells how long its stages took
    after = digests(home / "store")
    assert {name: after[name] for name in used - reports} == {name: before[name] for name in used - reports}


def test_what_goes_while_a_run_uses_it_is_computed_again_and_the_run_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = run_here(home, *SLACK)
    before = digests(home / "store")
    enter_test = evaluation.enter_test

    def cleaned_away(bench: Any, *rest: Any) -> Any:
        for stage in ("data", "splits", "scores"):
            shutil.rmtree(home / "store" / "stages" / stage)
        named = {entry.sha256 for manifest in bench.store.manifests() for entry in manifest.entries}
        for path in (home / "store" / "objects").iterdir():
            if path.name not in named:
                path.unlink()
        return enter_test(bench, *rest)

    monkeypatch.setattr(evaluation, "enter_test", cleaned_away)
    code, result = run_here(home, *SLACK)
    assert code == 0
    assert numbers(result) == numbers(expected)
    assert digests(home / "store").items() <= before.items()
    assert store(home, "verify")[0] == 0
    _, shown = store(home, "ls", "--run", "slack")
    assert [run["missing"] for run in shown["runs"]] == [[]]

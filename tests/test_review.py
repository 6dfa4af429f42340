"""What reviewers find in MLflow: data sets, notes, the saved views, the alias of a sweep's choice, the report."""

from __future__ import annotations

import base64
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
from chain_kit import Finished, run_here
from report_kit import figure, infeasible, picture, result

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import TrackingConfig
from cdpo_core.dual.spending import share_of
from cdpo_core.evaluation.sweep_result import frontier_points
from cdpo_core.local_store import LocalStore
from tasks.report_store import FILE
from tasks.review import run_note, version_note
from tasks.review_tracking import ReviewTracker
from tasks.review_views import VIEW_TAG, review_state, saved_view
from tasks.storage import open_store
from tasks.sweep_review import ALIAS, sweep_note, tell_reviewers

DATA = {
    "name": "testbed, seed 0",
    "digest": "d" * 64,
    "source": '{"uri": "s3://bucket/stages/data/1.json"}',
    "source_type": "s3",
    "profile": '{"pairs": 10}',
    "context": "preferences",
}


@pytest.fixture
def tracker(mlflow_home: Path, tmp_path: Path) -> ReviewTracker:
    return ReviewTracker.open(TrackingConfig(), LocalStore(tmp_path / "store"), mlflow_home)


def client(tracker: ReviewTracker) -> Any:
    return tracker._client


def registered(tracker: ReviewTracker, limit: float) -> dict[str, Any]:
    """A finished child whose policy is a version of the model `cdpo-world`."""
    run_id = tracker.run_for(f"child {limit:g}", f"harm ≤ {limit:g}")
    policy = {"uri": f"s3://b/stages/round/{limit:g}.json", "digest": f"{limit:g}", "kind": "policy"}
    child = result(limit, reward=-limit, policy=policy, tracking={"run_id": run_id, "uri": "", "url": ""})
    tracker.register_policy(run_id, "cdpo-world", ArtifactRef(**policy), child["certificate"], {}, "words")
    return child


def sweep_of(children: list[dict[str, Any]], chosen: int | None) -> dict[str, Any]:
    record = {"name": "world", "children": children, "failed": [], "frontier": frontier_points(children)}
    if chosen is None:
        return {**record, "chosen": None}
    keys = ("limit", "settings", "lambda", "policy", "test")
    return {**record, "chosen": {key: children[chosen][key] for key in keys} | {"delta": 0.025}}


def test_data_of_a_run_is_named_once(tracker: ReviewTracker) -> None:
    run_id = tracker.run_for("key", "first")
    for _ in range(2):
        tracker.log_datasets(run_id, [DATA])
    (found,) = client(tracker).get_run(run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == (DATA["name"], "d" * 32)
    assert json.loads(found.dataset.source)["uri"] == "s3://bucket/stages/data/1.json"
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "preferences")]


def test_alias_follows_the_sweep_s_choice_and_ends_with_it(tracker: ReviewTracker, tmp_path: Path) -> None:
    children = [registered(tracker, -0.7), registered(tracker, -0.5)]
    parent = tracker.run_for("sweep", "sweep")

    def told(chosen: int | None, run_id: str = parent) -> Any:
        tell_reviewers(tracker, run_id, "k" * 32, sweep_of(children, chosen), "cdpo-world", tmp_path)
        return client(tracker).get_registered_model("cdpo-world").aliases

    assert told(0) == told(0) == {ALIAS: 1}
    version = client(tracker).get_model_version_by_alias("cdpo-world", ALIAS)
    assert (version.tags["chosen.by"], version.tags["chosen.delta"]) == (parent, "0.025")
    assert version.description == "words"
    assert told(1) == {ALIAS: 2}
    other = tracker.run_for("another sweep", "sweep")
    assert told(None, other) == {ALIAS: 2}, "another sweep's choice stays"
    assert told(None) == {}
    assert told(None) == {}


def test_alias_without_a_registered_model_is_nothing(tracker: ReviewTracker, tmp_path: Path) -> None:
    parent = tracker.run_for("sweep", "sweep")
    tell_reviewers(tracker, parent, "k" * 32, sweep_of([infeasible()], None), "cdpo-nothing", tmp_path)
    assert client(tracker).search_registered_models() == []


def test_what_a_person_wrote_about_the_experiment_stays(tracker: ReviewTracker) -> None:
    run_id = tracker.run_for("key", "first")
    client(tracker).set_experiment_tag(tracker._experiment_id, "mlflow.note.content", "ours")
    tracker.tag_experiment(run_id, {"mlflow.note.content": "ours?", f"{VIEW_TAG}review": "view"})
    tags = client(tracker).get_experiment(tracker._experiment_id).tags
    assert (tags["mlflow.note.content"], tags[f"{VIEW_TAG}review"]) == ("ours", "view")


def test_saved_view_is_as_the_ui_writes_it() -> None:
    state = review_state(["limit", "beta", "seed"], parent_run_id="abc")
    ((key, value),) = saved_view("sweep-1", "Sweep", state, 5).items()
    envelope = json.loads(value)
    assert (key, envelope["name"], envelope["createdAt"]) == (f"{VIEW_TAG}sweep-1", "Sweep", 5)
    packed = base64.b64decode(envelope["state"].removeprefix("deflate;"))
    assert json.loads(zlib.decompress(packed)) == state
    assert len(value) < 5000
    assert state["searchFilter"] == "tags.mlflow.parentRunId = 'abc'"
    *points, parallel = state["compareRunCharts"]
    assert [(chart["yaxis"]["key"], chart["xaxis"]["key"]) for chart in points] == [
        ("returned/lambda", "returned/limit"),
        ("returned/cost", "returned/limit"),
        ("returned/reward", "returned/cost"),
    ]
    assert parallel["selectedParams"] == ["limit", "beta", "seed"]


def test_saved_view_of_all_experiments_goes_by_round() -> None:
    charts = review_state(["limit", "beta", "seed"])["compareRunCharts"]
    shown = [chart.get("selectedMetricKeys") or chart["selectedParams"] for chart in charts]
    assert shown == [["dual/lambda"], ["dual/cost", "dual/limit"], ["dual/reward"], ["limit", "beta", "seed"]]


def test_saved_view_of_several_costs_compares_each_with_its_limit() -> None:
    charts = review_state(["limit.harm"], ["harm", "privacy"])["compareRunCharts"]
    keys = [chart["selectedMetricKeys"] for chart in charts if chart["type"] == "LINE"]
    assert keys[0] == ["dual/lambda/harm", "dual/lambda/privacy"]
    assert keys[1:3] == [["dual/cost/harm", "dual/limit/harm"], ["dual/cost/privacy", "dual/limit/privacy"]]
    charts = review_state(["limit.harm"], ["harm", "privacy"], "abc")["compareRunCharts"]
    axes = [(chart["yaxis"]["key"], chart["xaxis"]["key"]) for chart in charts if chart["type"] == "SCATTER"]
    assert axes == [
        *(
            (f"returned/{y}/{name}", f"returned/limit/{name}")
            for y in ("lambda", "cost")
            for name in ("harm", "privacy")
        ),
        *(("returned/reward", f"returned/cost/{name}") for name in ("harm", "privacy")),
    ]


def test_description_opens_with_the_verdict_and_the_links() -> None:
    pages = {"Report": "#/report", "Nowhere": ""}
    first, *others = run_note(result(), pages, "get-artifact?path=figures").split("\n\n")
    assert first == "**Certified: harm ≤ −0.5** · [Report](#/report)"
    assert "| **this policy** | 0.70 [0.60, 0.80] |" in "\n".join(others)
    assert others[-1] == "![λ and cost against the limit](get-artifact?path=figures)"
    assert "Out of reach" in run_note(infeasible(), {}, "")
    swept = sweep_note(sweep_of([result(-0.7), result(-0.5, reward=0.8)], 1), pages, ["#/1", "#/2"], "")
    assert swept.startswith("**Chosen: the policy of limit −0.5** · [Report](#/report)")
    assert "| **[−0.5](#/2)** | certified | 1.13 | 0.80 [0.70, 0.90] |" in swept
    assert "cdpo export round/cdef DIR" in version_note(result(test={"reward": figure(1), "cost": figure(0)}), "#/run")


def test_sweep_s_run_leads_to_its_children_s_reports(tracker: ReviewTracker, tmp_path: Path) -> None:
    child = registered(tracker, -0.5)
    parent = tracker.run_for("sweep", "sweep")
    tell_reviewers(tracker, parent, "k" * 32, sweep_of([child], 0), "cdpo-world", picture(tmp_path).parent)
    note = client(tracker).get_run(parent).data.tags["mlflow.note.content"]
    run = child["tracking"]["run_id"]
    assert f"[−0.5](#/experiments/1/runs/{run}/artifacts/report.html?workflowType=machine_learning)" in note
    # The frame in which MLflow shows a page lets no link out.
    assert "href" not in Path(client(tracker).download_artifacts(parent, FILE, str(tmp_path))).read_text()


@pytest.mark.slow
def test_run_leaves_a_report_for_people(finished: Finished, tmp_path: Path) -> None:
    record = finished.result
    ref = ArtifactRef(**record["report_artifact"])
    store = open_store(str(finished.home / "store"))
    stage, key = ref.uri.removesuffix(".json").split("/")[-2:]
    manifest = store.find(stage, key)
    assert manifest is not None
    text = (store.fetch(manifest) / FILE).read_text()
    assert (Path(record["report"]) / FILE).read_text() == text
    assert str(finished.home) not in text
    mlflow = mlflow_client(finished.home)
    sent = Path(mlflow.download_artifacts(record["tracking"]["run_id"], FILE, str(tmp_path)))
    assert sent.read_text() == text
    run = mlflow.get_run(record["tracking"]["run_id"])
    assert run.data.tags["mlflow.note.content"].startswith("**")
    assert {item.dataset.name for item in run.inputs.dataset_inputs} == {"testbed, seed 0", "splits of testbed, seed 0"}
    digest = record["data"]["digest"][:32]
    assert digest in {item.dataset.digest for item in run.inputs.dataset_inputs}


@pytest.mark.slow
def test_sweep_leaves_a_report_and_an_alias(finished: Finished, mlflow_home: Path) -> None:
    # A store of its own: a sweep uses up the prompts of the finished run's certificate.
    shutil.copytree(finished.home / "store", mlflow_home / "store")
    _, record = run_here(mlflow_home, "--limits", "-0.2,9", command="sweep")
    folder = Path(record["report"])
    assert sorted(path.name for path in (folder / "children").iterdir()) == ["01.html", "02.html"]
    mlflow = mlflow_client(mlflow_home)
    version = mlflow.get_model_version_by_alias("cdpo-tiny", ALIAS)
    assert version.tags["policy.digest"] == record["chosen"]["policy"]["digest"]
    # A further use of these prompts, divided among two tests.
    uses = record["children"][0]["certificate"]["uses"]
    assert uses > 1
    assert float(version.tags["chosen.delta"]) == pytest.approx(share_of(0.05, uses, "squares", 2), rel=1e-4)
    assert version.tags["chosen.by"] == record["tracking"]["run_id"]


def mlflow_client(home: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")

"""The report for people: it says the verdict, holds all it shows, and lets nothing a model wrote act."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from config_kit import experiment_config
from report_kit import EVIL, infeasible, picture, ref, result, samples

from cdpo_core.artifacts import ArtifactRef
from cdpo_core.config import StoreConfig, TrackingConfig
from cdpo_core.evaluation.sweep_result import frontier_points
from cdpo_core.local_store import LocalStore
from tasks.html_report import experiment_report, short_reference
from tasks.report_store import copy_report, publish_report, report_key
from tasks.sweep_review import publish_sweep_report, sweep_report

CONFIG = experiment_config(name="world")


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def sweep(*children: dict[str, Any], chosen: int | None = 0) -> dict[str, Any]:
    """The record of a sweep over these."""
    record = {"name": "world", "children": list(children), "failed": [], "frontier": frontier_points(children)}
    if chosen is None:
        return {**record, "chosen": None}
    keys = ("limit", "settings", "lambda", "policy", "test")
    return {**record, "chosen": {key: children[chosen][key] for key in keys} | {"delta": 0.05 / len(children)}}


def test_whoever_opens_it_reads_the_verdict_and_what_it_is_worth(tmp_path: Path) -> None:
    page = Page(experiment_report(result(), CONFIG, [picture(tmp_path)], samples("Heat it.")))
    assert page.open == []
    for words in (
        "Certified: harm ≤ −0.5",
        "is at most −0.575 with 95 % confidence; −0.5 was allowed",
        "reward 0.70 at cost −0.60",
        "What it does not mean",
        "with probability at most 5 %",
        "Heat it.",
        "82.0 % [80.0, 84.0]",
        "± 0.10",
        "round/cdef",
        "torch 2.13.0",
        "beta: 1.0",
    ):
        assert words in page.text
    assert "truth" not in page.text
    assert "Certified" not in Page(experiment_report(result(status="not_certified"), CONFIG, [])).text


def test_limit_out_of_reach_is_said_without_a_policy() -> None:
    page = Page(experiment_report(infeasible(), CONFIG, []))
    assert page.open == []
    assert "Out of reach: harm ≤ −9" in page.text
    assert "The lowest mean cost reached is harm −1.200 (round 2, λ = 20)" in page.text
    assert "likely be certified here is harm ≤ −1.05" in page.text
    assert "not tested" in page.text
    assert "How λ was found" not in page.text


def test_prompts_that_served_before_are_said() -> None:
    record = result()
    record["certificate"]["spent"] = 7
    assert "had been used for 7 tests" in Page(experiment_report(record, CONFIG, [])).text


def test_what_a_model_wrote_is_text_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    record = result(name=EVIL, reason=EVIL, warnings=[EVIL])
    config = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"source": EVIL})})
    html = experiment_report(record, config, [picture(tmp_path)], samples())
    page = Page(html)
    assert page.open == []
    assert page.text.count("alert(1)") >= 6  # title, heading, warning, prompt and two answers
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "iframe", "object", "link", "form", "base"})
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag != "img" or str(attributes["src"]).startswith("data:image/png;base64,")
    assert "http://" not in html
    assert "https://" not in html
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_same_result_is_the_same_bytes_wherever_it_was_made(tmp_path: Path) -> None:
    here = experiment_report(result(), CONFIG, [picture(tmp_path)], samples())
    elsewhere = result(
        policy=ref("round", "cdef", "s3://bucket/p"),
        data=ref("data", "defa", "s3://bucket/p"),
        pool_scores=ref("scores", "efab", "s3://bucket/p"),
        tracking={"run_id": "1", "uri": "http://mlflow:5000", "url": "http://mlflow:5000/#/1"},
        ended_ms=5,
        store="s3://bucket/p",
    )
    elsewhere["rounds"][0]["seconds"] = 3.0
    machine = {"store": StoreConfig(uri="s3://bucket/p"), "tracking": TrackingConfig(parent_run="5")}
    (tmp_path / "other").mkdir()
    there = experiment_report(elsewhere, CONFIG.model_copy(update=machine), [picture(tmp_path / "other")], samples())
    assert there == here
    assert "/home/" not in here


def test_several_costs_have_their_rows_and_figures(tmp_path: Path) -> None:
    record = result()
    other = {**record["constraints"][0], "name": "privacy", "limit": 0.1, "lambda": 0.0}
    record |= {"constraints": [record["constraints"][0], other]}
    record["rounds"][0] |= {"lambda": [1.13, 0.0], "cost": [-0.62, 0.05], "cost_upper": [-0.59, 0.08]}
    for row in (record["test"], *record["baselines"].values()):
        row["cost_privacy"] = row["cost"]
    files = [picture(tmp_path, "cost_histogram.png"), picture(tmp_path, "cost_histogram_privacy.png")]
    page = Page(experiment_report(record, CONFIG, files))
    assert "Certified: harm ≤ −0.5, privacy ≤ 0.1" in page.text
    assert "1.13, 0" in page.text
    assert "Costs of single answers, by method (privacy)" in page.text


def test_report_is_kept_once_and_repaired(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    key = report_key("what it says")
    first = publish_report(store, key, {"report.html": "<p>spent 1</p>"}, {"policy": "d" * 64})
    assert first.uri == f"{store.uri}/stages/report/{key}.json"
    assert publish_report(store, key, {"report.html": "<p>spent 2</p>"}, {}) == first
    assert copy_report(store, first, tmp_path / "out").read_text() == "<p>spent 1</p>"
    for path in (tmp_path / "store" / "objects").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_text("corrupt")
    again = publish_report(store, key, {"report.html": "<p>spent 1</p>"}, {"policy": "d" * 64})
    assert again == first
    assert copy_report(store, again, tmp_path / "out").read_text() == "<p>spent 1</p>"


def test_sweep_says_which_policy_and_why(tmp_path: Path) -> None:
    record = sweep(result(-0.7), result(-0.5, reward=0.8), infeasible(), chosen=1)
    record["failed"] = [{"name": "world, harm ≤ 3", "error": "no disk\nmore", "settings": {}, "limit": 3}]
    page = Page(sweep_report(record, [picture(tmp_path, "frontier.png")], {1: "children/02.html"}))
    assert page.open == []
    assert "Chosen: the policy of limit −0.5" in page.text
    assert "δ = 0.0167, the error probability divided by the 4 experiments" in page.text
    assert "world, harm ≤ 3: no disk" in page.text
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ["children/02.html"]
    none = Page(sweep_report(sweep(infeasible(), chosen=None), [], {}))
    assert "No policy was chosen" in none.text


def test_sweep_holds_its_children_s_reports(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    children = []
    for limit in (-0.7, -0.5):
        html = experiment_report(result(limit), CONFIG, [])
        child_ref = publish_report(store, report_key(html), {"report.html": html}, {})
        children.append(result(limit, report_artifact=child_ref.model_dump()))
    lost = ArtifactRef(uri=f"{store.uri}/stages/report/{'0' * 64}.json", digest="0" * 64, kind="report")
    children.append(result(0.0, report_artifact=lost.model_dump()))
    folder = tmp_path / "folder"
    folder.mkdir()
    made = publish_sweep_report(store, sweep(*children), folder)
    assert [path.name for path in sorted((folder / "children").iterdir())] == ["01.html", "02.html"]
    links = [a["href"] for tag, a in Page((folder / "report.html").read_text()).elements if tag == "a"]
    assert links == ["children/01.html", "children/02.html"]
    assert "harm ≤ −0.7" in (folder / "children" / "01.html").read_text()
    # Other experiments use up the prompts meanwhile; the sweep's report is still the same artifact.
    for child in children:
        child["verdict"] += " It has been tested on 9 times."
    assert publish_sweep_report(store, sweep(*children), folder) == made


@pytest.mark.parametrize(("given", "short"), [(None, "–"), (ref("round", "ab12"), "round/ab12")])
def test_references_are_shown_without_their_store(given: dict[str, str] | None, short: str) -> None:
    assert short_reference(given) == short

"""What a person does in the two UIs, in a real browser against the servers of `cdpo up`.

The form is filled in, the run followed to its end, and its charts, report and sweep are looked at in MLflow. What these
pages ask for stays on this machine, and a page of another origin in the same browser gets nothing done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser_kit import PICTURES, Attacker, attacker, browser, picture, sent_elsewhere
from playwright.sync_api import BrowserContext, Locator, Page, expect
from up_kit import ROOT, Up, ask, up_running

pytestmark = [pytest.mark.slow, pytest.mark.faults]

# The README's pictures show a run that means something.
PRESET = "testbed" if PICTURES else "tiny"
PARAMETERS = yaml.safe_load((ROOT / "configs" / f"{PRESET}.yaml").read_text())
SHIPPED = PARAMETERS["constraints"][0]["limit"]
LIMIT = -0.7 if PICTURES else -0.1
SWEPT = (-0.9, -0.7, -0.5, -0.3) if PICTURES else (-0.1, 0.1)
ENDED = re.compile("^(Certified|NotCertified|Infeasible)$")
VERSION = re.compile("^[0-9a-f]{8}$")
POINTS = ".scatterlayer .point"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    home = os.environ.get("CDPO_HOME") if PICTURES else None
    with up_running(Path(home) if home else tmp_path_factory.mktemp("up")) as running:
        yield running


@pytest.fixture(scope="module")
def web() -> Iterator[BrowserContext]:
    with browser() as context:
        yield context


@pytest.fixture(scope="module")
def run_page(up: Up, web: BrowserContext) -> Page:
    """The page of a run that was started from the deployment's form with another limit, when it has ended."""
    page = web.new_page()
    page.goto(f"{_ui(up)}/")
    page.get_by_role("link", name="Deployments").first.click()
    page.get_by_role("link", name=f"experiment-{PRESET}", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    limit = page.get_by_label("Limit", exact=True)
    expect(limit).to_have_value(f"{SHIPPED:g}")
    limit.fill(f"{LIMIT:g}")
    picture(page, "prefect_form")
    # From λ = 0, as in the paper, it takes more than one round.
    _choose(page, "Start (Optional)", "corrected", "zero")
    # The page links the run in a message that is gone after seconds.
    page.goto(f"{_ui(up)}/v2/runs/flow-run/{_submitted(page)}")
    expect(page.get_by_text(ENDED).first).to_be_visible(timeout=1_800_000)
    return page


def test_form_starts_a_run_at_the_limit_typed_in(up: Up, run_page: Page) -> None:
    run = up.api("GET", f"/flow_runs/{run_page.url.partition('/flow-run/')[2].partition('?')[0]}")
    assert run["state"]["type"] == "COMPLETED"
    given = run["parameters"]
    assert given["constraints"][0]["limit"] == LIMIT
    assert given["dual"]["start"] == "zero"
    shipped = {key: value for key, value in PARAMETERS.items() if isinstance(value, dict)}
    assert all(given[section][key] == value for section, fields in shipped.items() for key, value in fields.items())


def test_run_s_page_leads_to_its_verdict_and_rounds(run_page: Page) -> None:
    page = _artifact(run_page, "verdict")
    expect(page.get_by_role("heading", name=re.compile(f"harm ≤ {LIMIT:g}"))).to_be_visible()
    expect(page.get_by_role("columnheader", name="λ", exact=True).first).to_be_visible()
    for name in ("reference", "DPO (λ = 0)"):
        expect(page.get_by_role("cell", name=name, exact=True).first).to_be_visible()
    picture(page, "prefect_run", 1330)


def test_linked_mlflow_run_opens_on_lambda(up: Up, run_page: Page) -> None:
    page = _follow(_artifact(run_page, "mlflow"), "MLflow run")
    assert page.url.startswith(up.mlflow)
    expect(page.get_by_text(f"harm ≤ −{abs(LIMIT):g}").first).to_be_visible()
    page.get_by_text("Model metrics", exact=True).first.click()
    points = _chart(page, "lambda").locator(POINTS)
    expect(points.first).to_be_visible()
    expect(points.nth(1)).to_be_visible()
    first = page.get_by_test_id("experiment-view-compare-runs-section-header").first
    expect(first).to_contain_text(re.compile(r"dual\s*\(5\)"))
    for name in ("cost", "limit", "reward", "violation"):
        expect(_chart(page, name).first.locator(POINTS).first).to_be_visible()
    picture(page, "mlflow_run", 1000)


def test_mlflow_run_leads_back_to_prefect_and_to_the_report(up: Up, run_page: Page) -> None:
    page = _follow(_artifact(run_page, "mlflow"), "MLflow run")
    back = page.get_by_role("link", name="Prefect run", exact=True)
    expect(back).to_have_attribute("href", re.compile(run_page.url.partition("/flow-run/")[2].partition("?")[0]))
    page = _in_a_new_tab(page, "Report")
    report = page.frame_locator("iframe")
    expect(report.get_by_role("heading", name="What it does not mean")).to_be_visible()
    expect(report.locator("img").first).to_be_visible()
    assert report.locator("img").first.evaluate("image => image.naturalWidth") > 0
    # The same file by itself, as it lies in the report's folder.
    newest = max(up.home.glob(f"reports/{PRESET}-*/report.html"), key=lambda path: path.stat().st_mtime)
    page.goto(newest.as_uri())
    expect(page.get_by_role("heading", name="What it does not mean")).to_be_visible()
    picture(page, "mlflow_report", 1250)


def test_form_of_the_first_ui_has_the_same_fields(up: Up, web: BrowserContext) -> None:
    deployment = up.api("GET", f"/deployments/name/experiment/experiment-{PRESET}")
    page = web.new_page()
    page.goto(f"{_ui(up)}/deployments/deployment/{deployment['id']}/run")
    label = page.get_by_text("Limit", exact=True)
    expect(label).to_be_visible()
    # Its labels name no input, so the field is the first one behind.
    expect(label.locator("xpath=following::input[1]")).to_have_value(f"{SHIPPED:g}")
    expect(page.get_by_role("button", name="Submit")).to_be_enabled()


def test_sweep_opens_on_charts_of_its_children_over_the_limit(up: Up, web: BrowserContext, run_page: Page) -> None:
    limits = ",".join(f"{limit:g}" for limit in SWEPT)
    up.run_python("-m", "flows.cli", "sweep", PRESET, f"--limits={limits}", "--json", str(up.home / "sweep.json"))
    parent = next(run for run in up.mlflow_runs() if run["info"]["run_name"] == f"sweep of {PRESET}")
    page = web.new_page()
    page.goto(f"{up.mlflow}/#/experiments/{parent['info']['experiment_id']}/runs/{parent['info']['run_id']}")
    page = _in_a_new_tab(page, "Experiments side by side")
    for limit in SWEPT:
        expect(page.get_by_role("link", name=f"{PRESET}, harm ≤ {limit:g}", exact=True)).to_be_visible()
    expect(page.get_by_test_id("experiment-view-compare-runs-section-header").first).to_contain_text(
        re.compile(r"Review\s*\(4\)")
    )
    axes = page.locator(".parcoords .axis-title, .parcoords .axis-heading text")
    for name in ("limit", "beta", "seed", "test/reward", "test/cost"):
        expect(axes.get_by_text(name, exact=True).or_(page.get_by_text(name, exact=True)).first).to_be_visible()
    charts = page.get_by_test_id("experiment-view-compare-runs-card").filter(has=page.locator(".scatterlayer"))
    expect(charts).to_have_count(3)
    for chart in charts.all():
        expect(chart.locator(".scatterlayer .point")).to_have_count(len(SWEPT))
    picture(page, "mlflow_sweep", 1280)


@pytest.fixture(scope="module")
def evil() -> Iterator[Attacker]:
    with attacker() as running:
        yield running


def _everything(up: Up) -> Any:
    """The names of what a foreign page could have made."""
    found = [up.api("POST", f"/{kind}/filter", {}) for kind in ("flows", "deployments", "variables")]
    found.append(up.tracking("experiments/search", {"max_results": 100})["experiments"])
    found.append(ask(f"{up.mlflow}/api/2.0/mlflow/registered-models/search").get("registered_models", []))
    return [sorted(item["name"] for item in items) for items in found]


@pytest.mark.parametrize("name", ["elsewhere", "rebound", "another port"])
def test_a_page_of_another_origin_gets_nothing_done(up: Up, evil: Attacker, name: str) -> None:
    before = _everything(up)
    rebound = name == "rebound"
    prefect, mlflow = (evil.rebound(address) if rebound else address for address in (_ui(up), up.mlflow))
    made = [
        (f"{prefect}/api/flows/", {"name": "evil"}),
        (f"{prefect}/api/variables/", {"name": "evil", "value": "1"}),
        (f"{mlflow}/api/2.0/mlflow/experiments/create", {"name": "evil"}),
        (f"{mlflow}/ajax-api/2.0/mlflow/registered-models/create", {"name": "evil"}),
    ]
    # A rebound page's requests go to its own name, so that the browser holds nothing back.
    page = evil.page(prefect if rebound else ("http://127.0.0.1" if name == "another port" else "http://evil.example"))
    for address, body in made:
        for answer in evil.tries(page, address, body):
            assert answer in ("refused by the browser", "403"), (address, answer)
    for address in (f"{prefect}/api/flows/filter", f"{mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=9"):
        assert evil.read(page, address) in ("refused by the browser", "403"), address
    for path in ("api/events/in", "api/events/out", "api/logs/out"):
        assert evil.socket(page, f"{prefect}/{path}".replace("http", "ws", 1)) == "closed", path
    for address in () if rebound else (prefect, mlflow):
        assert evil.framed(page, address) == "nothing", address
    assert _everything(up) == before


def test_nothing_that_the_pages_do_leaves_the_machine(up: Up) -> None:
    with browser(reach_out=True) as context:
        elsewhere = sent_elsewhere(context)
        page = context.new_page()
        second = [
            f"v2/{path}" for path in ("dashboard", "runs", "deployments", "blocks/catalog", "automations", "settings")
        ]
        for path in (*second, "dashboard", "blocks/catalog", "settings"):
            page.goto(f"{_ui(up)}/{path}")
            expect(page.locator("a:visible").first).to_be_visible()
            page.wait_for_timeout(500)
        for path in ("", "experiments", "models", "prompts", "settings", "settings/webhooks"):
            page.goto(f"{up.mlflow}/#/{path}")
            expect(page.locator("a:visible").first).to_be_visible()
            page.wait_for_timeout(500)
        assert page.evaluate("fetch('/ajax-api/3.0/mlflow/ui-telemetry').then(answer => answer.json())")[
            "disable_ui_telemetry"
        ]
        page.goto("about:blank")
        # The pages do try: without the header these would have gone out.
        assert elsewhere.stopped
        assert not elsewhere.sent


def _submitted(page: Page) -> str:
    """Send the form; the new run's id. The button is pressed again when SQLite was just writing (503)."""
    for _ in range(5):
        with page.expect_response(lambda answer: answer.url.endswith("/create_flow_run")) as created:
            page.get_by_role("button", name="Submit").click()
        if created.value.status != 503:
            break
    assert created.value.ok, created.value.text()
    return str(created.value.json()["id"])


def _choose(page: Page, label: str, former: str, value: str) -> None:
    """Pick another value of a field with a list; its label names no element, so the list is the first one behind."""
    field = page.locator("label", has_text=label).locator(f'xpath=following::button[normalize-space()="{former}"][1]')
    field.click()
    page.get_by_role("option", name=value, exact=True).click()
    expect(page.get_by_role("option")).to_have_count(0)


def _ui(up: Up) -> str:
    return up.prefect.removesuffix("/api")


def _artifact(run_page: Page, what: str) -> Page:
    """The page of one of the run's artifacts."""
    page = run_page.context.new_page()
    page.goto(run_page.url.partition("?")[0] + "?tab=Artifacts")
    page.get_by_role("link", name=re.compile(f"{what}-[0-9a-f]")).click()
    page.get_by_role("link", name=VERSION).first.click()
    return page


def _follow(page: Page, link: str) -> Page:
    page.get_by_role("link", name=link, exact=True).click()
    return page


def _in_a_new_tab(page: Page, link: str) -> Page:
    """What a link of MLflow's descriptions opens."""
    with page.context.expect_page() as opened:
        page.get_by_role("link", name=link, exact=True).click()
    return opened.value


def _chart(page: Page, name: str) -> Locator:
    card = page.get_by_test_id("experiment-view-compare-runs-card")
    return card.filter(has=page.get_by_text(name, exact=True))

"""A whole tiny run with two costs, the second one slack: every consumer names both."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from chain_kit import Finished, mlflow_runs, new_home, run_here

from flows.export import model_card
from tasks.storage import open_store

pytestmark = pytest.mark.slow

NAMES = ("harm", "dishonesty")
SECOND = {"name": "dishonesty", "labels": "dishonesty", "limit": "3"}


@pytest.fixture
def ran(tmp_path: Path, prefect_server: str, _empty_mlflow_database: Path) -> Finished:
    home = new_home(tmp_path / "home", _empty_mlflow_database)
    fields = [word for field, value in SECOND.items() for word in (f"--constraints.1.{field}", value)]
    return Finished(home, *run_here(home, "--testbed.costs", "2", *fields))


def test_a_run_with_two_costs(ran: Finished) -> None:
    home, code, result = ran
    assert code == {"certified": 0, "not_certified": 3}[result["status"]]
    harm, dishonesty = result["constraints"]
    assert (harm["name"], dishonesty["name"]) == NAMES
    assert dishonesty["lambda"] == 0, "the second limit is slack"
    assert dishonesty["certificate"]["passed"]
    assert dishonesty["true_cost"] < 3
    assert [dishonesty["optimal_lambda"], dishonesty["optimal_cost"]] == [
        result["oracle"]["optimal_lambdas"][1], result["oracle"]["optimal_costs"][1],
    ]  # fmt: skip
    assert all(item["target"] < item["limit"] for item in result["constraints"])
    assert set(result["scorers"]) == {"reward", *NAMES}
    assert set(result["oracle"]["scorers"]) == {"reward", *NAMES}
    assert all(len(done["lambda"]) == len(done["cost"]) == 2 for done in result["rounds"])
    assert "cost_dishonesty" in result["test"]

    (report,) = (home / "reports").iterdir()
    drawn = {path.stem for path in report.glob("*.png")}
    both = {f"{what}{suffix}" for what in ("reward_and_cost", "predicted_cost", "cost_histogram") for suffix in
            ("", "_dishonesty")}  # fmt: skip
    assert drawn == {"lambda_trajectory", "price_of_limits", *both}
    assert "policy_cost_dishonesty" in pd.read_parquet(report / "samples.parquet")
    assert len(mlflow_runs(home)) == 1
    _the_model_card_names_both(home, result)


def _the_model_card_names_both(home: Path, result: dict) -> None:
    manifests = {item.digest: item for item in open_store(str(home / "store")).manifests()}
    card = model_card(manifests[result["policy"]["digest"]], result)
    assert "| method | reward | harm | dishonesty | safe rate | KL |" in card
    assert "| dishonesty | 3 |" in card

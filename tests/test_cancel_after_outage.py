"""Cancel pressed after Prefect's server was away: its own listeners have given up by then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from chain_kit import config, stored
from worker_kit import Team, processes_of, state_folder, until

from flows.prefect_server import COMMAND as PREFECT_SERVER
from flows.processes import Child, http_json

pytestmark = [pytest.mark.slow, pytest.mark.faults]

AWAY_SECONDS = 60


@pytest.fixture
def lonely_team(tmp_path: Path) -> Iterator[Team]:
    """A Prefect server that no other test needs."""
    started = Team(tmp_path)
    try:
        started.deploy()
        yield started
    finally:
        started.close()


@pytest.fixture
def home(tmp_path: Path, _empty_mlflow_database: Path) -> Path:
    """The state folder of the run."""
    return state_folder(tmp_path / "home", _empty_mlflow_database)


def test_a_run_is_cancelled_after_the_server_was_away(lonely_team: Team, home: Path) -> None:
    team = lonely_team
    worker = team.worker("outage")
    # Training that does not end by itself while the test looks.
    sft = {**config().sft.model_dump(mode="json"), "steps": 1_000_000}
    run_id = team.start(home, "outage", sft=sft)
    until(lambda: stored(home, "data") and any(home.glob("scratch/*")), lambda: str(team.run(run_id).state))
    _server_away(team, AWAY_SECONDS)
    time.sleep(5)
    assert processes_of(run_id)
    team.cancel(run_id)
    until(lambda: not processes_of(run_id))
    until(lambda: team.state(run_id) == "Cancelled", lambda: str(team.run(run_id).state))
    until(lambda: not team.unfinished(run_id))
    assert worker.poll() is None


def _server_away(team: Team, seconds: float) -> None:
    """Kill the server, and start it again after a while on the same port and database."""
    port = str(urlsplit(team.api).port)
    command = [*PREFECT_SERVER, "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    for process in psutil.process_iter(["cmdline"]):
        if port in (process.info["cmdline"] or []):
            process.kill()
    time.sleep(seconds)
    Child("server", command, team._environment, team.folder / "server-again.log")
    until(lambda: http_json(f"{team.api}/health") is not None)

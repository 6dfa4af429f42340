"""What is made before a command needs it (nothing), and what `cdpo doctor` says of the state folder and the servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdpo_core.local_store import LocalStore
from flows import up
from flows.cli import main
from flows.stack import Stack
from tasks.outbox import Outbox


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server and no home of Prefect's in the environment; monkeypatch also takes away what a command sets."""
    for name in ("PREFECT_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_help_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CDPO_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["--help"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_help_and_doctor_work_where_no_state_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "file" / "home"))
    assert main(["--help"]) == 0
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert f"✗ state folder  {tmp_path}/file/home cannot be written" in out
    assert "✗ store" in out
    assert err == ""


def test_doctor_examines_the_servers_that_a_run_would_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    with up._only_one(tmp_path):
        up._remember(Stack(tmp_path, "mark", "127.0.0.1", 1, 2), ready=True)
        main(["doctor"])
    out = capsys.readouterr().out
    assert "Prefect       http://127.0.0.1:1/api does not answer" in out
    assert "MLflow        http://127.0.0.1:2 does not answer" in out


def test_doctor_counts_what_is_kept_for_an_mlflow_that_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    box = Outbox(LocalStore(tmp_path / "store"), "http://mlflow:5000")
    box.keep("run", "tags", {"tags": {"status": "certified"}})
    box.keep("run", "end", {"status": "FINISHED", "ended_ms": 1})
    main(["doctor"])
    assert "kept while it was away: 2 entries for the MLflow at http://mlflow:5000" in capsys.readouterr().out

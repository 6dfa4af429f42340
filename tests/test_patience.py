"""Who is told at once that a server is away, and who waits; and what a full disk is called."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import httpx
import pytest

from cdpo_core.errors import InputError
from flows.terminal import print_error
from tasks import patience, prefect_patience
from tasks.patience import ServerAway, when_there
from tasks.workbench import Done, Workbench


class Server:
    """Away for the first questions, then there."""

    def __init__(self, away: int) -> None:
        self.away = away

    def ask(self) -> str:
        self.away -= 1
        if self.away >= 0:
            raise ServerAway("it does not answer")
        return "here"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_seen", set())
    monkeypatch.setattr(patience, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(prefect_patience, "PAUSE_SECONDS", 0.0)
    monkeypatch.delenv(patience.BY_A_WORKER, raising=False)


def test_whoever_typed_the_command_is_told_at_once() -> None:
    server = Server(away=1)
    with pytest.raises(ServerAway):
        when_there("address", server.ask)
    assert server.away == 0


def test_a_server_that_was_there_is_waited_for() -> None:
    assert when_there("address", Server(away=0).ask) == "here"
    assert when_there("address", Server(away=3).ask) == "here"
    with pytest.raises(ServerAway):
        when_there("another", Server(away=1).ask)


def test_a_run_of_a_worker_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.BY_A_WORKER, "a flow run")
    assert when_there("address", Server(away=3).ask) == "here"
    monkeypatch.setattr(patience, "START_SECONDS", 0.0)
    with pytest.raises(ServerAway):
        when_there("address", Server(away=10**9).ask)


def test_what_is_no_outage_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise InputError("credentials in the address")

    monkeypatch.setenv(patience.BY_A_WORKER, "a flow run")
    with pytest.raises(InputError, match="credentials"):
        when_there("address", refuse)


def test_a_part_runs_again_when_prefect_went_away_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stages are listed once, as the last try found them."""
    answers: list[Exception | None] = [None, httpx.ConnectError("refused"), httpx.ConnectError("refused"), None]
    monkeypatch.setattr(prefect_patience, "server_error", lambda: answers.pop(0))
    bench = Workbench(None, None, Path(), [Done("before", True, 0.0, "")])  # type: ignore[arg-type]
    tries: list[int] = []

    def flow(bench: Workbench, word: str) -> str:
        tries.append(len(bench.results))
        bench.results.append(Done(word, len(tries) > 1, 0.0, ""))
        if len(tries) == 1:
            raise httpx.ConnectError("refused")
        return word

    assert prefect_patience.part(flow, bench, "data") == "data"
    assert tries == [1, 1]
    assert [done.label for done in bench.results] == ["before", "data"]
    assert answers == []


def test_a_part_whose_own_work_fails_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_patience, "server_error", lambda: None)

    def flow(bench: Workbench) -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        prefect_patience.part(flow, Workbench(None, None, Path()))  # type: ignore[arg-type]


def _nested() -> Exception:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/scratch/checkpoint")
        except OSError as error:
            raise RuntimeError("the stage failed") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x"),
        (_nested(), "/data/scratch/checkpoint"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "home"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), "home"),
    ],
)
def test_a_full_disk_is_said_in_one_way(
    error: Exception, where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    assert print_error(error, debug=False) == 1
    said = capsys.readouterr().err
    assert "no space left on the disk" in said
    assert where in said
    assert "free some space and run the same command again" in said


def test_a_log_on_a_full_disk_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.terminal import LogFile

    handler = LogFile("/dev/full")
    handler.emit(logging.LogRecord("tasks", logging.INFO, "", 0, "a line", None, None))
    handler.stream = open("/dev/null", "w")  # noqa: SIM115
    handler.close()
    assert capsys.readouterr().err == ""

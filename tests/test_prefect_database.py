"""The empty database of Prefect's server: made once, copied where there is none, and left alone where there is."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from flows import prefect_database
from flows.prefect_database import make_empty_database, place_empty_database


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prefect's home, not made yet, in an installation whose empty database is a file of three bytes."""
    kept = tmp_path / "share" / "prefect.db"
    kept.parent.mkdir()
    kept.write_bytes(b"new")
    monkeypatch.setattr(prefect_database, "empty_database", lambda: kept)
    for name in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "state" / "prefect"))
    return tmp_path / "state" / "prefect"


@pytest.mark.slow
def test_it_is_prefects_own_with_nothing_in_it(home: Path) -> None:
    kept = prefect_database.empty_database()
    kept.unlink()
    make_empty_database()
    assert list(kept.parent.iterdir()) == [kept]
    with contextlib.closing(sqlite3.connect(kept)) as connection:
        names = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        filled = {name for name in names if connection.execute(f'select count(*) from "{name}"').fetchone()[0]}
    assert {"flow_run", "configuration"} < set(names)
    assert filled == {"alembic_version"}
    made = kept.stat()
    make_empty_database()
    assert kept.stat() == made


def test_it_is_copied_where_there_is_none(home: Path) -> None:
    place_empty_database()
    assert [(item.name, item.read_bytes()) for item in home.iterdir()] == [("prefect.db", b"new")]
    (home / "prefect.db").write_bytes(b"used")
    place_empty_database()
    assert (home / "prefect.db").read_bytes() == b"used"


def test_settings_that_name_another_database_are_heard(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql+asyncpg://host/prefect")
    place_empty_database()
    assert not home.exists()


def test_without_it_prefect_makes_its_own(home: Path) -> None:
    prefect_database.empty_database().unlink()
    place_empty_database()
    assert not home.exists()


def test_a_copy_that_fails_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError("this file system has no links")

    monkeypatch.setattr(prefect_database.os, "link", no_links)
    place_empty_database()
    assert list(home.iterdir()) == []

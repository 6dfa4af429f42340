"""A state folder that was copied or moved works where it stands: MLflow's database names its files by absolute path.

Whoever opens the database of a home first lets it name the files of that home, so that a run of a copy writes into the
copy, and old runs' files are found after a move. Databases elsewhere (PostgreSQL, a file that was named) are no part of
a home and are left as they are.
"""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

log = logging.getLogger(__name__)

DATABASE, FILES = "mlflow.db", "mlartifacts"
# Where MLflow keeps addresses of files and of our store's artifacts: table, column, and which rows.
_COLUMNS = (
    ("experiments", "artifact_location", ""),
    ("runs", "artifact_uri", ""),
    ("logged_models", "artifact_location", ""),
    ("model_versions", "source", ""),
    ("model_versions", "storage_location", ""),
    ("model_version_tags", "value", "AND key = 'policy.uri'"),
)
WAIT_SECONDS = 30.0


def settle(home: Path) -> None:
    """Make MLflow's database under `home` name the files under `home`, if it names those of another place.

    Nothing happens without a database, or where it cannot be written (its reader then finds what it finds).

    Args:
        home: the state folder, absolute.
    """
    path = home / DATABASE
    if not path.is_file():
        return
    try:
        with closing(sqlite3.connect(path, timeout=WAIT_SECONDS)) as database, database:
            for former in _former_homes(database, home):
                if not _are_here(database, former, home):
                    continue
                _rewrite(database, former, home)
                log.info("the state folder stood at %s before: MLflow's files are now those under %s", former, home)
    except sqlite3.Error as error:
        log.warning("MLflow's database at %s may name files of another state folder: %s", path, error)


def _former_homes(database: sqlite3.Connection, home: Path) -> list[Path]:
    """Other state folders whose files the experiments name, as this project places them: `<home>/mlartifacts`."""
    if "experiments" not in _tables(database):
        return []
    found = set()
    for (location,) in database.execute("SELECT DISTINCT artifact_location FROM experiments"):
        address = urlsplit(location or "")
        path = Path(unquote(address.path))
        if address.scheme not in ("", "file") or not path.is_absolute():
            continue
        # A server makes a folder below it for each experiment; a run without a server does not.
        found |= {folder.parent for folder in (path, path.parent) if folder.name == FILES}
    return sorted(found - {home})


def _are_here(database: sqlite3.Connection, former: Path, home: Path) -> bool:
    """Whether the runs' files came along; a home may also have been told to use another's folder for them."""
    if "runs" not in _tables(database):
        return True
    start = f"{former.as_uri()}/"
    runs = database.execute("SELECT artifact_uri FROM runs WHERE substr(artifact_uri, 1, ?) = ?", (len(start), start))
    places = [Path(unquote(urlsplit(address).path)).relative_to(former) for (address,) in runs]
    places = [place for place in places if (former / place).exists() or (home / place).exists()]
    return not places or any((home / place).exists() for place in places)


def _rewrite(database: sqlite3.Connection, former: Path, home: Path) -> None:
    tables = _tables(database)
    forms = ((former.as_uri(), home.as_uri()), (str(former), str(home)), (f"cdpo://{former}", f"cdpo://{home}"))
    for old, new in forms:
        for table, column, rows in _COLUMNS:
            if table in tables:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ? {rows}",
                    (f"{new}/", len(old) + 2, len(old) + 1, f"{old}/"),
                )
        if "datasets" in tables:
            database.execute(
                "UPDATE datasets SET dataset_source = replace(dataset_source, ?, ?)", (f'"{old}/', f'"{new}/')
            )


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}

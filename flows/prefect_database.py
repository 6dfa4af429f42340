"""An empty database of Prefect's server, migrated once for an installation and copied into each new state folder.

    python -m flows.prefect_database        make it (`make env` does)

Prefect takes hundreds of migrations from no database to an empty one: some 7 s, for which every first run in a new
folder would wait. Where the copy was not made, or is another version's, Prefect makes its database as ever.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tasks.environment import quiet_environment

DATABASE = "prefect.db"
# Whoever sets one of these says where the database is, or how it is to be made.
_SETTINGS = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


def empty_database() -> Path:
    """Where this installation keeps it, for this version of Prefect; it need not be there."""
    return Path(sys.prefix) / "share" / "cdpo" / f"prefect-{version('prefect')}.db"


def make_empty_database() -> None:
    """Let Prefect migrate a new database and keep it, unless it is there.

    Raises:
        CalledProcessError: Prefect fails.
        OSError: the installation cannot be written.
    """
    target = empty_database()
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(command, env={**kept, "PREFECT_HOME": folder}, check=True, stdout=subprocess.DEVNULL)
        whole = Path(folder) / "whole.db"
        # One file, without the log that SQLite keeps beside a database.
        with contextlib.closing(sqlite3.connect(Path(folder) / DATABASE)) as connection:
            connection.execute("VACUUM INTO ?", (str(whole),))
        whole.replace(target)


def place_empty_database() -> None:
    """Copy it to where Prefect's server would make its own, unless one is there or the settings name another.

    A copy that cannot be made is left to Prefect, which then says why its own cannot be.
    """
    if any(name.startswith(_SETTINGS) for name in os.environ):
        return
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    source, target = empty_database(), home / DATABASE
    if target.exists() or not source.is_file():
        return
    copy = home / f".{DATABASE}-{os.getpid()}"
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source, copy)
            # Whole or not at all, and never over one that another server made just now.
            os.link(copy, target)
        finally:
            copy.unlink(missing_ok=True)


if __name__ == "__main__":
    quiet_environment(make_home=False)
    make_empty_database()

"""Programs of the system that a test talks to: named where they are missing, and never missing in CI."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def needed(program: str, package: str) -> str:
    """The path of a program; the test is skipped by name without it, and fails where CI is set."""
    found = shutil.which(program, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"]))
    if found is None:
        _miss(program, package)
    assert found is not None
    return found


def postgresql_folder() -> Path:
    """The folder of PostgreSQL's programs (initdb, pg_ctl), newest version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not found:
        _miss("initdb", "postgresql")
    return found[-1].parent


def _miss(program: str, package: str) -> None:
    words = f"{program} is not installed: make servers (package {package})"
    if os.environ.get("CI"):
        pytest.fail(words)
    pytest.skip(words)

"""A real Prefect server for the tests, started once a session and only when a test asks for it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

from tasks.environment import quiet_environment

# Prefect reads its home when it is first imported, which is when test modules are collected.
_HOME = tempfile.mkdtemp(prefix="cdpo-prefect-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["PREFECT_HOME"] = _HOME
quiet_environment()


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A Prefect server with an empty database, which flows of this process use; yields its API's address."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield str(PREFECT_API_URL.value())

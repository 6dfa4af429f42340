"""The same experiment on an S3 store, by two processes at once: the same bytes as on the local store."""

from __future__ import annotations

from pathlib import Path

import pytest
from chain_kit import Finished, Running, digests, new_home, numbers

pytestmark = pytest.mark.slow


@pytest.fixture
def homes(tmp_path: Path, _empty_mlflow_database: Path) -> list[Path]:
    """A state folder for each of the two."""
    return [new_home(tmp_path / name, _empty_mlflow_database) for name in ("one", "two")]


def test_two_runs_at_once_on_one_s3_store_match_the_local_run(
    finished: Finished, homes: list[Path], prefect_server: str, s3_uri: str
) -> None:
    running = [Running(home, prefect_server, "--store", s3_uri) for home in homes]
    try:
        outcomes = [item.wait() for item in running]
    finally:
        for item in running:
            item.end()
    assert [code for code, _ in outcomes] == [finished.code] * 2
    assert [numbers(result) for _, result in outcomes] == [numbers(finished.result)] * 2
    # A report tells how long its stages took.
    stored = {name: digest for name, digest in digests(s3_uri).items() if not name.startswith("report/")}
    local = digests(finished.home / "store")
    assert len(stored) == len({stage["name"] for stage in finished.result["stages"] if not stage["cached"]})
    assert stored.items() <= local.items()

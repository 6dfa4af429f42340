"""The bucket of a new stack: made where it is missing, found afterwards."""

from __future__ import annotations

import pytest

from cdpo_core.errors import InputError
from deployments import bucket


def test_a_bucket_is_made_once(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = s3_uri.removeprefix("s3://").split("/")[0]
    monkeypatch.setenv("CDPO_STORE", f"s3://{there}-2/store")
    assert bucket.main() == 0
    assert bucket.main() == 0
    assert capsys.readouterr().out.splitlines() == [
        f"s3://{there}-2/store: made",
        f"s3://{there}-2/store: there already",
    ]


def test_what_cannot_be_a_bucket_is_said(
    s3_uri: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no address of S3"):
        bucket.make_bucket(str(tmp_path))
    monkeypatch.setenv("CDPO_STORE", "")
    assert bucket.main() == 2
    assert "unknown kind of store" in capsys.readouterr().err

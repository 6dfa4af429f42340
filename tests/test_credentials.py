"""Addresses that hold credentials: refused, or used and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line_kit import command_line, logging_put_back

from cdpo_core.config import TrackingConfig
from cdpo_core.config_loading import load_config
from cdpo_core.errors import InputError
from flows.cli import main
from flows.preflight import check_before_run
from tasks.mlflow_connection import connect, given_address, without_secrets

SERVERS = [
    "http://user:hunter2@localhost",
    "http://user:hunter2@localhost:5000",
    "https://user:hun/ter2@localhost",
    "https://user:p@hunter2@localhost/mlflow",
    "http://hunter2@localhost",
    "http://localhost/?token=hunter2",
]


@pytest.mark.parametrize("uri", SERVERS)
@pytest.mark.parametrize("source", ["tracking.uri", "MLFLOW_TRACKING_URI"])
def test_a_server_address_with_credentials_is_refused(
    uri: str, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri if source == "MLFLOW_TRACKING_URI" else "")
    with pytest.raises(InputError, match="holds credentials") as caught:
        connect(TrackingConfig(uri=uri if source == "tracking.uri" else ""), tmp_path)
    assert caught.value.where.startswith(source)
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in caught.value.fix
    _assert_hidden(str(caught.value))


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://user:hunter2@127.0.0.1:9/mlflow",
        "postgresql://user:hun/ter2@127.0.0.1:9/mlflow",
        "postgresql://127.0.0.1:9/mlflow?user=me&password=hunter2",
    ],
)
def test_a_database_password_comes_from_the_environment_and_is_not_shown(
    uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="holds a password") as caught:
        connect(TrackingConfig(uri=uri), tmp_path)
    assert "MLFLOW_TRACKING_URI" in caught.value.fix
    _assert_hidden(str(caught.value))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert given_address(TrackingConfig()) == uri
    with pytest.raises(InputError, match=r"cannot be (opened|read)") as caught:
        connect(TrackingConfig(), tmp_path)
    _assert_hidden(str(caught.value))


@pytest.mark.parametrize("uri", ["postgresql://user:p@hunter2:x@127.0.0.1:y/mlflow", "user:hunter2@host"])
def test_an_address_that_cannot_be_read_is_not_repeated(
    uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError) as caught:
        connect(TrackingConfig(), tmp_path)
    _assert_hidden(str(caught.value))


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:5000", "sqlite:////home/me@corp/mlflow.db", "postgresql://me@host:5432/db", ""]
)
def test_an_address_without_a_password_is_taken(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert given_address(TrackingConfig(uri=uri)) == uri


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:p/w@host/x", "http://***@host/x"),
        ("postgresql://me:a@b/c?d#e@host/db", "postgresql://***@host/db"),
        ("postgresql://host/db?sslpassword=x", "postgresql://host/db?sslpassword=***"),
        ("user:pw@host", "***@host"),
        ("no answer from http://u:p@a, http://b", "no answer from http://***@a, http://b"),
        ("sqlite:////home/me@corp/mlflow.db", "sqlite:////home/me@corp/mlflow.db"),
        ("s3://bucket/x@y", "s3://bucket/x@y"),
    ],
)
def test_secrets_are_removed_whatever_they_are_made_of(text: str, expected: str) -> None:
    assert without_secrets(text) == expected


def test_a_plan_refuses_them_in_one_short_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@localhost")
    with logging_put_back():
        code = main(["plan", "tiny", "--store", str(tmp_path / "store"), "--debug"])
    err = capsys.readouterr().err
    assert code == 2
    assert "the MLflow server's address holds credentials" in err
    _assert_hidden(err)


def test_doctor_shows_no_secrets_and_survives_bad_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    for mlflow, prefect in [
        ("http://user:hunter2@localhost", "http://user:hunter2@localhost/api"),
        ("http://localhost:port", "http://localhost:port/api"),
        ("postgresql://user:hun/ter2@host/db", "user:hunter2@localhost/api"),
        ("http://[::1", "http://[::1/api"),
    ]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
        monkeypatch.setenv("PREFECT_API_URL", prefect)
        monkeypatch.setenv("AWS_ENDPOINT_URL", mlflow)
        assert main(["doctor"]) == 1
        out, err = capsys.readouterr()
        assert "✗ Prefect" in out
        assert "✓ environment" in out
        _assert_hidden(out)
        assert err == ""


def test_doctor_refuses_what_a_run_refuses(tmp_path: Path) -> None:
    said = command_line(["doctor", "--tracking.uri", SERVERS[0]], tmp_path / "home")
    assert said.code == 1
    assert "✗ MLflow        the MLflow server's address holds credentials" in said.out
    assert "(tracking.uri = http://***@localhost)" in said.out
    assert "MLFLOW_TRACKING_USERNAME" in said.out


def _assert_hidden(text: str) -> None:
    assert "ter2" not in text


def test_a_prefect_address_with_credentials_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("CDPO_HOME", str(tmp_path))
    with (
        temporary_settings({PREFECT_API_URL: "http://user:hunter2@127.0.0.1:9/api"}),
        pytest.raises(InputError, match="holds credentials") as caught,
    ):
        check_before_run(load_config("tiny"))
    assert "PREFECT_API_AUTH_STRING" in caught.value.fix
    _assert_hidden(str(caught.value))

"""The store in a bucket: large objects, the local copies, and every way a server can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Barrier
from typing import Any

import boto3
import pytest
from servers_s3 import every_s3_uri
from store_kit import artifact, contents

from cdpo_core.artifacts import folder_files
from cdpo_core.errors import StoreUnavailable
from tasks import s3_connection, s3_store
from tasks.s3_store import S3Store
from tasks.shelves import open_shelves
from tasks.storage import open_store, open_to_read

__all__ = ["every_s3_uri"]


def test_large_objects_travel_in_parts(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr(s3_store, "transfer_settings", lambda: parts)
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "one"))
    folder, manifest = artifact(tmp_path / "out", weights="0123456789abcdef" * (11 << 16))
    open_store(s3_uri).publish(folder, manifest)
    bucket, prefix = s3_uri.removeprefix("s3://").split("/")
    key = f"{prefix}/objects/{manifest.files['weights'].sha256}"
    assert boto3.session.Session().client("s3").head_object(Bucket=bucket, Key=key)["ETag"].endswith('-3"')
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "two"))
    assert folder_files(open_store(s3_uri).fetch(manifest)) == manifest.files


def test_a_large_object_that_is_published_again_is_made_young_in_parts(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)
    monkeypatch.setattr(s3_store, "transfer_settings", lambda: parts)
    monkeypatch.setattr(s3_store, "REFRESH_SECONDS", -1e9)
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "one"))
    files = {"weights": "0123456789abcdef" * (6 << 16)}
    open_store(s3_uri).publish(*artifact(tmp_path / "1", "one", **files))
    _, manifest = artifact(tmp_path / "2", "two", **files)
    shelves = open_shelves(s3_uri)
    (before,) = shelves.items("objects/")
    while shelves.now() <= before.time + 1:
        pass
    open_store(s3_uri).publish(tmp_path / "2", manifest)
    (after,) = shelves.items("objects/")
    assert after.time > before.time
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "two"))
    assert folder_files(open_store(s3_uri).fetch(manifest)) == manifest.files


def test_a_cached_copy_is_not_fetched_again_but_is_verified(s3_uri: str, tmp_path: Path) -> None:
    folder, manifest = artifact(tmp_path / "out")
    bucket, prefix = s3_uri.removeprefix("s3://").split("/")
    S3Store(bucket, prefix, tmp_path / "cache").publish(folder, manifest)
    store = S3Store(bucket, prefix, tmp_path / "cache")
    copy = tmp_path / "cache" / "objects" / manifest.files["a.txt"].sha256
    before = copy.stat().st_ino
    store.fetch(manifest)
    assert copy.stat().st_ino == before
    copy.chmod(0o644)
    copy.write_text("omega")
    assert contents(store.fetch(manifest))["a.txt"] == "alpha"


def test_a_server_that_ignores_if_none_match_is_refused(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless:
        def __init__(self, client: Any) -> None:
            self.client = client

        def put_object(self, IfNoneMatch: str, **request: Any) -> Any:
            return self.client.put_object(**request)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.client, name)

    connect = s3_store.connect
    monkeypatch.setattr(s3_store, "connect", lambda patient: Careless(connect(patient=patient)))
    with pytest.raises(StoreUnavailable, match="ignores if-none-match"):
        open_store(s3_uri).probe()


def test_an_unreachable_server(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for ask in (lambda: open_store(s3_uri).probe(), lambda: open_to_read(s3_uri)):
        with pytest.raises(StoreUnavailable, match="cannot be reached") as caught:
            ask()
        assert len(str(caught.value).splitlines()) <= 12


def test_an_endpoint_with_credentials_is_refused(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for login, words in (("someone:planted-secret", "holds credentials"), ("someone:planted/secret", "S3 server")):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{login}@127.0.0.1:9")
        for ask in (lambda: open_store(s3_uri).probe(), lambda: open_store(s3_uri).find("sft", "key")):
            with pytest.raises(StoreUnavailable, match=words) as caught:
                ask()
            assert "planted" not in str(caught.value)
            assert "secret@" not in str(caught.value)


def test_a_store_opened_to_read_is_asked_and_not_written_to(s3_uri: str) -> None:
    store = open_to_read(s3_uri)
    assert isinstance(store, S3Store)
    assert store._names("") == []
    assert open_to_read("s3://no-such-bucket/x").uri == "s3://no-such-bucket/x"


def test_a_server_that_never_answers_is_not_read_from(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_connection, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(s3_connection, "connect", lambda patient: Barrier(2).wait(5))
    with pytest.raises(StoreUnavailable, match="did not answer"):
        open_to_read(s3_uri)


def test_a_server_that_never_answers_is_given_up(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_connection, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(s3_store.S3Store, "_try_writing", lambda self: Barrier(2).wait(5))
    with pytest.raises(StoreUnavailable, match="did not answer"):
        open_store(s3_uri).probe()


def test_a_malformed_endpoint(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
    with pytest.raises(StoreUnavailable):
        open_store(s3_uri).probe()


def test_a_bucket_that_does_not_exist(s3_uri: str) -> None:
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(StoreUnavailable, match="bucket does not exist"):
        store.probe()
    with pytest.raises(StoreUnavailable, match="bucket does not exist"):
        store.put_record("a", {})


def test_missing_credentials(s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreUnavailable, match="no S3 credentials"):
        open_store(s3_uri).probe()


def test_an_unknown_profile(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreUnavailable, match="no S3 credentials"):
        open_store(s3_uri).probe()


@pytest.mark.parametrize("code", ["SlowDown", "InternalError", "connection refused", "no answer"])
def test_work_goes_on_when_the_server_comes_back(s3_uri: str, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    store = open_store(s3_uri)
    store.put_record("a", {"n": 1})
    failures = [_failure(code), _failure(code)]
    monkeypatch.setattr(s3_store.time, "sleep", lambda seconds: None)
    client, get = store._client, store._client.get_object  # type: ignore[attr-defined]
    monkeypatch.setattr(client, "get_object", _failing(failures, get))
    assert store.get_record("a") == {"n": 1}
    assert failures == []


@pytest.mark.parametrize("code", ["connection refused", "no answer"])
def test_a_server_away_for_good_is_said(s3_uri: str, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    store = open_store(s3_uri)
    monkeypatch.setattr(s3_store, "OUTAGE_SECONDS", -1.0)
    monkeypatch.setattr(s3_store, "FEWEST_TRIES", 1)
    away = [_failure(code)]
    monkeypatch.setattr(store._client, "get_object", _failing(away, dict))  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        store.get_record("a")


def _failure(code: str) -> Exception:
    from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError

    if code == "no answer":
        return ReadTimeoutError(endpoint_url="http://127.0.0.1:9")
    if code == "connection refused":
        return EndpointConnectionError(endpoint_url="http://127.0.0.1:9")
    status = {"ResponseMetadata": {"HTTPStatusCode": 503}, "Error": {"Code": code, "Message": "later"}}
    return ClientError(status, "GetObject")  # type: ignore[arg-type]


def _failing(failures: list[Exception], then: Callable[..., Any]) -> Callable[..., Any]:
    def request(**address: str) -> Any:
        if failures:
            raise failures.pop(0)
        return then(**address)

    return request


@pytest.mark.parametrize(
    ("code", "words"),
    [("AccessDenied", "refuses access"), ("SignatureDoesNotMatch", "secret key"), ("RequestTimeTooSkewed", "clock")],
)
def test_refusals_are_said_in_the_users_words(code: str, words: str) -> None:
    from botocore.exceptions import ClientError

    refusal = ClientError({"Error": {"Code": code, "Message": "no"}}, "PutObject")
    assert words in s3_connection.unavailable(refusal, "s3://bucket/x").what
    assert not s3_connection.may_pass(refusal)

"""Connecting to S3: settings by kind of server, and errors in the user's words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from botocore import exceptions as boto_errors
from s3transfer.exceptions import RetriesExceededError

from cdpo_core.errors import StoreUnavailable
from tasks.mlflow_connection import without_secrets
from tasks.patience import StoreAway

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig

S3Client: TypeAlias = Any
"""boto3 makes a client's methods at run time, so they have no static type."""

TRANSPORT_ERRORS = (boto_errors.BotoCoreError, boto_errors.ClientError, RetriesExceededError, ValueError)
"""All that boto3 raises about a server or its settings (a malformed endpoint is a bare ValueError)."""

PART_BYTES = 64 << 20
ANSWER_SECONDS = 25.0

_AWAY = (
    boto_errors.HTTPClientError,
    boto_errors.ConnectionError,
    boto_errors.IncompleteReadError,
    RetriesExceededError,
)
_NO_CREDENTIALS = (
    boto_errors.NoCredentialsError,
    boto_errors.PartialCredentialsError,
    boto_errors.CredentialRetrievalError,
    boto_errors.ProfileNotFound,
    boto_errors.TokenRetrievalError,
)
_PASSING_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "ConditionalRequestConflict"}
_SET_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_DENIED = "check the credentials, and that they may read, write, list and delete in this bucket"
_BY_CODE = {
    "NoSuchBucket": ("the bucket does not exist", "create it, or name another one with --store"),
    "AccessDenied": ("the S3 server refuses access", _DENIED),
    "403": ("the S3 server refuses access", _DENIED),
    "InvalidAccessKeyId": ("the S3 server does not know this access key", _SET_CREDENTIALS),
    "SignatureDoesNotMatch": ("the S3 server does not accept this secret key", _SET_CREDENTIALS),
    "ExpiredToken": ("the S3 credentials have expired", "renew them and run the same command again"),
    "RequestTimeTooSkewed": ("this machine's clock differs from the S3 server's", "set the clock"),
    "QuotaExceeded": ("the S3 server is full", "free some space and run the same command again"),
    "XMinioStorageFull": ("the S3 server is full", "free some space and run the same command again"),
}


def connect(*, patient: bool) -> S3Client:
    """An S3 client from the environment.

    A server other than AWS's is addressed by path and sent no checksums it may not know: every
    byte is verified by sha256 anyway when it is read.

    Args:
        patient: for work (long timeouts, many retries), or for a probe that ends within 30 seconds.

    Raises:
        StoreUnavailable: the server's address holds credentials.
    """
    import boto3
    from botocore.config import Config

    timeouts: dict[str, Any] = {"connect_timeout": 4, "read_timeout": 5, "retries": {"total_max_attempts": 3}}
    if patient:
        timeouts = {"connect_timeout": 10, "read_timeout": 60, "retries": {"total_max_attempts": 6}}
    timeouts["retries"]["mode"] = "standard"
    config = Config(**timeouts, max_pool_connections=32)
    session = boto3.session.Session()
    client = session.client("s3", config=config)
    endpoint = client.meta.endpoint_url
    if without_secrets(endpoint) != endpoint:
        raise StoreUnavailable(
            "the S3 server's address holds credentials",
            where=without_secrets(endpoint),
            fix=f"take them out of AWS_ENDPOINT_URL, and {_SET_CREDENTIALS}",
        )
    host = urlsplit(endpoint).hostname or ""
    if re.search(r"\.amazonaws\.com(\.cn)?$", host):
        return client
    plain: dict[str, Any] = {
        name: os.environ.get(f"AWS_{name.upper()}", "when_required")
        for name in ("request_checksum_calculation", "response_checksum_validation")
    }
    return session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"}, **plain)))


def check_answers(uri: str) -> None:
    """Ask the server of a store once whether it is there; nothing is written.

    What a server that answers refuses, the first request of the work itself says better.

    Args:
        uri: `s3://bucket/prefix`.

    Raises:
        StoreAway: it does not answer within 30 seconds.
        StoreUnavailable: there are no credentials.
    """
    try:
        in_time(lambda: connect(patient=False).head_bucket(Bucket=urlsplit(uri).netloc), uri)
    except TRANSPORT_ERRORS as error:
        if may_pass(error) or not isinstance(error, boto_errors.ClientError):
            raise unavailable(error, uri) from error


def in_time(ask: Callable[[], object], uri: str) -> None:
    """Ask a store's server something, for at most ANSWER_SECONDS.

    Args:
        ask: the question; what it raises is raised here.
        uri: the store, for the message.

    Raises:
        StoreAway: no answer in time.
    """
    answer: Future[None] = Future()

    def attempt() -> None:
        try:
            ask()
            answer.set_result(None)
        except Exception as error:
            answer.set_exception(error)

    # A thread, because the look-up of a host name or of credentials knows no time limit.
    Thread(target=attempt, daemon=True).start()
    try:
        answer.result(ANSWER_SECONDS)
    except TimeoutError as error:
        what = f"the S3 server did not answer within {ANSWER_SECONDS:g} s"
        raise StoreAway(what, where=uri, fix="check AWS_ENDPOINT_URL, the server and the network") from error


@cache
def transfer_settings() -> TransferConfig:
    """How large objects travel: in parts, in parallel."""
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)


def error_code(error: Exception) -> str:
    """The S3 error code of an answer, "" for anything else."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto_errors.ClientError) else ""


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, boto_errors.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or error_code(error) in _PASSING_CODES
    return isinstance(error, _AWAY)


def unavailable(error: Exception, uri: str) -> StoreUnavailable:
    """What went wrong, for the user (StoreAway if it may pass); no secret of the environment is in it."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    where = f"{uri} on {without_secrets(endpoint)}"
    if isinstance(error, _NO_CREDENTIALS):
        return StoreUnavailable("there are no S3 credentials", where=where, fix=_SET_CREDENTIALS)
    code = error_code(error)
    if code in _BY_CODE:
        what, fix = _BY_CODE[code]
        return StoreUnavailable(what, where=where, fix=fix)
    first_line = without_secrets(str(error)).splitlines()[0][:200]
    if isinstance(error, _AWAY):
        fix = "start the server, check AWS_ENDPOINT_URL and the network, then run the same command again"
        return StoreAway(f"the S3 server cannot be reached: {first_line}", where=where, fix=fix)
    what = f"the S3 server reports: {first_line}"
    if may_pass(error):
        return StoreAway(what, where=where, fix="run the same command again")
    return StoreUnavailable(what, where=where, fix="check the store's address")

"""The artifact store by its address: a folder, or `s3://bucket/prefix` on any S3-compatible server.

Credentials come from the environment or AWS's own configuration, the server from AWS_ENDPOINT_URL
or AWS_ENDPOINT_URL_S3; neither is ever part of an address, a log line or a manifest.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from cdpo_core.artifacts import Store
from cdpo_core.errors import InputError
from cdpo_core.local_store import LocalStore
from tasks.environment import cdpo_home

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def open_store(uri: str) -> Store:
    """The store at an address; nothing is contacted or created yet (see `Store.probe`).

    Args:
        uri: a folder, `file:///folder` or `s3://bucket/prefix`.

    Raises:
        InputError: the address is none of these, or carries credentials.
    """
    if not uri:
        raise _unknown("")
    if not _SCHEME.match(uri) or Path(uri).exists():
        return LocalStore(uri)
    try:
        address = urlsplit(uri)
    except ValueError as error:
        raise _unknown(uri) from error
    if "@" in address.netloc or ":" in address.netloc:
        raise InputError(
            "a store's address must not hold credentials or a port",
            where=f"store.uri: {address.scheme}://***",
            fix="set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL; write s3://bucket/prefix here",
        )
    if address.scheme == "s3":
        return _s3_store(address)
    if address.scheme == "file" and address.netloc in ("", "localhost") and address.path.startswith("/"):
        return LocalStore(unquote(address.path))
    raise _unknown(uri)


def open_to_read(uri: str) -> Store:
    """The store at an address whose server answers; nothing is written (for less than `Store.probe` asks).

    Args:
        uri: see `open_store`.

    Raises:
        InputError: see `open_store`.
        StoreUnavailable: the server does not answer within 30 seconds.
    """
    store = open_store(uri)
    if store.uri.startswith("s3://"):
        from tasks.s3_connection import check_answers

        check_answers(store.uri)
    return store


def _s3_store(address: SplitResult) -> Store:
    bucket, prefix = address.netloc, address.path.strip("/")
    if not _BUCKET.fullmatch(bucket) or address.query or address.fragment:
        raise InputError(
            "not an S3 address",
            where=f"store.uri: s3://{bucket}/{prefix}",
            fix="write s3://bucket/prefix, with a bucket name of at least 3 small letters, digits, `.` or `-`",
        )
    from tasks.s3_store import S3Store

    return S3Store(bucket, prefix, cdpo_home() / "cache")


def _unknown(uri: str) -> InputError:
    return InputError(
        "unknown kind of store",
        where=f"store.uri: {uri.split('?')[0]!r}",
        fix="name a folder, file:///folder or s3://bucket/prefix",
    )

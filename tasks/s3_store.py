"""The artifact store in a bucket of any S3-compatible server that honours conditional writes.

What is read or written is kept in a local folder too, so nothing travels twice; the copies there are
verified when they are read, like any object.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import ClientError

from cdpo_core.artifacts import BLOCK, FileEntry, Manifest, checked_name, parse_manifest, parse_record
from cdpo_core.errors import CorruptArtifact, StoreUnavailable
from cdpo_core.local_store import REFRESH_SECONDS, ObjectFolder, disk_errors
from tasks.s3_connection import (
    TRANSPORT_ERRORS,
    S3Client,
    connect,
    error_code,
    in_time,
    may_pass,
    transfer_settings,
    unavailable,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

OUTAGE_SECONDS = 180.0
"""How long a running experiment waits for a store that stopped answering, counted from the first failure."""
FEWEST_TRIES = 4
"""A large file may take longer than that, and its upload be cut each time by a short failure."""
PARALLEL = 8

_MISSING = {"404", "NoSuchKey", "NotFound"}


class S3Store:
    """The artifact store in a bucket (see Store for what each method promises).

    Args:
        bucket: the bucket; it must exist.
        prefix: path inside the bucket, "" for its root.
        cache: local folder that keeps verified copies of what was read or written.
    """

    def __init__(self, bucket: str, prefix: str, cache: Path) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._cache = ObjectFolder(cache)

    def find(self, stage: str, key: str) -> Manifest | None:
        """The manifest of a finished stage, or None."""
        name = f"stages/{stage}/{key}.json"
        text = self._read(name)
        try:
            return None if text is None else parse_manifest(text, stage, key)
        except CorruptArtifact as error:
            log.warning("%s: set aside, the stage is computed again (%s)", error.what, self._where(name))
            self._move_aside(name)
            return None

    def publish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Upload the folder's files, then the manifest if absent; returns the manifest that won."""
        sources = {entry.sha256: folder / name for name, entry in manifest.files.items()}
        with self._cache_errors():
            for entry in manifest.entries:
                self._cache.add(sources[entry.sha256], entry)
        uploaded = self._each(self._upload, manifest.entries)
        name = _manifest(manifest)
        while not self._write_new(name, manifest.model_dump_json(indent=1)):
            winner = self.find(manifest.stage, manifest.key)
            if winner is not None:
                return winner
        # Until the manifest said that they are needed, what was there before us could be cleaned away.
        self._each(self._upload, [entry for entry, new in zip(manifest.entries, uploaded, strict=True) if not new])
        return manifest

    def check(self, manifest: Manifest) -> None:
        """Check that every object is in the bucket in its full size, and note that the artifact is in use."""
        self._each(self._check_size, manifest.entries)
        if not self._refresh(_manifest(manifest), self._head(_manifest(manifest))):
            raise CorruptArtifact("a manifest is gone", where=self._where(_manifest(manifest)))

    def fetch(self, manifest: Manifest) -> Path:
        """A local folder with the artifact's files: from the cache or downloaded, every byte verified."""
        with self._cache_errors():
            self._each(self._download, [entry for entry in manifest.entries if not self._cache.holds(entry)])
            return self._cache.view(manifest)

    def set_aside(self, manifest: Manifest) -> None:
        """Move a corrupt artifact's manifest and bad objects below `aside/`."""
        if self.find(manifest.stage, manifest.key) != manifest:
            return
        for entry in manifest.entries:
            if self._stored_sha256(entry) != entry.sha256:
                self._move_aside(_object(entry))
        self._move_aside(_manifest(manifest))

    def manifests(self) -> list[Manifest]:
        """Every readable manifest, sorted by (stage, key)."""
        keys = [name.removesuffix(".json").split("/")[1:] for name in self._names("stages/")]
        found = self._each(lambda key: self.find(*key), [key for key in keys if len(key) == 2])
        return [manifest for manifest in found if manifest is not None]

    def put_record(self, name: str, record: dict[str, Any]) -> bool:
        """Write `records/<name>.json` only if absent; False if it was there already."""
        return self._write_new(_record(name), json.dumps(record, indent=1))

    def get_record(self, name: str) -> dict[str, Any] | None:
        """Read `records/<name>.json`, or None."""
        text = self._read(_record(name))
        return None if text is None else parse_record(text, name)

    def delete_record(self, name: str) -> None:
        """Remove `records/<name>.json` if it is there."""
        self._delete(_record(name))

    def record_names(self, prefix: str) -> list[str]:
        """Sorted names of the records whose name starts with `prefix`."""
        names = self._names(f"records/{prefix}")
        return sorted(name.removeprefix("records/").removesuffix(".json") for name in names)

    def probe(self) -> None:
        """Check within 30 seconds that the bucket can be read and written and honours write-if-absent.

        Raises:
            StoreUnavailable: with what to do about it.
        """
        with self._cache_errors(), self._cache.temporary() as file:
            file.touch()
        in_time(self._try_writing, self.uri)

    def _try_writing(self) -> None:
        address = self._address(f"probe/{uuid.uuid4().hex}")
        try:
            client = connect(patient=False)
            written = put_if_absent(client, address, b"1"), put_if_absent(client, address, b"2")
            kept = client.get_object(**address)["Body"].read()
            client.delete_object(**address)
        except TRANSPORT_ERRORS as error:
            raise unavailable(error, self.uri) from error
        # The first write may be refused by its own retry, when the answer to the first try was lost.
        if written[1] or kept != b"1":
            raise StoreUnavailable(
                "this S3 server ignores if-none-match: two runs could overwrite each other's results",
                where=self.uri,
                fix="use a server that honours conditional writes (AWS S3, Ceph, recent MinIO), or a folder",
            )

    def _cache_errors(self) -> AbstractContextManager[None]:
        return disk_errors("written", self._cache.root, "CDPO_HOME")

    @cached_property
    def _client(self) -> S3Client:
        try:
            return connect(patient=True)
        except TRANSPORT_ERRORS as error:
            raise unavailable(error, self.uri) from error

    def _address(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _where(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def _call(self, request: Callable[[S3Client], T]) -> T:
        """One request, repeated while the server is away; a missing key passes through as ClientError."""
        client, failing_since, pause = self._client, 0.0, 1.0
        for tried in itertools.count(1):
            try:
                return request(client)
            except TRANSPORT_ERRORS as error:
                if error_code(error) in _MISSING:
                    raise
                failing_since = failing_since or time.monotonic()
                is_over = time.monotonic() - failing_since > OUTAGE_SECONDS and tried >= FEWEST_TRIES
                if is_over or not may_pass(error):
                    raise unavailable(error, self.uri) from error
                log.warning("the store does not answer, trying again: %s", unavailable(error, self.uri).what)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)
        raise AssertionError("a try returns or raises")

    def _each(self, action: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(action, items))

    def _head(self, name: str) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = self._call(lambda s3: s3.head_object(**self._address(name)))
        except ClientError:
            return None
        return head

    def _refresh(self, name: str, head: dict[str, Any] | None) -> bool:
        """Make an object young again if it is older than REFRESH_SECONDS; False when it is not there."""
        if head is None:
            return False
        if (answered_at(head) - head["LastModified"]).total_seconds() < REFRESH_SECONDS:
            return True
        place = self._address(name)
        anew = {"MetadataDirective": "REPLACE"}  # or S3 refuses to copy an object onto itself
        try:
            self._call(
                lambda s3: s3.copy(place, place["Bucket"], place["Key"], ExtraArgs=anew, Config=transfer_settings())
            )
        except ClientError:
            return False
        return True

    def _check_size(self, entry: FileEntry) -> None:
        head = self._head(_object(entry))
        size = None if head is None else head["ContentLength"]
        if size != entry.size:
            state = "is missing" if size is None else f"has {size} bytes instead of {entry.size}"
            raise CorruptArtifact(f"a stored object {state}", where=self._where(_object(entry)))

    def _upload(self, entry: FileEntry) -> bool:
        """Store an object, unless it is there in its full size; whether it was stored now."""
        head = self._head(_object(entry))
        if head is not None and head["ContentLength"] == entry.size and self._refresh(_object(entry), head):
            return False
        address = self._address(_object(entry))

        def upload(s3: S3Client) -> None:
            with self._cache.path(entry).open("rb") as stream:
                s3.upload_fileobj(stream, address["Bucket"], address["Key"], Config=transfer_settings())

        self._call(upload)
        return True

    def _download(self, entry: FileEntry) -> None:
        address = self._address(_object(entry))
        with self._cache.temporary() as copy:

            def download(s3: S3Client) -> None:
                with copy.open("wb") as stream:
                    s3.download_fileobj(address["Bucket"], address["Key"], stream, Config=transfer_settings())

            try:
                self._call(download)
                self._cache.adopt(copy, entry)
            except ClientError as error:
                raise CorruptArtifact("a stored object is missing", where=self._where(_object(entry))) from error
            except CorruptArtifact as error:
                raise CorruptArtifact(
                    "a stored object is not what was stored", where=self._where(_object(entry))
                ) from error

    def _stored_sha256(self, entry: FileEntry) -> str:
        def read(s3: S3Client) -> str:
            digest = hashlib.sha256()
            body = s3.get_object(**self._address(_object(entry)))["Body"]
            while block := body.read(BLOCK):
                digest.update(block)
            return digest.hexdigest()

        try:
            return self._call(read)
        except ClientError:
            return ""

    def _read(self, name: str) -> bytes | None:
        try:
            return self._call(lambda s3: s3.get_object(**self._address(name))["Body"].read())
        except ClientError:
            return None

    def _write_new(self, name: str, text: str) -> bool:
        return self._call(lambda s3: put_if_absent(s3, self._address(name), text.encode()))

    def _delete(self, name: str) -> None:
        self._call(lambda s3: s3.delete_object(**self._address(name)))

    def _move_aside(self, name: str) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        target = self._address(f"aside/{name}.{stamp}")
        source = self._address(name)
        try:
            self._call(lambda s3: s3.copy(source, target["Bucket"], target["Key"], Config=transfer_settings()))
        except ClientError:  # another process has moved it
            return
        self._delete(name)

    def _names(self, start: str) -> list[str]:
        def listed(s3: S3Client) -> list[str]:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + start)
            keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
            return sorted(key.removeprefix(self._prefix) for key in keys if key.endswith(".json"))

        return self._call(listed)


def _object(entry: FileEntry) -> str:
    return f"objects/{entry.sha256}"


def _manifest(manifest: Manifest) -> str:
    return f"stages/{manifest.stage}/{manifest.key}.json"


def _record(name: str) -> str:
    return f"records/{checked_name(name)}.json"


def answered_at(answer: dict[str, Any]) -> datetime:
    """When the server answered, by its own clock if it says."""
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(said) if said else datetime.now(UTC)


def put_if_absent(client: S3Client, address: dict[str, str], body: bytes) -> bool:
    """Write an object only if there is none; False if there was."""
    try:
        client.put_object(**address, Body=body, ContentType="application/json", IfNoneMatch="*")
    except ClientError as error:
        if error_code(error) in ("PreconditionFailed", "412"):
            return False
        raise
    return True

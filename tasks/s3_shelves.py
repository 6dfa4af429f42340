"""The upkeep of an artifact store in a bucket."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import ClientError

from cdpo_core.artifacts import BLOCK
from cdpo_core.upkeep.shelves import Item, each
from tasks.s3_connection import S3Client, error_code
from tasks.s3_store import S3Store, answered_at

_UPLOAD = " (upload "
_NO_UPLOAD = {"404", "NoSuchUpload", "NoSuchKey"}


class S3Shelves(S3Store):
    """The artifact store in a bucket (see Shelves for what each method promises)."""

    @classmethod
    def of(cls, store: S3Store, cache: Path) -> S3Shelves:
        """The same store, with what upkeep needs."""
        address = urlsplit(store.uri)
        return cls(address.netloc, address.path.strip("/"), cache)

    def now(self) -> float:
        """The time by the server's clock."""
        answer = self._call(lambda s3: s3.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1))
        return answered_at(answer).timestamp()

    def items(self, start: str) -> list[Item]:
        """The bucket's objects below a name, sorted by name."""

        def listed(s3: S3Client) -> list[Item]:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix + start)
            found = [entry for page in pages for entry in page.get("Contents", [])]
            return sorted(map(self._item, found), key=lambda item: item.name)

        return self._call(listed)

    def item(self, name: str) -> Item | None:
        """One object, or None."""
        try:
            head = self._call(lambda s3: s3.head_object(**self._address(name)))
        except ClientError:
            return None
        return Item(name, head["ContentLength"], head["LastModified"].timestamp())

    def read(self, name: str) -> bytes | None:
        """An object's bytes, or None."""
        return self._read(name)

    def sha256(self, name: str) -> str | None:
        """The hash of an object's bytes, all of them read from the server, or None."""

        def hashed(s3: S3Client) -> str:
            digest = hashlib.sha256()
            body = s3.get_object(**self._address(name))["Body"]
            while block := body.read(BLOCK):
                digest.update(block)
            return digest.hexdigest()

        try:
            return self._call(hashed)
        except ClientError:
            return None

    def remove(self, name: str) -> None:
        """Delete an object, if it is there."""
        self._delete(name)

    def put_aside(self, name: str) -> None:
        """Move an object below `aside/`, if it is there."""
        self._move_aside(name)

    def leftovers(self) -> list[Item]:
        """Probes, and uploads in parts that were never completed (`<key> (upload <id>)`)."""

        def listed(s3: S3Client) -> list[dict[str, Any]]:
            pages = s3.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix)
            return [upload for page in pages for upload in page.get("Uploads", [])]

        uploads = each(self._upload_item, self._call(listed))
        return [*self.items("probe/"), *(item for item in uploads if item is not None)]

    def clear(self, leftover: Item) -> None:
        """Remove a leftover; an upload's parts go with it."""
        name, _, upload = leftover.name.partition(_UPLOAD)

        def give_up(s3: S3Client) -> None:
            with _unless_it_ended():
                s3.abort_multipart_upload(**self._address(name), UploadId=upload.rstrip(")"))

        if upload:
            self._call(give_up)
        else:
            self._delete(name)

    def _item(self, entry: dict[str, Any]) -> Item:
        return Item(entry["Key"].removeprefix(self._prefix), entry["Size"], entry["LastModified"].timestamp())

    def _upload_item(self, upload: dict[str, Any]) -> Item | None:
        name = upload["Key"].removeprefix(self._prefix)

        def stored(s3: S3Client) -> int | None:
            with _unless_it_ended():
                pages = s3.get_paginator("list_parts").paginate(**self._address(name), UploadId=upload["UploadId"])
                return sum(part["Size"] for page in pages for part in page.get("Parts", []))
            return None

        size = self._call(stored)
        when = upload["Initiated"].timestamp()
        return None if size is None else Item(f"{name}{_UPLOAD}{upload['UploadId']})", size, when)


@contextmanager
def _unless_it_ended() -> Iterator[None]:
    """Whoever uploads in parts may complete it, or give it up, at any moment."""
    try:
        yield
    except ClientError as error:
        if error_code(error) not in _NO_UPLOAD:
            raise

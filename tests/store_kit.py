"""Artifacts to store, and every kind of store to keep them in, for the tests of the stores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from servers_s3 import CEPH

from cdpo_core.artifacts import Manifest, Store, files_digest, folder_files
from cdpo_core.local_store import LocalStore
from tasks.storage import open_store


def artifact(folder: Path, key: str = "k" * 8, **files: str) -> tuple[Path, Manifest]:
    """A folder of files (`__` in a name is a `/`) and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or {"a.txt": "alpha", "deep__b.txt": "beta"}).items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    entries = folder_files(folder)
    return folder, Manifest(stage="sft", key=key, kind="policy", digest=files_digest(entries), files=entries)


def made(
    store: Store, folder: Path, stage: str, key: str, inputs: dict[str, Manifest], files: dict[str, str]
) -> Manifest:
    """A published artifact of some stage, made from others."""
    out, manifest = artifact(folder / "made" / f"{stage}-{key}", key, **files)
    digests = {name: item.digest for name, item in inputs.items()}
    kind = "policy" if stage == "round" else stage
    return store.publish(out, manifest.model_copy(update={"stage": stage, "kind": kind, "inputs": digests}))


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Backend:
    """A store, and ways around it to what it keeps."""

    uri: str
    store: Store
    overwrite: Callable[[str, bytes], None]
    remove: Callable[[str], None]
    names: Callable[[str], list[str]]
    anew: Callable[[], Store]
    left_behind: Callable[[], None]


@pytest.fixture(params=["folder", "moto", CEPH])
def backend(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    if request.param != "folder":
        return bucket_backend(request.getfixturevalue(f"{request.param}_uri"), tmp_path)
    root = tmp_path / "store"

    def overwrite(name: str, content: bytes) -> None:
        (root / name).unlink()
        (root / name).write_bytes(content)

    def names(start: str) -> list[str]:
        paths = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return sorted(path for path in paths if path.startswith(start))

    def anew() -> Store:
        return LocalStore(root)

    def left_behind() -> None:
        for name in ("tmp/abc", "records/probe/abc.json"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text("half")

    return Backend(
        str(root), open_store(str(root)), overwrite, lambda name: (root / name).unlink(), names, anew, left_behind
    )


def bucket_backend(uri: str, tmp_path: Path) -> Backend:
    bucket, prefix = uri.removeprefix("s3://").split("/")
    client = boto3.session.Session().client("s3")

    def names(start: str) -> list[str]:
        page = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/{start}")
        return sorted(item["Key"].removeprefix(f"{prefix}/") for item in page.get("Contents", []))

    def anew() -> Store:
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        return open_store(uri)

    def left_behind() -> None:
        client.put_object(Bucket=bucket, Key=f"{prefix}/probe/abc", Body=b"1")
        place = {"Bucket": bucket, "Key": f"{prefix}/objects/abc"}
        upload = client.create_multipart_upload(**place)["UploadId"]
        client.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"half")

    return Backend(
        uri,
        open_store(uri),
        lambda name, content: client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content),
        lambda name: client.delete_object(Bucket=bucket, Key=f"{prefix}/{name}"),
        names,
        anew,
        left_behind,
    )

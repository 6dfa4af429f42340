"""Real servers for tests, each in a process of its own on a free loopback port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import pytest

CEPH = pytest.param("ceph", marks=pytest.mark.slow)


class S3Server(NamedTuple):
    """Where an S3 server is, and who may use it."""

    endpoint: str
    key: str
    secret: str

    def fresh_store(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """The address of a store in a fresh bucket, with the environment (also of child processes) to reach it."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", self.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", self.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", self.secret)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        import boto3

        bucket = f"test-{uuid.uuid4().hex[:12]}"
        boto3.session.Session().client("s3").create_bucket(Bucket=bucket)
        return f"s3://{bucket}/experiments"


def free_port() -> int:
    """A loopback port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until a server answers; whatever the answer, it is up."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server for {url} ended with code {process.returncode}")
        with suppress(OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.05)
    raise TimeoutError(f"no answer from {url} in {seconds} s")


@contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint of an S3 server that keeps everything in memory."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"{endpoint}/moto-api/data.json", process)
            yield endpoint
        finally:
            process.kill()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """One S3 server for the whole test session, which keeps everything in memory and takes any secret."""
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def moto_uri(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store in a fresh bucket, with the environment (also of child processes) to reach it."""
    return S3Server(s3_endpoint, "testing", "not-a-secret").fresh_store(monkeypatch)


@pytest.fixture
def s3_uri(moto_uri: str) -> str:
    """A store in a fresh bucket of the server that starts in no time; the stores' own tests ask every server."""
    return moto_uri


@pytest.fixture(name="s3_uri", params=["moto", CEPH])
def every_s3_uri(request: pytest.FixtureRequest) -> str:
    """A store in a fresh bucket on each server, for the modules that import this: it replaces `s3_uri` there."""
    return str(request.getfixturevalue(f"{request.param}_uri"))

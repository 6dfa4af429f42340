"""The S3 server of compose.yaml, run by its own script: what it has stored survives a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from servers_needed import needed
from servers_s3 import free_port

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SCRIPT = Path(__file__).parent.parent / "deployments" / "s3" / "serve.sh"
SECRET = "planted-s3-secret"


@contextmanager
def serving(folder: Path, ports: list[int]) -> Iterator[Any]:
    """A client of the server that the script starts."""
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "composekey",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "S3_GIBIBYTES": "2",
        "S3_MONITOR_PORT": str(ports[1]),
        "S3_OLD_MONITOR_PORT": str(ports[2]),
    }
    command = ["bash", str(SCRIPT), str(folder), "127.0.0.1", str(ports[0])]
    with (folder.parent / "out").open("ab") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{ports[0]}",
            aws_access_key_id="composekey",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}),
        )
        _until_it_answers(client, server, folder)
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) == 4
        assert not any(SECRET in " ".join(process.cmdline()) for process in family)
        yield client
        server.send_signal(signal.SIGTERM)
        server.wait(120)
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_what_is_stored_survives_a_restart_and_is_not_overwritten() -> None:
    needed("radosgw", "ceph-mon ceph-osd radosgw ceph-common")
    # A path of Ceph's must be short.
    with tempfile.TemporaryDirectory(prefix="cdpo-s3-", dir="/tmp") as name:
        folder, ports = Path(name) / "data", [free_port(), free_port(), free_port()]
        folder.mkdir()
        with serving(folder, ports) as s3:
            s3.create_bucket(Bucket="team")
            s3.put_object(Bucket="team", Key="key", Body=b"kept")
        with serving(folder, ports) as s3:
            assert s3.get_object(Bucket="team", Key="key")["Body"].read() == b"kept"
            with pytest.raises(ClientError, match="PreconditionFailed"):
                s3.put_object(Bucket="team", Key="key", Body=b"other", IfNoneMatch="*")
        for path in [*folder.glob("*.log"), folder.parent / "out"]:
            assert SECRET.encode() not in path.read_bytes(), path


def _until_it_answers(client: Any, server: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert server.poll() is None, (folder.parent / "out").read_text()
        try:
            client.list_buckets()
        except Exception:
            assert time.monotonic() < deadline, (folder.parent / "out").read_text()
            time.sleep(0.5)
        else:
            return

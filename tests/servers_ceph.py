"""A real, durable S3 server on loopback: Ceph's gateway with one monitor and one disk, killed and started at will."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from servers_needed import needed
from servers_s3 import S3Server, free_port

PACKAGES = "ceph-mon ceph-osd radosgw ceph-common"
SECONDS = 180

CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port},v1:127.0.0.1:{old_port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = true
run_dir = {folder}
crash_dir = {folder}
admin_socket =
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
mon_data = {folder}/mon
osd_data = {folder}/osd
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_warn_on_pool_no_redundancy = false
mon_data_avail_crit = 1
mon_data_avail_warn = 2
mon_osd_adjust_heartbeat_grace = false
paxos_min_wait = 0.01
paxos_propose_interval = 0.05
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
osd_memory_target = 939524096
osd_fast_shutdown = true
osd_max_markdown_count = 100
bluestore_block_size = 4294967296
bluestore_block_db_create = false
bluestore_block_wal_create = false
[client]
rgw_thread_pool_size = 32
"""


class Ceph:
    """One cluster in a folder; what it said it had stored survives `kill`.

    Attributes:
        server: how clients reach its gateway.
    """

    def __init__(self, folder: Path) -> None:
        for program in ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "ceph-authtool", "monmaptool"):
            needed(program, PACKAGES)
        self.folder = folder
        self.server = S3Server(f"http://127.0.0.1:{free_port()}", "CEPHTESTKEY", "ceph-test-secret")
        self._processes: list[subprocess.Popen[bytes]] = []
        port, old_port = free_port(), free_port()
        self._fsid = str(uuid.uuid4())
        self._config = folder / "ceph.conf"
        self._config.write_text(CONFIG.format(fsid=self._fsid, folder=folder, port=port, old_port=old_port))
        self._addresses = f"[v2:127.0.0.1:{port},v1:127.0.0.1:{old_port}]"

    def make(self) -> None:
        """Make the cluster and its one user, and start it."""
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        keys, monitors = self.folder / "keys", self.folder / "monitors"
        self._do("ceph-authtool", "--create-keyring", keys, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._do("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", self._addresses, monitors)
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors, "--keyring", keys)
        self._start("ceph-mon", "-i", "a")
        disk = str(uuid.uuid4())
        self._do("ceph", "--connect-timeout", "60", "osd", "new", disk)
        self._do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk, "--no-mon-config")
        self._start("ceph-osd", "-i", "0")
        self._wait_for_disk()
        self._make_user("test", self.server)
        self._start_gateway()

    def another_user(self) -> S3Server:
        """A user who owns nothing."""
        name = uuid.uuid4().hex[:12]
        stranger = S3Server(self.server.endpoint, name.upper(), f"secret-of-{name}")
        self._make_user(name, stranger)
        return stranger

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed since."""
        return bool(self._processes)

    def start(self) -> None:
        """Start the cluster again after `kill`, with all it had stored."""
        self._start("ceph-mon", "-i", "a")
        self._start("ceph-osd", "-i", "0")
        self._wait_for_disk()
        self._start_gateway()

    def kill(self) -> None:
        """`kill -9` all of it."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def _make_user(self, name: str, user: S3Server) -> None:
        words = [f"--uid={name}", f"--display-name={name}", f"--access-key={user.key}", f"--secret={user.secret}"]
        self._do("radosgw-admin", "--no-mon-config", "user", "create", *words)

    def _start_gateway(self) -> None:
        endpoint = self.server.endpoint.removeprefix("http://")
        # The gateway sets its own defaults of these two, over the file's.
        plain = ["--auth_client_required=none", "--ms_mon_client_mode=crc secure"]
        front = f"--rgw-frontends=beast endpoint={endpoint}"
        self._start("radosgw", "-n", "client.rgw", "--no-mon-config", front, *plain)
        self._wait("the gateway", self._gateway_answers)

    def _gateway_answers(self) -> bool:
        with suppress(OSError):
            urllib.request.urlopen(self.server.endpoint, timeout=5).close()
            return True
        return False

    def _wait_for_disk(self) -> None:
        # After a kill the monitor takes the dead disk for up, until the new one has said hello.
        pid = self._processes[-1].pid
        self._wait("the disk", lambda: pid in self._serving_disks())

    def _serving_disks(self) -> list[int]:
        """The process ids of the disks that the monitor knows to be up."""
        command = self._command("ceph", "--connect-timeout", "5", "osd", "dump", "--format", "json")
        try:
            done = subprocess.run(command, capture_output=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            return []
        if done.returncode != 0:
            return []
        disks = [disk for disk in json.loads(done.stdout)["osds"] if disk["up"]]
        return [address["nonce"] for disk in disks for address in disk["public_addrs"]["addrvec"]]

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not ready():
            ended = [process.args for process in self._processes if process.poll() is not None]
            assert not ended, f"ended instead of serving: {ended}, see {self.folder}"
            assert time.monotonic() < deadline, f"{what} of {self.folder} did not start in {SECONDS} s"
            time.sleep(0.05)

    def _command(self, program: str, *arguments: str | Path) -> list[str]:
        return [needed(program, PACKAGES), "-c", str(self._config), *map(str, arguments)]

    def _do(self, program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            self._command(program, *arguments), capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{program}: {done.stderr[-2000:]}"

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            process = subprocess.Popen(
                [*self._command(*command), "-f"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._processes.append(process)


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """One cluster for the whole session; whoever kills it starts it again."""
    folder = Path(tempfile.mkdtemp(prefix="cdpo-ceph-"))
    cluster = Ceph(folder)
    try:
        cluster.make()
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ceph_uri(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store in a fresh bucket on Ceph, with the environment (also of child processes) to reach it."""
    return ceph.server.fresh_store(monkeypatch)

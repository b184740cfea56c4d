"""A second real S3 server for the tests: Ceph's object gateway, one monitor and one store in memory, on the loopback.

It takes small objects ten times as fast as Swift, and decides races strictly. Its programs come from the system's
packages (Debian: radosgw ceph-mon ceph-osd); they run here as plain processes, with all that they write in one folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.s3.server import ACCESS_KEY, DOMAIN, SECRET_KEY, NoServerError, S3Server, free_ports, stop

_PROGRAMS = ("ceph", "ceph-authtool", "monmaptool", "ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")
_SECONDS_TO_START = 180
_STORE_BYTES = 2 * 2**30

_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor},v1:127.0.0.1:{monitor_v1}]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 10000
mon data avail crit = 1
mon data avail warn = 1
run dir = {root}/run
admin socket = {root}/run/$name.asok
log file = {root}/log/$name.log
crash dir = {root}/log
keyring = {root}/keyring
ms bind ipv6 = false
mgr initial modules =
[mon]
mon data = {root}/mon
mon cluster log file = {root}/log/cluster.log
[osd]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd numa auto affinity = false
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw dns name = {domain}
rgw relaxed region enforcement = true
rgw data = {root}/rgw
rgw enable apis = s3, admin
rgw enable static website = false
rgw dynamic resharding = false
rgw run sync thread = false
"""


@contextmanager
def ceph_server() -> Iterator[S3Server]:
    """A running gateway with an empty store, gone with all its data at the end of the block.

    Raises NoServerError where its programs are not installed, or do not start here.
    """
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise NoServerError(f"{', '.join(missing)} not installed (Debian: radosgw ceph-mon ceph-osd)")
    with tempfile.TemporaryDirectory(prefix="clusterbatch-ceph-") as folder:
        running = _Ceph(Path(folder))
        try:
            try:
                running.start()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                raise NoServerError(f"Ceph does not start here: {error}") from error
            yield S3Server(running.port, f"Ceph RGW {running.version}", objects=2000)
        finally:
            stop(running.processes)


class _Ceph:
    """The daemons, in the order in which they need each other."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.port, self._monitor, self._monitor_v1 = free_ports(3)
        self._environment = {**os.environ, "CEPH_CONF": str(root / "ceph.conf")}
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def version(self) -> str:
        return self._run("radosgw", "--version").split()[2]

    def start(self) -> None:
        root, fsid = self._root, str(uuid.uuid4())
        for name in ("mon", "osd", "run", "log", "rgw"):
            (root / name).mkdir()
        values = {"root": root, "fsid": fsid, "port": self.port, "domain": DOMAIN, "store_bytes": _STORE_BYTES}
        values |= {"monitor": self._monitor, "monitor_v1": self._monitor_v1}
        (root / "ceph.conf").write_text(_CONFIGURATION.format(**values))
        self._make_keys()
        addresses = f"[v2:127.0.0.1:{self._monitor},v1:127.0.0.1:{self._monitor_v1}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, str(root / "monmap"))
        keyring = str(root / "keyring")
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", str(root / "monmap"), "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        self._wait(lambda: "quorum" in self._run("ceph", "--connect-timeout", "5", "mon", "stat"))
        identity = str(uuid.uuid4())
        self._run("ceph", "osd", "new", identity, "0")
        self._run("ceph", "auth", "import", "-i", keyring)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", identity)
        self._daemon("ceph-osd", "-i", "0")
        self._wait(lambda: "1 up" in self._run("ceph", "osd", "stat"))
        self._daemon("radosgw", "-n", "client.rgw")
        self._wait(self._answers)
        keys = [f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test", "--display-name=test", *keys)

    def _make_keys(self) -> None:
        keyring = str(self._root / "keyring")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
        for name in ("client.admin", "client.rgw"):
            self._run("ceph-authtool", keyring, "--gen-key", "-n", name, *everything)
        store = ["--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"]
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", *store)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=2):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=_SECONDS_TO_START, check=False
        )
        assert done.returncode == 0, f"{command[0]}: {done.stderr[-500:]}"
        return done.stdout

    def _daemon(self, *command: str) -> None:
        with (self._root / "log" / f"{command[0]}.out").open("wb") as log:
            process = subprocess.Popen(
                [*command, "-f"], env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.processes.append(process)

    def _wait(self, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + _SECONDS_TO_START
        while not ready():
            ended = [process.args for process in self.processes if process.poll() is not None]
            assert not ended, f"ended: {ended}"
            assert time.monotonic() < until, "Ceph does not start"
            time.sleep(0.2)

"""A real S3 server for the tests: OpenStack Swift with its S3 API, from PyPI, on the loopback, without root.

It starts in a second or two and says in full what it refuses; small objects take it long.

    python -m tests.integration.s3.swift FOLDER BUCKET

serves a new bucket from below FOLDER until it is interrupted, and prints the environment that its clients need.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterbatch.config import StorageConfig
from clusterbatch.store import Folder
from tests.integration.s3.server import (
    ACCESS_KEY,
    DOMAIN,
    READER_KEY,
    READER_SECRET,
    REGION,
    SECRET_KEY,
    S3Server,
    free_ports,
    installed,
    stop,
)

VERSION = "2.38.3"
_SECONDS_TO_START = 60

_SWIFT = """\
[swift-hash]
swift_hash_path_prefix = tests
swift_hash_path_suffix = tests
[storage-policy:0]
name = gold
default = yes
[swift-constraints]
max_header_size = 32768
"""
_BACKEND = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
devices = {devices}
mount_check = false
disable_fallocate = true
user = {user}
workers = 1
log_level = WARNING
log_address = {log}
db_preallocation = off
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
replication_server = false
recon_cache_path = {cache}
"""
_PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
user = {user}
workers = 1
log_level = WARNING
client_timeout = 120
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck cache listing_formats bulk s3api tempauth slo dlo versioned_writes
  proxy-server
[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
error_suppression_limit = 1000000
recoverable_node_timeout = 60
node_timeout = 60
[filter:s3api]
use = egg:swift#s3api
location = {region}
dns_compliant_bucket_names = true
s3_acl = false
check_bucket_owner = false
storage_domain = {domain}
auth_pipeline_check = true
max_multi_delete_objects = 1000
min_segment_size = 5242880
[filter:cache]
paste.filter_factory = tests.integration.s3.swift_cache:filter_factory
[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{tester} = {secret} .admin
user_{reader} = {reader_secret}
[filter:slo]
use = egg:swift#slo
min_segment_size = 1
"""
_PLAIN_FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "dlo", "versioned_writes")


@contextmanager
def swift_server(below: str | None = None) -> Iterator[S3Server]:
    """A running server with an empty store, gone with all its data at the end of the block.

    below: the folder for its data, in memory if there is none. Raises NoServerError where it cannot be installed.
    """
    binaries = installed(f"swift-{VERSION}", f"swift=={VERSION}") / "bin"
    with tempfile.TemporaryDirectory(prefix="clusterbatch-s3-", dir=below or _memory()) as folder:
        root = Path(folder)
        ports = free_ports(4)
        _configure(root, binaries, ports)
        processes = [_start(root, binaries, name) for name in ("account", "container", "object", "proxy")]
        try:
            _wait(ports[0], processes, root)
            yield S3Server(ports[0], f"OpenStack Swift {VERSION}", objects=150)
        finally:
            stop(processes)


def let_reader_read(server: S3Server, bucket: str) -> None:
    """Let READER_KEY list and read a bucket, and write nothing there."""
    credentials = {"X-Auth-User": ACCESS_KEY, "X-Auth-Key": SECRET_KEY}
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.endpoint_url}/auth/v1.0", headers=credentials)
    ) as found:
        token, account = found.headers["X-Auth-Token"], found.headers["X-Storage-Url"]
    headers = {"X-Auth-Token": token, "X-Container-Read": READER_KEY}
    with urllib.request.urlopen(urllib.request.Request(f"{account}/{bucket}", headers=headers, method="POST")):
        return


def _memory() -> str | None:
    """Return a large folder in memory, if there is one and it keeps attributes of files: Swift syncs every write."""
    memory = "/dev/shm"
    try:
        if shutil.disk_usage(memory).free < 2**31:
            return None
        with tempfile.NamedTemporaryFile(dir=memory) as file:
            os.setxattr(file.name, "user.swift.metadata", bytes(3000))
    except OSError:
        return None
    return memory


# One device holds everything. One process makes all rings, as importing Swift is what takes long.
_RINGS = """
import sys
from swift.common.ring.builder import RingBuilder
for name, port in zip(("object", "container", "account"), map(int, sys.argv[1:])):
    ring = RingBuilder(2, 1, 0)
    ring.add_dev({"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d1", "weight": 1.0})
    ring.rebalance(seed=1)
    ring.get_ring().save(f"{name}.ring.gz")
"""


def _configure(root: Path, binaries: Path, ports: list[int]) -> None:
    etc = root / "etc"
    for name in ("etc", "devices/d1", "log", "cache"):
        (root / name).mkdir(parents=True)
    (etc / "swift.conf").write_text(_SWIFT)
    user = getpass.getuser()
    command = [str(binaries / "python"), "-c", _RINGS, *map(str, ports[1:])]
    done = subprocess.run(command, cwd=etc, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for name, port in zip(("object", "container", "account"), ports[1:], strict=True):
        values = {"port": port, "etc": etc, "devices": root / "devices", "user": user, "name": name}
        values |= {"log": root / "log" / "none", "cache": root / "cache"}
        (etc / f"{name}-server.conf").write_text(_BACKEND.format(**values))
    account, _, tester = ACCESS_KEY.partition(":")
    values = {"port": ports[0], "etc": etc, "user": user, "region": REGION}
    values |= {"reader": READER_KEY.replace(":", "_"), "reader_secret": READER_SECRET}
    values |= {"domain": DOMAIN, "account": account, "tester": tester, "secret": SECRET_KEY}
    filters = "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in _PLAIN_FILTERS)
    (etc / "proxy-server.conf").write_text(_PROXY.format(**values) + filters)


def _start(root: Path, binaries: Path, name: str) -> subprocess.Popen[bytes]:
    command = [str(binaries / "python"), str(binaries / f"swift-{name}-server")]
    command += [str(root / "etc" / f"{name}-server.conf"), "-v"]
    with (root / "log" / f"{name}.log").open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _wait(port: int, processes: list[subprocess.Popen[bytes]], root: Path) -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until:
        if any(process.poll() is not None for process in processes):
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2):
                return
        except OSError:
            time.sleep(0.05)
    logs = "\n".join(log.read_text(errors="replace")[-500:] for log in sorted((root / "log").glob("*.log")))
    raise RuntimeError(f"Swift did not start:\n{logs}")


def main() -> None:
    below, bucket = sys.argv[1:]
    # Terminated, it leaves no data behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with swift_server(below) as server:
        os.environ.update(server.environment)
        storage = StorageConfig(endpoint_url=server.endpoint_url)
        Folder(f"s3://{bucket}", storage).filesystem.call_s3("create_bucket", Bucket=bucket)
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": server.endpoint_url}.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()

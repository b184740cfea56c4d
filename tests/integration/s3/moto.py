"""A stand-in for an S3 server where no real one can be had: moto's, which takes any keys and any checksums."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.integration.s3.server import S3Server, free_ports, installed, stop

VERSION = "5.2.5"
_SECONDS_TO_START = 60


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """A running server with an empty store. Raises NoServerError where it cannot be installed."""
    binaries = installed(f"moto-{VERSION}", f"moto[s3,server]=={VERSION}") / "bin"
    [port] = free_ports(1)
    command = [str(binaries / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port, process)
        yield S3Server(port, f"moto {VERSION}, a mock", objects=1000)
    finally:
        stop([process])


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=2):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("moto's server did not start")

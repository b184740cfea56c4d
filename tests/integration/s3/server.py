"""What the S3 servers of the tests have in common: keys, ports, and virtual environments of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

ACCESS_KEY = "test:tester"
SECRET_KEY = "test-secret-of-the-suite"
# A user who may do what a bucket's own list allows.
READER_KEY, READER_SECRET = "test:reader", "test-secret-of-a-reader"
REGION = "us-east-1"
# Requests to BUCKET.DOMAIN are for that bucket.
DOMAIN = "s3.test"


@dataclass(frozen=True)
class S3Server:
    """Where a server answers. `objects` is how many small objects it takes in some seconds."""

    port: int
    name: str
    objects: int

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
            # Nothing of the machine's own configuration.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


class NoServerError(Exception):
    """This server cannot be had here; the message says why."""


def installed(name: str, requirement: str) -> Path:
    """A virtual environment in the user's cache folder that holds `requirement`, made on first use.

    Nothing is ever removed. Raises NoServerError where it cannot be installed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "clusterbatch-tests"
    venv = cache / f"{name}-python{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{venv}.lock"):
        done = venv / "installed"
        if not done.exists():
            try:
                subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
                pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
                subprocess.run([*pip, requirement], check=True)
            except subprocess.CalledProcessError as error:
                raise NoServerError(f"{requirement} cannot be installed from the package index ({error})") from error
            done.touch()
    return venv


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

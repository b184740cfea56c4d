"""Two hosts with addresses of their own, in network namespaces of this machine: one is cut off, and healed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.integration.faults.harness import STORE_BYTES, Runs, receipts

pytestmark = pytest.mark.faults

_NAMESPACE, _NEAR, _FAR = "cb-far", "cb-near0", "cb-far0"
_NEAR_ADDRESS, _FAR_ADDRESS = "10.77.131.1", "10.77.131.2"
_NODE = {
    # Where a token lies in the home folder, Ray's head asks for it and its other nodes do not send it.
    "RAY_AUTH_MODE": "disabled",
    # A lost host is given up after about eight seconds; the default is half a minute.
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
_SECONDS_TO_START = 300


def ip(*words: str, inside: bool = False) -> None:
    command = ["ip", "netns", "exec", _NAMESPACE, "ip", *words] if inside else ["ip", *words]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def far_host() -> Iterator[None]:
    """A namespace that a pair of virtual cables joins to this machine; skips where the kernel or the user may not."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command here (Debian: apt-get install iproute2)")
    made = subprocess.run(["ip", "netns", "add", _NAMESPACE], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        ip("link", "add", _NEAR, "type", "veth", "peer", "name", _FAR)
        ip("link", "set", _FAR, "netns", _NAMESPACE)
        ip("addr", "add", f"{_NEAR_ADDRESS}/24", "dev", _NEAR)
        ip("link", "set", _NEAR, "up")
        ip("addr", "add", f"{_FAR_ADDRESS}/24", "dev", _FAR, inside=True)
        ip("link", "set", _FAR, "up", inside=True)
        ip("link", "set", "lo", "up", inside=True)
        yield
    finally:
        # The cables go with the namespace.
        subprocess.run(["ip", "netns", "del", _NAMESPACE], check=False)


@contextmanager
def ray_node(folder: Path, address: str, *words: str, inside: bool = False) -> Iterator[None]:
    """A node that `ray start --block` has started; it and all its processes end with the block.

    `folder` is its own: two nodes that start in one at the same time choose the same names for their sockets.
    """
    folder.mkdir()
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--block", "--disable-usage-stats", f"--node-ip-address={address}", *words]
    command += [f"--object-store-memory={STORE_BYTES}", f"--temp-dir={folder}"]
    if inside:
        command = ["ip", "netns", "exec", _NAMESPACE, *command]
    log, started = folder / "start.log", time.monotonic()
    while True:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**os.environ, **_NODE}, start_new_session=True
            )
        try:
            while process.poll() is None and b"Ray runtime started" not in log.read_bytes():
                time.sleep(0.1)
            if process.poll() is None:
                yield
                return
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        # Ray gives a node half a minute to start; on a busy machine that is not always enough.
        assert time.monotonic() - started < _SECONDS_TO_START, log.read_text()


@pytest.fixture
def two_hosts() -> Iterator[str]:
    """The address of a cluster: a head without work and a node of two CPUs here, another node on the far host."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cb-", ignore_cleanup_errors=True)))
        stack.enter_context(far_host())
        with socket.create_server((_NEAR_ADDRESS, 0)) as probe:
            port = probe.getsockname()[1]
        address = f"{_NEAR_ADDRESS}:{port}"
        head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        other = [f"--address={address}", "--num-cpus=2"]
        stack.enter_context(ray_node(folder / "head", _NEAR_ADDRESS, *head))
        stack.enter_context(ray_node(folder / "near", _NEAR_ADDRESS, *other))
        stack.enter_context(ray_node(folder / "far", _FAR_ADDRESS, *other, inside=True))
        started = time.monotonic()
        while living_nodes(address) != [_NEAR_ADDRESS, _NEAR_ADDRESS, _FAR_ADDRESS]:
            assert time.monotonic() - started < _SECONDS_TO_START, "a node has gone"
            time.sleep(1)
        yield address


def living_nodes(address: str) -> list[str]:
    """Addresses of the nodes that the cluster counts as alive, asked from a process of its own."""
    code = (
        "import json, sys, ray; ray.init(sys.argv[1], logging_level='error', log_to_driver=False);"
        "print(json.dumps(sorted(node['NodeManagerAddress'] for node in ray.nodes() if node['Alive'])))"
    )
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []


@pytest.mark.parametrize("seconds", [2, 25], ids=["for two seconds", "until it is given up"])
def test_a_host_that_is_cut_off_and_healed(runs: Runs, two_hosts: str, seconds: int) -> None:
    workspace = runs.begin("embed")
    # More than one node's two CPUs have room for: both hosts work.
    driver = runs.drive("embed", workspace, two_hosts, "embed.workers=2", "embed.cpus_per_worker=1.5")
    driver.wait_until(lambda: receipts(workspace) >= 3)
    ip("link", "set", _FAR, "down", inside=True)
    time.sleep(seconds)
    ip("link", "set", _FAR, "up", inside=True)
    driver.finish()
    runs.assert_undisturbed(workspace, "embed")

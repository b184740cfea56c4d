"""What runs out: the disk, Ray's object store, the network between two hosts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.faults.harness import ROOT, Runs, ray_cluster, receipts

pytestmark = pytest.mark.faults

_HOG = """
import sys, numpy as np, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
def block(number):
    return np.full(25 * 2**20, number, np.uint8)

blocks = [block.remote(number) for number in range(10)]
ray.wait(blocks, num_returns=len(blocks), fetch_local=False)
print("full", flush=True)
sys.stdin.readline()
for number, reference in enumerate(blocks):
    assert (ray.get(reference) == number).all()
"""


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips where this machine does not let us mount."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs more rights than this user has")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_no_artifact(runs: Runs) -> None:
    workspace = runs.begin("embed")
    disk = workspace / "generation=000"
    with small_disk(disk, "1m"):
        driver = runs.drive("embed", workspace, None)
        assert driver.wait() == 4, driver.output
        assert "No space left on device" in driver.last_line
        assert "Traceback" not in driver.output
        assert runs.manifest(workspace, "embed") is None
        done = receipts(workspace)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        runs.drive("embed", workspace, None).finish()
        assert done > 0
        runs.assert_undisturbed(workspace, "embed")


def test_a_full_object_store_spills_and_the_stage_goes_on(runs: Runs) -> None:
    with ray_cluster() as cluster:
        # 250 MB of other people's objects in two stores of 80.
        hog = subprocess.Popen(
            [sys.executable, "-c", _HOG, cluster.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline().strip() == "full"
            workspace = runs.begin("embed")
            runs.drive("embed", workspace, cluster.address).finish()
            hog.communicate("\n", timeout=120)
            assert hog.returncode == 0
        finally:
            hog.kill()
    runs.assert_undisturbed(workspace, "embed")

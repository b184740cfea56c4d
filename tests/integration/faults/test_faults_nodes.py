"""Workers, nodes and drivers die in the middle: the stage ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.integration.faults.harness import (
    Driver,
    Runs,
    checkpoints,
    ray_cluster,
    raylets,
    receipts,
    worker_processes,
)

pytestmark = pytest.mark.faults


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ray_cluster() as running:
        yield running


def begin(runs: Runs, stage: str, cluster: Cluster, *more: str) -> tuple[Driver, Path]:
    workspace = runs.begin(stage)
    return runs.drive(stage, workspace, cluster.address, *more), workspace


def test_a_killed_embedding_worker_is_replaced(runs: Runs, cluster: Cluster) -> None:
    driver, workspace = begin(runs, "embed", cluster)
    driver.wait_until(lambda: receipts(workspace) >= 3)
    victims = worker_processes("MapWorker", raylets(cluster))
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    driver.finish()
    runs.assert_undisturbed(workspace, "embed")


def test_a_node_that_dies_while_embedding_is_done_without(runs: Runs, cluster: Cluster) -> None:
    driver, workspace = begin(runs, "embed", cluster)
    driver.wait_until(lambda: receipts(workspace) >= 3)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    driver.finish()
    runs.assert_undisturbed(workspace, "embed")


@pytest.mark.parametrize(("folder", "units"), [("clusters/_exchange/assign", 2), ("clusters", 1)])
def test_a_node_that_dies_in_mid_shuffle_is_done_without(runs: Runs, cluster: Cluster, folder: str, units: int) -> None:
    """On its side that assigns, and on the one that writes shards."""
    driver, workspace = begin(runs, "cluster", cluster)
    # Those of the passes before are gone, and none but this one's lie directly there.
    left = workspace / "generation=000" / folder / "_receipts"
    driver.wait_until(lambda: len(list(left.glob("*.json"))) >= units)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    driver.finish()
    runs.assert_undisturbed(workspace, "cluster")


def test_a_node_that_dies_while_training_costs_the_steps_since_the_last_checkpoint(
    runs: Runs, cluster: Cluster
) -> None:
    # One worker on each node, so that the node that dies has one.
    driver, workspace = begin(runs, "train", cluster, "train.cpus_per_worker=1.1")
    driver.wait_until(lambda: checkpoints(workspace) >= 1)
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.node_id)[0], allow_graceful=False)
    cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    driver.finish()
    runs.assert_undisturbed(workspace, "train")


@pytest.mark.parametrize("stage", ["ingest", "embed", "cluster"])
def test_a_killed_driver_is_submitted_again_and_continues(runs: Runs, cluster: Cluster, stage: str) -> None:
    driver, workspace = begin(runs, stage, cluster)
    wanted = 1 if stage == "ingest" else 4
    driver.wait_until(lambda: receipts(workspace) >= wanted)
    driver.kill()
    done = receipts(workspace)
    assert runs.manifest(workspace, stage) is None
    # What the lost driver's workers were doing may still be written.
    time.sleep(1)
    again = runs.drive(stage, workspace, cluster.address)
    again.finish()
    assert done >= wanted
    runs.assert_undisturbed(workspace, stage)


def test_a_killed_training_driver_is_submitted_again_and_continues(runs: Runs, cluster: Cluster) -> None:
    driver, workspace = begin(runs, "train", cluster)
    driver.wait_until(lambda: checkpoints(workspace) >= 2)
    driver.kill()
    runs.drive("train", workspace, cluster.address).finish()
    runs.assert_undisturbed(workspace, "train")


def test_a_whole_machine_that_dies_goes_on_elsewhere(runs: Runs) -> None:
    workspace = runs.begin("embed")
    local = runs.drive("embed", workspace, None)
    local.wait_until(lambda: receipts(workspace) >= 4)
    local.kill_all()
    with ray_cluster(nodes=1) as other:
        runs.drive("embed", workspace, other.address).finish()
    runs.assert_undisturbed(workspace, "embed")


def test_a_worker_that_stands_still_is_waited_for(runs: Runs, cluster: Cluster) -> None:
    driver, workspace = begin(runs, "embed", cluster)
    driver.wait_until(lambda: receipts(workspace) >= 3)
    (victim, *_) = worker_processes("MapWorker", raylets(cluster))
    os.kill(victim, signal.SIGSTOP)
    time.sleep(5)
    os.kill(victim, signal.SIGCONT)
    driver.finish()
    runs.assert_undisturbed(workspace, "embed")


def test_an_interrupted_driver_says_so_and_continues(runs: Runs, cluster: Cluster) -> None:
    driver, workspace = begin(runs, "embed", cluster)
    driver.wait_until(lambda: receipts(workspace) >= 3)
    driver.kill(signal.SIGINT)
    assert driver.process.returncode == 130
    assert "the same command continues where this one stopped" in driver.last_line
    runs.drive("embed", workspace, cluster.address).finish()
    runs.assert_undisturbed(workspace, "embed")

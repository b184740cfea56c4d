"""A cluster whose nodes are not there yet, as where an autoscaler starts them when a stage asks."""

from __future__ import annotations

import pytest

from tests.integration.faults.harness import STORE_BYTES, Runs, ray_cluster

pytestmark = pytest.mark.faults


def test_a_stage_waits_for_nodes_as_long_as_it_may(runs: Runs) -> None:
    with ray_cluster(nodes=0) as cluster:
        workspace = runs.begin("embed")
        driver = runs.drive("embed", workspace, cluster.address)
        assert driver.wait() == 4, driver.output
        assert "a worker needs 0.9 CPU, no node of the cluster has that" in driver.last_line

        driver = runs.drive("embed", workspace, cluster.address, "ray.startup_timeout=300")
        driver.wait_until(lambda: "waiting for nodes" in driver.output)
        cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        driver.finish()
        runs.assert_undisturbed(workspace, "embed")

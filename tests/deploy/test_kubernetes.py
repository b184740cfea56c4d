"""Manifests against KubeRay's own schemas and Kubernetes', and what every pod of ours must be."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.manifests import DEPLOY, KUBERNETES, ROOT, documents, pod_specs

ALL = [(path.name, document) for path in KUBERNETES for document in documents(path)]
RAY = [(name, document) for name, document in ALL if document["apiVersion"].startswith("ray.io/")]
# Kinds of operators whose schemas are not at hand.
FOREIGN = {"PodMonitor"}
RAY_IMAGE_LOCK = DEPLOY / "locks" / "cuda.txt"


def by_name(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {"argvalues": items, "ids": [name for name, _ in items]}


@pytest.fixture(scope="session")
def kuberay_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, apiVersion) -> strict JSON schema, from KubeRay's CustomResourceDefinitions."""
    folder = Path(os.environ.get("CLUSTERBATCH_KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay"))
    paths = sorted(folder.glob("ray.io_*.yaml"))
    if not paths:
        pytest.skip(f"no KubeRay schemas at {folder} (set CLUSTERBATCH_KUBERAY_SCHEMAS)")
    schemas = {}
    for path in paths:
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            key = definition["names"]["kind"], f"{definition['group']}/{version['name']}"
            schemas[key] = strict(version["schema"]["openAPIV3Schema"])
            schemas[key]["properties"]["metadata"] = {"type": "object"}
    return schemas


def strict(schema: Any) -> Any:
    """The same schema, refusing keys that it does not know: the API server would drop them in silence."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not keeps_unknown:
        result["additionalProperties"] = False
    return result


@pytest.mark.parametrize(("name", "manifest"), **by_name(RAY))
def test_kuberay_accepts(name: str, manifest: dict[str, Any], kuberay_schemas: dict[Any, Any]) -> None:
    jsonschema.Draft202012Validator(kuberay_schemas[manifest["kind"], manifest["apiVersion"]]).validate(manifest)


def test_a_misspelt_key_is_refused(kuberay_schemas: dict[Any, Any]) -> None:
    manifest = next(document for name, document in RAY if name == "rayjob.yaml")
    spec = {**manifest["spec"], "entryPoint": "clusterbatch"}
    with pytest.raises(jsonschema.ValidationError, match="entryPoint"):
        jsonschema.Draft202012Validator(kuberay_schemas["RayJob", "ray.io/v1"]).validate({**manifest, "spec": spec})


@pytest.mark.parametrize(("name", "manifest"), **by_name([item for item in ALL if item not in RAY]))
def test_kubernetes_accepts(name: str, manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    if manifest["kind"] in FOREIGN:
        pytest.skip(f"{manifest['kind']}: an operator's own kind, no schema at hand")
    validator.validate(manifest, validator.latest_version(), strict=True)


@pytest.mark.parametrize(("name", "manifest"), **by_name(ALL))
def test_pods_are_what_kubernetes_accepts_and_unprivileged(name: str, manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for spec in pod_specs(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        validator.validate(pod, validator.latest_version(), strict=True)
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert set(container["resources"]) == {"requests", "limits"}
            assert not container["image"].endswith(":latest")
            assert ":" in container["image"]


@pytest.mark.parametrize(("name", "manifest"), **by_name(RAY))
def test_clusters_are_of_the_locked_ray_and_their_heads_take_no_work(name: str, manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]
    spec = spec.get("jobTemplate", spec)
    cluster = spec.get("rayClusterSpec", spec)
    locked = re.search(r"^ray==(\S+)", RAY_IMAGE_LOCK.read_text(), flags=re.MULTILINE)
    assert locked is not None
    assert cluster["rayVersion"] == locked[1]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_only_ray_pods_that_are_selected_are_scraped_and_walled_in() -> None:
    label = "app.kubernetes.io/part-of"
    kinds = {document["kind"]: document for _, document in ALL}
    assert kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == {label: "clusterbatch"}
    assert kinds["PodMonitor"]["spec"]["selector"]["matchLabels"] == {label: "clusterbatch"}
    port = kinds["PodMonitor"]["spec"]["podMetricsEndpoints"][0]["port"]
    for _, manifest in RAY:
        templates = [
            value
            for value in walk(manifest)
            if isinstance(value, dict) and "spec" in value and "containers" in value["spec"]
        ]
        for template in templates:
            assert template["metadata"]["labels"][label] == "clusterbatch"
            names = [item["name"] for item in template["spec"]["containers"][0].get("ports", [])]
            assert port in names or template["spec"]["containers"][0]["name"] == "submitter"


@pytest.mark.parametrize(("name", "manifest"), **by_name([item for item in RAY if item[1]["kind"] != "RayCluster"]))
def test_the_pods_that_submit_jobs_may_reach_the_head(name: str, manifest: dict[str, Any]) -> None:
    """KubeRay labels the Kubernetes Job of a submission, but not the pod, unless it is given a template."""
    [policy] = [document for _, document in ALL if document["kind"] == "NetworkPolicy"]
    allowed = [
        source["podSelector"]["matchLabels"]
        for rule in policy["spec"]["ingress"]
        for source in rule["from"]
        if "podSelector" in source and "ports" not in rule
    ]
    spec = manifest["spec"]
    template = spec.get("jobTemplate", spec)["submitterPodTemplate"]
    assert any(labels.items() <= template["metadata"]["labels"].items() for labels in allowed)


@pytest.mark.parametrize(("name", "manifest"), **by_name(RAY))
def test_the_autoscaler_beside_a_head_is_confined_and_shares_its_logs(name: str, manifest: dict[str, Any]) -> None:
    """KubeRay adds its container: as privileged as it is by default, with a volume `ray-logs` for /tmp/ray."""
    for cluster in walk(manifest):
        if not isinstance(cluster, dict) or not cluster.get("enableInTreeAutoscaling"):
            continue
        context = cluster["autoscalerOptions"]["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        [head] = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert {mount["name"] for mount in head["volumeMounts"] if mount["mountPath"] == "/tmp/ray"} == {"ray-logs"}


def walk(value: Any) -> list[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value, *(found for child in children for found in walk(child))]

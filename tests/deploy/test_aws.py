"""`ray up`'s configuration by Ray's own rules, and the rights that runs have in the bucket."""

from __future__ import annotations

import json
from fnmatch import fnmatch

import yaml

from tests.deploy.manifests import DEPLOY

CLUSTER = yaml.safe_load((DEPLOY / "aws" / "cluster.yaml").read_text())
POLICY = json.loads((DEPLOY / "aws" / "s3-policy.json").read_text())


def test_ray_accepts_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(CLUSTER)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types[prepared["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["spot-gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_the_dashboard_listens_on_loopback_and_disks_are_encrypted() -> None:
    assert any("--dashboard-host=127.0.0.1" in command for command in CLUSTER["head_start_ray_commands"])
    for node in CLUSTER["available_node_types"].values():
        settings = node["node_config"]
        assert settings["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in settings["BlockDeviceMappings"])


def allowed(action: str, resource: str) -> bool:
    for statement in POLICY["Statement"]:
        actions, resources = statement["Action"], statement["Resource"]
        actions = [actions] if isinstance(actions, str) else actions
        resources = [resources] if isinstance(resources, str) else resources
        if statement["Effect"] == "Allow" and action in actions and any(fnmatch(resource, item) for item in resources):
            return True
    return False


def test_runs_may_do_what_they_do_and_no_more() -> None:
    bucket = "arn:aws:s3:::example-bucket"
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
        assert allowed(action, f"{bucket}/runs/web-1/corpus/manifest.json")
    assert allowed("s3:GetObject", f"{bucket}/pairs/web/part-0.parquet")
    assert allowed("s3:ListBucket", bucket)
    assert allowed("s3:ListBucketMultipartUploads", bucket)
    assert not allowed("s3:PutObject", f"{bucket}/pairs/web/part-0.parquet")
    assert not allowed("s3:DeleteObject", f"{bucket}/beir/nq/corpus.jsonl")
    assert not allowed("s3:GetObject", f"{bucket}/elsewhere/secret")
    for statement in POLICY["Statement"]:
        if statement["Effect"] == "Allow":
            assert "*" not in json.dumps(statement["Action"])
            assert statement["Resource"] != "*"

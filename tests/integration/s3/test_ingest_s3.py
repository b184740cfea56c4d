"""Ingest wholly on S3, and with one request in twenty failing: the corpus is the one of a local run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, StorageConfig
from clusterbatch.corpus.ingest import ingest
from clusterbatch.store import Folder
from tests.corpus.test_ingest import corpus_rows, rejects, write_lines
from tests.integration.s3.fault_proxy import FaultProxy
from tests.integration.s3.server import S3Server

pytestmark = pytest.mark.s3

# Together one request in twenty.
RATES = {
    "slow_down": 0.01,
    "server_error": 0.01,
    "reset": 0.01,
    "drop_answer": 0.005,
    "reset_body": 0.005,
    "truncate": 0.005,
    "corrupt": 0.005,
}


def configuration(workspace: str, source: str, storage: StorageConfig) -> RunConfig:
    return RunConfig.model_validate(
        {
            "workspace": workspace,
            "corpus": {"paths": [source], "unit_bytes": 8192, "part_bytes": 2**16, "row_group_rows": 128},
            "evaluate": {"holdout": 100},
            "storage": storage.model_dump(),
        }
    )


def outcome(config: RunConfig) -> dict[str, Any]:
    manifest = ingest(config)
    folder = config.corpus.paths[0]
    refused = [(row["file"].removeprefix(folder), row["row"], row["reason"]) for row in rejects(config, manifest)]
    holdout = Folder(config.workspace, config.storage).child("corpus", "holdout")
    collection = {entry.name: holdout.read(entry.name) for entry in holdout.find()}
    return {
        "counts": manifest.counts,
        "details": manifest.details,
        "rows": corpus_rows(config, manifest),
        "rejects": sorted(refused),
        "collection": collection,
    }


def test_the_corpus_is_the_same_on_s3_and_under_faults(
    tmp_path: Path, s3_server: S3Server, storage: StorageConfig, bucket: str, in_process: None
) -> None:
    numbers = random.Random(0)
    remote = Folder(f"s3://{bucket}/in", storage)
    for file in range(6):
        rows: list[Any] = [
            {"query": f"query {file} {row}", "document": f"document {numbers.randrange(500)} of {file}"}
            for row in range(400)
        ]
        path = write_lines(tmp_path / f"in/site-{file}.jsonl", [*rows, "no json", rows[0]])
        remote.write(path.name, path.read_bytes())
    local = outcome(configuration(str(tmp_path / "ws"), str(tmp_path / "in"), StorageConfig()))
    assert local["counts"].read == 2412

    undisturbed = outcome(configuration(f"s3://{bucket}/ws", remote.uri, storage))
    assert undisturbed == local

    # A damaged byte of an input file cannot be noticed: only what was written here has checksums.
    with FaultProxy(s3_server.port, seed=1, rates=RATES) as proxy:
        faulty = storage.model_copy(update={"endpoint_url": proxy.endpoint_url})
        disturbed = outcome(configuration(f"s3://{bucket}/ws-faulty", str(tmp_path / "in"), faulty))
        print(f"requests {dict(proxy.requests)}, faults {dict(proxy.injected)}")
        assert sum(proxy.injected.values()) > 10
    assert disturbed == local

"""Every command over a generated corpus: of each row it is known where it went, at every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clusterbatch.config.load import load_config
from clusterbatch.store.workspace import Workspace
from tests.benchmarks.bench_scale_end_to_end import measure
from tests.data_folder import data_folder

PAIRS = 10_000

pytestmark = [pytest.mark.slow, pytest.mark.skipif(data_folder() is None, reason="needs CLUSTERBATCH_DATA")]


def test_the_pipeline_over_a_generated_corpus_conserves_rows(tmp_path: Path) -> None:
    records = measure(tmp_path, PAIRS, steps=40, local=True)
    ingest = records["ingest"]
    assert ingest["rows"] + ingest["rejected"] + sum(ingest["set_aside"].values()) == PAIRS
    # Repeated rows and bad ones are rejected, held-out ones are set aside.
    assert 0.05 * PAIRS < ingest["rejected"] < 0.15 * PAIRS
    assert ingest["set_aside"]["held out"] > 100
    assert records["embed"]["rows"] == records["cluster"]["rows"] == ingest["rows"] > 0.7 * PAIRS
    # Each row group is read for a sample, for its clusters and with its vectors, twice at two levels; no more.
    assert records["cluster"]["requests"] < 30 * records["embed"]["objects"]
    workspace = Workspace(load_config(str(tmp_path / "run.yaml")))
    corpus = workspace.corpus.require()
    assert corpus.version == 2
    assert records["append"]["rows"] == corpus.counts.written > ingest["rows"]
    # The refresh trained on the grown corpus.
    assert workspace.clusters(1).require().counts.written == corpus.counts.written
    assert json.loads((tmp_path / "workspace" / "metrics.json").read_text())

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import ReuseConfig, RunConfig, load_config, with_changes
from clusterbatch.corpus.row_groups import PAIRS, read_row_group, row_groups_of
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.experiments.compare.sample import sample_corpus, sample_home
from clusterbatch.schema import corpus_schema, embeddings_schema
from clusterbatch.store import Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace

ROWS = 1200
# Forty topics of thirty rows each: neighbourhoods that a sample should keep or leave, but not tear.
WORDS = [
    line.split() for line in ["harbour ship quay", "volcano lava ash", "guitar string chord", "orchard apple pear"] * 10
]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    config = load_config(None, [f"workspace={tmp_path}/ws", "corpus.paths=unused"])
    artifact = Workspace(config).corpus
    rng = np.random.default_rng(0)
    topics = rng.permutation(np.repeat(np.arange(40), ROWS // 40))
    documents = [" ".join([*rng.permutation(WORDS[topic]), f"lot{topic}"] * 3) for topic in topics]
    table = pa.table(
        {
            "pair_id": [f"{n:032x}" for n in range(ROWS)],
            "query": [f"question {n}" for n in range(ROWS)],
            "document": documents,
            "source": ["odd" if topic % 2 else "even" for topic in topics],
            "query_hash": pa.array(range(ROWS), pa.uint64()),
            "document_hash": pa.array(range(ROWS), pa.uint64()),
        },
        schema=corpus_schema(),
    )
    part = write_parquet(artifact, "part", table, 300, role=PAIRS)
    receipt = Receipt(unit=0, fingerprint="f" * 16, parts=[part], counts=Counts(read=ROWS, written=ROWS))
    artifact.commit(
        "f" * 16, [receipt], config={}, inputs={}, seconds=1, details={"sources": {"even": 600, "odd": 600}}
    )

    def run(title, units, worker, arguments, pool, *, done):
        only = worker(**arguments)
        return [only.process(unit) for unit in units]

    monkeypatch.setattr("clusterbatch.experiments.compare.sample.run_units", run)
    monkeypatch.setattr("clusterbatch.experiments.compare.sample.ray_session", lambda config: nullcontext())
    return config


def sampled(config: RunConfig, share: float, way: str) -> pa.Table:
    manifest = sample_corpus(config, share, way)
    assert manifest.counts.read == ROWS
    home = config.model_copy(update={"workspace": sample_home(config, share, way), "reuse": ReuseConfig()})
    artifact = Workspace(home).corpus
    table = pa.concat_tables([read_row_group(artifact, unit) for unit in row_groups_of(manifest)])
    assert table.num_rows == manifest.counts.written == sum(manifest.details["sources"].values())
    return table


@pytest.mark.parametrize("way", ["neighbourhoods", "uniform"])
def test_about_the_share_of_every_source_and_the_same_each_time(config: RunConfig, way: str):
    table = sampled(config, 0.3, way)
    assert 0.15 * ROWS < table.num_rows < 0.5 * ROWS
    assert set(table["source"].to_pylist()) == {"even", "odd"}
    assert sampled(config, 0.3, way)["pair_id"].to_pylist() == table["pair_id"].to_pylist()


def test_neighbourhoods_stay_whole_where_uniform_sampling_thins_them(config: RunConfig):
    def kept_share_of_met_topics(table: pa.Table) -> float:
        met = [document.split()[3] for document in table["document"].to_pylist()]
        return float(np.mean([met.count(topic) / (ROWS // 40) for topic in set(met)]))

    dense = kept_share_of_met_topics(sampled(config, 0.3, "neighbourhoods"))
    thin = kept_share_of_met_topics(sampled(config, 0.3, "uniform"))
    assert dense > 1.5 * thin


def test_rows_keep_the_vectors_that_the_corpus_has_already(config: RunConfig):
    embeddings = Workspace(config).embeddings()
    vectors = np.random.default_rng(1).normal(size=(2, ROWS, 8)).astype(np.float16)
    ids = [f"{n:032x}" for n in range(ROWS)]
    parts = []
    for unit, first in enumerate(range(0, ROWS, 300)):
        rows = slice(first, first + 300)
        columns = [ids[rows], ["even"] * 300, *(vector_column(vectors[side][rows]) for side in (0, 1))]
        table = pa.table(columns, schema=embeddings_schema(8))
        parts.append(write_parquet(embeddings, f"unit-{unit}", table))
    receipt = Receipt(unit=0, fingerprint="e" * 16, parts=parts, counts=Counts(read=ROWS, written=ROWS))
    embeddings.commit("e" * 16, [receipt], config={}, inputs={}, seconds=1, details={"dimensions": 8})
    reusing = with_changes(config, {"reuse.corpus": config.workspace, "reuse.embeddings": config.workspace})
    table = sampled(reusing, 0.3, "uniform")
    rows = [ids.index(pair_id) for pair_id in table["pair_id"].to_pylist()]
    for side, name in enumerate(("query_vector", "document_vector")):
        assert np.array_equal(vector_values(table[name]), vectors[side][rows])
    # Which rows are drawn does not depend on that.
    assert table["pair_id"].to_pylist() == sampled(with_home(config), 0.3, "uniform")["pair_id"].to_pylist()


def with_home(config: RunConfig) -> RunConfig:
    """The same corpus, read from another workspace."""
    return with_changes(config, {"workspace": f"{config.workspace}-2", "reuse.corpus": config.workspace})

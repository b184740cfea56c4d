from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import ReuseConfig, RunConfig, load_config, with_changes
from clusterbatch.corpus.row_groups import PAIRS, read_row_group, row_groups_of
from clusterbatch.embedding.vectors import vector_column, vector_values
from clusterbatch.experiments.compare import sample as module
from clusterbatch.experiments.compare.sample import sample_corpus, sample_home, wanted_pivots
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
def config(tmp_path: Path, in_process: None) -> RunConfig:
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


@pytest.mark.parametrize("flat", [None, 4])
@pytest.mark.parametrize("model", [None, "char-ngrams"])
def test_neighbourhoods_stay_whole_where_uniform_sampling_thins_them(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, flat: int | None, model: str | None
):
    seen = []
    if flat is not None:
        monkeypatch.setattr(module, "_FLAT_PIVOTS", flat)
        monkeypatch.setattr(module, "_NEIGHBOURHOOD", 25)
        original = module.Pivots.draws

        def draws(self: module.Pivots, rows: np.ndarray) -> np.ndarray:
            assert self.coarse is not None
            seen.append(len(rows))
            return original(self, rows)

        monkeypatch.setattr(module.Pivots, "draws", draws)
    if model is not None:
        # Needs no model from a hub: none can be had here.
        def refuse(*arguments: object) -> str:
            raise AssertionError("a model was asked for")

        monkeypatch.setattr(module, "resolve_model", refuse)
        config = with_changes(config, {"embed.model": model})

    def kept_share_of_met_topics(table: pa.Table) -> float:
        met = [document.split()[3] for document in table["document"].to_pylist()]
        return float(np.mean([met.count(topic) / (ROWS // 40) for topic in set(met)]))

    dense = kept_share_of_met_topics(sampled(config, 0.3, "neighbourhoods"))
    if flat is not None:
        assert seen, "rows were compared with all pivots"
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


def test_vectors_of_ones_own_need_no_model_and_stay_with_their_rows(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "resolve_model", None)
    table = pa.concat_tables([read_row_group(Workspace(config).corpus, unit) for unit in groups_of(config)])
    topic = np.array([int(document.split("lot")[1].split()[0]) for document in table["document"].to_pylist()])
    # Around a circle, with a little noise: a neighbourhood is an arc of whole topics but at its two ends.
    angle = 2 * np.pi * topic / 40 + 0.001 * np.random.default_rng(3).normal(size=ROWS)
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float16)
    for side in ("query", "document"):
        table = table.append_column(f"{side}_vector", vector_column(vectors))
    own = with_changes(config, {"workspace": f"{tmp_path}/own"})
    artifact = Workspace(own).corpus
    part = write_parquet(artifact, "part", table, 300, role=PAIRS)
    receipt = Receipt(unit=0, fingerprint="a" * 16, parts=[part], counts=Counts(read=ROWS, written=ROWS))
    details = {"sources": {"even": 600, "odd": 600}, "dimensions": 2}
    artifact.commit("a" * 16, [receipt], config={}, inputs={}, seconds=1, details=details)
    kept = sampled(own, 0.3, "neighbourhoods")
    met = [document.split("lot")[1].split()[0] for document in kept["document"].to_pylist()]
    assert np.mean([met.count(each) / (ROWS // 40) for each in set(met)]) > 0.7
    assert vector_values(kept["document_vector"]).shape[1] == 2
    home = own.model_copy(update={"workspace": sample_home(own, 0.3, "neighbourhoods")})
    assert Workspace(home).corpus.require().details["dimensions"] == 2


@pytest.mark.parametrize("rows", [10**5, 10**7, 10**9])
@pytest.mark.parametrize("sources", [1, 1000, 10**5])
@pytest.mark.parametrize("share", [0.5, 0.01, 0.0001])
def test_pivots_are_bounded_however_large_the_corpus(rows: int, sources: int, share: float):
    wanted = wanted_pivots({f"s{number}": max(1, rows // sources) for number in range(sources)}, share)
    assert sum(wanted.values()) <= 10 * 2**16
    assert all(count <= rows // sources for count in wanted.values())


def groups_of(config: RunConfig):
    return row_groups_of(Workspace(config).corpus.require())

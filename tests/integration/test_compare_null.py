"""Data on which stratifying cannot help: sources and vectors are drawn at random. No gain may be claimed there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.config import RunConfig, load_config
from clusterbatch.experiments.compare.results import read_comparison
from clusterbatch.experiments.compare.stage import compare, comparison_artifact
from clusterbatch.experiments.compare.wording import answer, next_step
from tests.encoder.models import make_static

PAIRS, QUERIES, DIMENSIONS = 960, 240, 16
COLOURS = ["red", "green", "blue", "white", "black", "brown", "pink", "grey", "silver", "gold"]
THINGS = [
    "table",
    "chair",
    "lamp",
    "window",
    "door",
    "carpet",
    "mirror",
    "candle",
    "pillow",
    "blanket",
    "kettle",
    "spoon",
]
PLACES = ["river", "stone", "forest", "meadow", "island", "valley", "cloud", "winter", "summer", "garden", "bridge"]
WORDS = [*COLOURS, *THINGS, *PLACES]


def made_up(rng: np.random.Generator, number: int) -> tuple[list[str], list[str]]:
    """(queries, documents): a query names three of its document's eight words."""
    documents = [rng.permutation(WORDS)[:8].tolist() for _ in range(number)]
    queries = [" ".join(rng.permutation(words)[:3]) for words in documents]
    return queries, [" ".join(words) for words in documents]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rng = np.random.default_rng(0)
    queries, documents = made_up(rng, PAIRS)
    vectors = rng.normal(size=(2, PAIRS, DIMENSIONS)).astype(np.float32)
    pairs = {
        "query": queries,
        "document": documents,
        "source": rng.choice(["one", "two"], PAIRS),
        "query_vector": list(vectors[0]),
        "document_vector": list(vectors[1]),
    }
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    folder = tmp_path / "random"
    (folder / "qrels").mkdir(parents=True)
    queries, documents = made_up(rng, QUERIES)
    for name, texts in (("queries", queries), ("corpus", documents)):
        lines = [json.dumps({"_id": f"{name[0]}{row}", "text": text}) for row, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    judged = [f"q{row}\tc{row}\t1" for row in range(QUERIES)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return load_config(
        None,
        [
            f"workspace={tmp_path}/ws",
            f"corpus.paths={tmp_path}/pairs.parquet",
            "corpus.columns.vector=document_vector",
            "corpus.columns.query_vector=query_vector",
            f"evaluate.path={folder}",
            "evaluate.metrics=[NDCG@10]",
            f"train.model={make_static(WORDS, tmp_path / 'model')}",
            "cluster.mean_size=96",
            "batches.size=32",
            "train.learning_rate=0.005",
            "compare.arms=[random,source,cluster]",
            "compare.steps=30",
            "compare.points=2",
        ],
    )


@pytest.mark.usefixtures("in_process")
def test_no_gain_is_claimed_where_sources_and_clusters_mean_nothing(config: RunConfig):
    manifest = compare(config)
    found = read_comparison(config, comparison_artifact(config), manifest)
    # Training itself does help, and the arms differ: there was something to mistake for a gain.
    assert found.baseline.spread.mean > found.untrained
    assert all(arm.gain.mean != 0 for arm in found.others)
    assert all(arm.verdict.outcome != "pays" for arm in found.others)
    assert not answer(found, config, "en").startswith("Yes")
    assert next_step(found, config, "en") != "Use cluster batches."

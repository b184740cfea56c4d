"""The examples whose data are generated: small, through the stages themselves, to a gain on what was held out."""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from clusterbatch.config import RunConfig, load_config
from clusterbatch.corpus.ingest import ingest
from clusterbatch.embedding.stage import embed
from clusterbatch.evaluation.stage import evaluate
from clusterbatch.shards.reader import ROWS
from clusterbatch.shards.stage import cluster
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.stage import train
from tests.in_process import OVERRIDES

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"


pytestmark = pytest.mark.usefixtures("in_process")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quality(config: RunConfig) -> dict[tuple[str, str], float]:
    """All stages; the values of the evaluation by (model, metric)."""
    for stage in (ingest, embed, cluster, train):
        stage(config)
    table = evaluate(config).details["table"]
    return {(row["model"], row["metric"]): row["value"] for row in table}


@pytest.mark.slow
def test_a_small_clip_learns_captions_of_images(tmp_path: Path) -> None:
    data, images = tmp_path / "data", example("images")
    images.main(str(data), pairs=2_400, held_out=100)
    words = [
        f"workspace={tmp_path}/ws",
        f"corpus.paths={data}/pairs.parquet",
        f"evaluate.path={data}/held-out-looks",
        f"embed.model={data}/clip",
        f"train.model={data}/clip",
        "cluster.mean_size=300",
        "train.epochs=8",
        *OVERRIDES,
    ]
    config = load_config(EXAMPLES / "images.yaml", words)
    found = quality(config)
    # A chance order of a hundred images: 0.045.
    assert found["before", "NDCG@10"] < 0.1
    assert found["after", "NDCG@10"] > 0.2
    for word, chance in ((images.COLOURS, 1 / 6), (images.GROUNDS, 1 / 3)):
        assert purity(config, list(word)) > chance + 0.1


def test_recommendation_learns_what_is_bought_next(tmp_path: Path) -> None:
    data = tmp_path / "data"
    example("recommendation").main(str(data), customers=2_000)
    words = [
        f"workspace={tmp_path}/ws",
        f"corpus.paths={data}/pairs.parquet",
        f"evaluate.path={data}/held-out-customers",
        f"train.model={data}/transformer",
        "train.epochs=3",
        *OVERRIDES,
    ]
    found = quality(load_config(EXAMPLES / "recommendation.yaml", words))
    # Words in common lead to what is bought already; counting reaches 0.36, and nobody more than 0.71.
    for start in ("before", "bm25"):
        assert found[start, "HitRate@10"] < 0.1
    assert found["after", "HitRate@10"] > 0.4
    assert found["after", "NDCG@10"] > 0.2


def purity(config: RunConfig, words: list[str]) -> float:
    """The share of rows whose word is the most frequent one of their cluster; `words` exclude each other."""
    clusters = Workspace(config).clusters()
    parts = [part for part in clusters.require().parts if part.details.get("content") == ROWS]
    rows = pa.concat_tables([read_parquet(clusters.folder, part) for part in parts]).to_pylist()
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for row in rows:
        [word] = set(words).intersection(row["query"].split())
        counts[row["centroid"]][word] += 1
    return sum(max(count.values()) for count in counts.values()) / len(rows)

"""How much of the embedding pass do clusters need? Share of the whole surrogate's hardness, against CPU seconds.

    python -m tests.benchmarks.bench_effort FOLDER [--corpora medquad,msdocs] [--pairs 2000] [--seeds 2]

Real pairs (CLUSTERBATCH_DATA), a sample of each corpus' largest source; documents are clustered. A
variant embeds by a part of all-MiniLM-L6-v2: fewer tokens, the first layers (mean-pooled as the whole is), queries
instead of documents, or token vectors averaged. `centred` subtracts the corpus' mean; `fitted` maps vectors linearly
to the whole model's, by ridge regression on 750 other rows that are embedded whole and not counted. Static vectors have
SIF weights (Arora 2017), without mean and first component.

Hardness of a batch is the mean over queries of the highest score of another row's document, by the whole model's
vectors. share = (variant - source) / (whole - source), each the mean over seeds of k-means and plan; false negatives:
share of a batch's queries with another row's document above their own. seconds: CPU time of one thread for the
documents, tokenising included; chunks of texts go through all variants in turn. FOLDER keeps vectors and figures of
each corpus: an interrupted study continues with the same command. One JSON line per corpus, batch size and variant,
then the means over corpora.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.samplers import index_labels
from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.config import BatchesConfig
from clusterbatch.corpus.normalise import text_hashes
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.load import drop_padding, load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import resolve_model
from tests.benchmarks.figures import emit
from tests.data_folder import require_data_folder

MODEL, TOKENS, BATCH_TOKENS = "all-MiniLM-L6-v2", 256, 2048
CORPORA = ("msdocs", "medquad", "proposals", "codepairs", "movies")
# (layers, tokens) of the variants that run a part of the model.
PARTS = [
    (None, 256),
    (None, 128),
    (None, 64),
    (None, 32),
    (4, 256),
    (3, 256),
    (2, 256),
    (4, 64),
    (3, 64),
    (2, 64),
]
FITTED_ROWS, RIDGE = 750, 1e-2
BATCHES, CLUSTER_BATCHES = (32, 128), 4
_CHUNK = 250
_SIF = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for name in options.corpora.split(","):
        kept = options.folder / f"{name}-{options.pairs}-{options.seeds}.json"
        if not kept.exists():
            kept.write_text(json.dumps(figures_of(options.folder, name, options.pairs, options.seeds)))
        lines += json.loads(kept.read_text())
    figure = "effort, share of the whole model's gain in hardness"
    for line in lines:
        emit(figure, line["share"], case=line["variant"], **{key: line[key] for key in line if key not in _NAMED})
    for batch in BATCHES:
        of_batch = [line for line in lines if line["batch"] == batch]
        for variant in dict.fromkeys(line["variant"] for line in of_batch):
            own = [line for line in of_batch if line["variant"] == variant]
            emit(
                f"{figure}, mean over corpora",
                float(np.mean([line["share"] for line in own])),
                case=variant,
                batch=batch,
                corpora=len(own),
                least=min(line["share"] for line in own),
                cost=round(float(np.mean([line["cost"] for line in own])), 4),
                false_negatives=round(float(np.mean([line["false_negatives"] for line in own])), 4),
            )


def figures_of(folder: Path, name: str, pairs: int, seeds: int) -> list[dict[str, Any]]:
    """Return a line for each batch size and variant of a corpus."""
    table, source = read_pairs(name, pairs + FITTED_ROWS)
    kept = folder / f"{name}-{pairs}-vectors.npz"
    if not kept.exists():
        np.savez(kept, **embed_all(table))
    arrays = dict(np.load(kept))
    queries = arrays["whole queries"][FITTED_ROWS:]
    hashes = [text_hashes(table[side].to_pylist(), len(table))[FITTED_ROWS:] for side in ("query", "document")]
    seconds = {key.removeprefix("seconds "): float(arrays[key]) for key in arrays if key.startswith("seconds ")}
    variants = variants_of({key: each for key, each in arrays.items() if key in seconds})
    whole = arrays[_name(None, TOKENS)][FITTED_ROWS:]
    found = []
    for batch in BATCHES:

        def measured(vectors: np.ndarray | None, batch: int = batch) -> np.ndarray:
            each = [
                hardness(queries, whole, hashes, batches_of(vectors, source[FITTED_ROWS:], batch, seed))
                for seed in range(seeds)
            ]
            return np.mean(each, axis=0)

        of_source = measured(None)
        of_variant = {variant: measured(vectors) for variant, (vectors, _) in variants.items()}
        gain = of_variant[_name(None, TOKENS)][0] - of_source[0]
        for variant, (harder, false) in of_variant.items():
            part = variants[variant][1]
            found.append(
                {
                    "corpus": name,
                    "batch": batch,
                    "variant": variant,
                    "share": round(float((harder - of_source[0]) / gain), 4),
                    "hardness": round(float(harder), 4),
                    "of_source": round(float(of_source[0]), 4),
                    "false_negatives": round(float(false), 4),
                    "false_negatives_of_source": round(float(of_source[1]), 4),
                    "seconds": round(seconds[part], 2),
                    "cost": round(seconds[part] / seconds[_name(None, TOKENS)], 4),
                    "rows": len(whole),
                }
            )
    return found


def read_pairs(name: str, count: int) -> tuple[pa.Table, np.ndarray]:
    """Return rows of the largest source in random order, no document twice, and their source."""
    path = require_data_folder() / f"pairs/{name}.parquet"
    table = pq.read_table(path, columns=["query", "document", "source"])
    names, rows = np.unique(table["source"].to_numpy(), return_counts=True)
    largest = names[np.argmax(rows)]
    _, first = np.unique(text_hashes(table["document"].to_pylist(), len(table)), return_index=True)
    drawn = np.random.default_rng(0).permutation(first)
    drawn = drawn[table["source"].to_numpy()[drawn] == largest][:count]
    table = table.take(pa.array(drawn))
    return table, table["source"].to_numpy()


def embed_all(table: pa.Table) -> dict[str, np.ndarray]:
    """Return vectors (N, D) float32 and CPU seconds (without the first FITTED_ROWS rows) of everything that embeds."""
    dtype = inference_dtype("auto", torch.device("cpu"))
    folder = resolve_model(MODEL)
    models = {layers: first_layers(folder, layers, dtype) for layers in dict.fromkeys(layers for layers, _ in PARTS)}
    documents, queries = table["document"].to_pylist(), table["query"].to_pylist()
    static = load_encoder(folder, "static")
    ids = static.tokenizer.encode(documents[:FITTED_ROWS], TOKENS).values
    counts = np.bincount(ids, minlength=static.tokenizer.vocabulary)
    weights = (_SIF / (_SIF + counts / counts.sum())).astype(np.float32)
    embeddings = static.backbone.weight.detach().numpy()  # type: ignore[union-attr]

    def of_part(layers: int | None, tokens: int, texts: list[str]) -> np.ndarray:
        encoder = models[layers]
        return encoder.encode(encoder.tokenizer.encode(texts, tokens), BATCH_TOKENS)

    def weighted(texts: list[str]) -> np.ndarray:
        tokens = static.tokenizer.encode(texts, TOKENS)
        bag = torch.nn.functional.embedding_bag(
            torch.from_numpy(tokens.values.astype(np.int64)),
            torch.from_numpy(embeddings),
            torch.from_numpy(tokens.offsets[:-1]),
            mode="sum",
            per_sample_weights=torch.from_numpy(weights[tokens.values]),
        )
        return (bag / torch.from_numpy(np.maximum(tokens.lengths, 1))[:, None]).numpy()

    def plain(texts: list[str]) -> np.ndarray:
        return static.encode(static.tokenizer.encode(texts, TOKENS), BATCH_TOKENS)

    ways: dict[str, tuple[Callable[[list[str]], np.ndarray], list[str]]] = {
        _name(layers, tokens): (lambda texts, part=(layers, tokens): of_part(*part, texts), documents)
        for layers, tokens in PARTS
    }
    ways["queries alone"] = (lambda texts: of_part(None, TOKENS, texts), queries)
    ways["static"] = (plain, documents)
    ways["static, SIF"] = (weighted, documents)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for start in range(0, len(documents), _CHUNK):
        for name, (encode, texts) in ways.items():
            begun = time.process_time()
            parts[name].append(encode(texts[start : start + _CHUNK]))
            seconds[name] += (time.process_time() - begun) * (start >= FITTED_ROWS)
    arrays = {name: np.concatenate(each) for name, each in parts.items()}
    arrays["whole queries"] = arrays["queries alone"]
    return {**arrays, **{f"seconds {name}": np.array(taken) for name, taken in seconds.items()}}


def variants_of(arrays: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, str]]:
    """Return (N, D) vectors to cluster by and the name of the pass that they cost; fitted rows are left out."""
    whole = arrays[_name(None, TOKENS)][:FITTED_ROWS]
    found: dict[str, tuple[np.ndarray, str]] = {}
    for name, vectors in arrays.items():
        shown, rest = vectors[:FITTED_ROWS], vectors[FITTED_ROWS:]
        mean = shown.mean(axis=0)
        if name == "static, SIF":
            first = np.linalg.svd(shown - mean, full_matrices=False)[2][0]
            found[name] = unit(rest - mean - np.outer((rest - mean) @ first, first)), name
        else:
            found[name] = unit(rest), name
            found[f"{name}, centred"] = unit(rest - mean), name
        if name != _name(None, TOKENS):
            scale = np.trace((shown - mean).T @ (shown - mean)) / shown.shape[1]
            moment = (shown - mean).T @ (shown - mean) + RIDGE * scale * np.eye(shown.shape[1])
            map_ = np.linalg.solve(moment, (shown - mean).T @ (whole - whole.mean(axis=0)))
            found[f"{name}, fitted"] = unit((rest - mean) @ map_ + whole.mean(axis=0)), name
    return found


def batches_of(vectors: np.ndarray | None, source: np.ndarray, batch: int, seed: int) -> list[np.ndarray]:
    """Return rows of some batches of one source each, or of one cluster of about four batches."""
    labels = np.zeros(len(source), np.int64)
    for name in np.unique(source) if vectors is not None else []:
        assert vectors is not None
        rows = np.flatnonzero(source == name)
        clusters = round(len(rows) / (CLUSTER_BATCHES * batch))
        if clusters > 1:
            centers = fit(LocalRows.of(vectors[rows], clusters=clusters), FitSettings(clusters, seed=seed)).centers
            labels[rows] = Assigner(centers.centroids)(vectors[rows]).labels.numpy()
    stratify = "source" if vectors is None else "cluster"
    index, row_of = index_labels(labels, source)
    plan = make_plan(
        index,
        BatchesConfig(stratify=stratify, size=batch, seed=seed, clusters_per_batch=None if vectors is None else 1),
    )
    chosen = map(plan.batch, range(plan.steps_per_epoch))
    return [row_of[index.first_row[each.piece] + each.row] for each in chosen]


def hardness(
    queries: np.ndarray, documents: np.ndarray, hashes: list[np.ndarray], batches: list[np.ndarray]
) -> tuple[float, float]:
    """Return the mean highest score of another row's document, and the share of queries where it is above their own."""
    highest, above = [], []
    for rows in batches:
        scores = queries[rows] @ documents[rows].T
        own = np.diagonal(scores).copy()
        for each in hashes:
            scores[each[rows][:, None] == each[rows][None, :]] = -np.inf
        best = scores.max(axis=1)
        known = np.isfinite(best)
        highest.append(best[known])
        above.append((best > own)[known])
    return float(np.concatenate(highest).mean()), float(np.concatenate(above).mean())


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def first_layers(folder: str, layers: int | None, dtype: torch.dtype) -> Encoder:
    """Load an encoder built like BERT with only its first `layers`."""
    encoder = load_encoder(folder, dtype=dtype)
    if layers is not None:
        whole: Any = encoder.backbone.get_submodule("encoder.layer")
        encoder.backbone.set_submodule("encoder.layer", whole[:layers])
        encoder.backbone.config.num_hidden_layers = layers
    drop_padding(encoder, dtype)
    return encoder


def _name(layers: int | None, tokens: int) -> str:
    return f"{'all' if layers is None else layers} layers, {tokens} tokens"


# Of a line, what `emit` takes by its own name.
_NAMED = ("share", "variant")

if __name__ == "__main__":
    main()

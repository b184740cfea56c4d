"""When do clustered batches gain? Batch sizes x cluster sizes on many corpora, held out by document and by query.

    python -m tests.benchmarks.bench_grid FOLDER [--corpora code,japanese-by-query] [--sizes 32,256] [--arms source,...]
    python -m tests.benchmarks.bench_grid FOLDER --layers 2 --rates 5e-5 --steps 100 ...     # a transformer
    python -m tests.benchmarks.bench_grid FOLDER --report    # Markdown tables of what is finished; trains nothing

Corpora of CLUSTERBATCH_DATA, at most about 12,000 pairs of each. The model is small, so that one core trains a run in
seconds: the first 128 principal components of MiniLM's token vectors, averaged (static_trainer). Its untrained vectors
also cluster the documents and mask (those of Japanese: character n-grams); arms that end in `@minilm` take MiniLM's own
vectors, and MiniLM is the teacher of masks (grid_masks). Hold-out, tokens, clusters, batch plans, masks and statistics
are those of the package.

FOLDER/runs.jsonl has a line for each run, {corpus, batch, arm, seed, scores (NDCG@10 of each query), ...}. What is
there is not run again: an interrupted study continues with the same command. JSON lines: of every cell with `source`
beside it the gain over it, with its interval (of this cell alone).
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from clusterbatch.batches.curriculum import make_plan
from clusterbatch.batches.samplers import index_labels
from clusterbatch.clustering.assign import Assigner
from clusterbatch.clustering.kmeans import FitSettings, fit
from clusterbatch.clustering.packing_order import packing_order
from clusterbatch.clustering.partial_sums import LocalRows
from clusterbatch.config import BatchesConfig, TrainConfig
from clusterbatch.corpus.holdout import choose, sketch, sketched
from clusterbatch.corpus.normalise import text_hashes
from clusterbatch.embedding.char_ngrams import NgramSurrogate
from clusterbatch.encoder.load import drop_padding, load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.experiments.compare.hardness import spaced
from clusterbatch.shards.index import LAYERS
from clusterbatch.training.collectives import World
from clusterbatch.training.prepare_model import finish
from clusterbatch.training.step import TrainingStep
from tests.benchmarks.figures import emit
from tests.benchmarks.grid_masks import MASKS, RowFacts, kept_of_batches
from tests.benchmarks.grid_report import cells, finished, report
from tests.benchmarks.static_trainer import Corpus, Mask, Pairs, encode, rates_of, train
from tests.data_folder import require_data_folder
from tests.training.batches import plain_batch

# Files of the data folder, and what is held out.
CORPORA = {
    "code": (["pairs/codepairs.parquet"], "document"),
    "medquad": (["pairs/medquad.parquet"], "document"),
    "questions-by-query": (["eval/squad_dev", "eval/covidqa"], "query"),
    "wordset-by-query": (["pairs/wordset.parquet"], "query"),
    "japanese-by-query": (["pairs_ja.parquet"], "query"),
    "mitre": (["pairs/mitre.parquet"], "document"),
    "proposals": (["pairs/proposals.parquet"], "document"),
    "msdocs": (["pairs/msdocs.parquet"], "document"),
    "factbook": (["pairs/factbook.parquet"], "document"),
    "mixture": (["pairs"], "document"),
    "questions": (["eval/squad_dev", "eval/covidqa"], "document"),
    "japanese": (["pairs_ja.parquet"], "document"),
    "wordset": (["pairs/wordset.parquet"], "document"),
    "tldr": (["pairs/tldr.parquet"], "document"),
    "msdocs-by-query": (["pairs/msdocs.parquet"], "query"),
}
# Learning rates are chosen on these, which are not part of the map.
TUNING = {name: ([f"pairs/{name}.parquet"], "document") for name in ("movies", "gsm8k", "awsdocs")}
# Of .001, .002, .004 and .008 the best lay between .002 and .004 at 32 pairs, and at .008 at 256, for batches of
# sources and of clusters alike.
RATES = {batch: 0.003 * (batch / 32) ** 0.5 for batch in (16, 32, 64, 128, 256)}
# Masks that the package does not have, by the surrogate. uncopied: documents near the query's own; skip: the four that
# score highest.
OTHER_MASKS = {"uncopied": Mask(copies=0.9), "skip": Mask(nearest=4)}
# Others: clusters of other sizes (cluster-16x), random-groups-4x, super-4x, diverse, each with a mask (source-masked).
ARMS = ["source", "cluster-4x", "cluster-4x-half", "random"]
EPOCHS, SEEDS = 2, 3
_PAIRS, _QUERIES, _TOKENS, _DIMENSIONS = 12_000, 1500, 64, 128
# Documents that a transformer searches, the relevant ones among them: embedding all of them would take longest.
_SEARCHED = 4000


@cache
def static_model(folder: Path) -> Encoder:
    """Write the static model of the study, unless it is there; load it."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_model(load_encoder(resolve_model("all-MiniLM-L6-v2"), "static"), folder)
        vectors = load_file(weights)["embedding.weight"]
        vectors -= vectors.mean(dim=0)
        _, _, directions = torch.linalg.svd(vectors.T @ vectors)
        save_file({"embedding.weight": (vectors @ directions[:_DIMENSIONS].T).contiguous()}, weights)
    return load_encoder(folder, "static")


def first_layers(folder: Path, layers: int) -> str:
    """Write MiniLM without its later layers, unless it is there; return its folder."""
    model = folder / f"minilm-{layers}"
    if not model.exists():
        shutil.copytree(resolve_model("all-MiniLM-L6-v2"), model, symlinks=False)
        described = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**described, "num_hidden_layers": layers}))
        weights = load_file(model / "model.safetensors")
        later = tuple(f"encoder.layer.{number}." for number in range(layers, described["num_hidden_layers"]))
        kept = {name: each.contiguous() for name, each in weights.items() if not name.startswith(later)}
        (model / "model.safetensors").unlink()
        save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    return str(model)


def read_pairs(path: Path) -> pa.Table:
    """Return (query, document, source) of a file, of all files of a folder or of a BEIR collection."""
    columns = ["query", "document", "source"]
    if path.is_file():
        return pq.read_table(path, columns=columns)
    if not (path / "corpus.jsonl").exists():
        return pa.concat_tables([pq.read_table(each, columns=columns) for each in sorted(path.glob("*.parquet"))])
    texts = {}
    for name in ("corpus", "queries"):
        lines = map(json.loads, (path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        texts[name] = {line["_id"]: f"{line.get('title') or ''} {line['text']}".strip() for line in lines}
    judged = [line.split("\t") for line in (path / "qrels/test.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    found = [(query, document) for query, document, grade in judged if int(grade) > 0]
    queries, documents = (
        [texts[kind][pair[side]] for pair in found] for side, kind in enumerate(("queries", "corpus"))
    )
    return pa.table([queries, documents, [path.name] * len(found)], names=columns)


def read_corpus(folder: Path, name: str) -> Corpus:
    """Read a corpus, hold queries out and tokenise."""
    paths, by = {**CORPORA, **TUNING}[name]
    table = pa.concat_tables([read_pairs(require_data_folder() / path) for path in paths])
    for side in ("query", "document"):
        table = table.append_column(f"{side}_hash", pa.array(text_hashes(table[side].to_pylist(), len(table))))
    # The first of equal pairs; all pairs of each drawn document. A salt: the hold-out draws by the hash itself.
    keys = np.stack([table[f"{side}_hash"].to_numpy() for side in ("query", "document")])
    first = np.sort(np.unique(keys, axis=1, return_index=True)[1])
    drawn = (keys[1][first] * np.uint64(0x9E3779B97F4A7C15)) / 2.0**64 < _PAIRS / len(first)
    table = table.take(pa.array(first[drawn]))
    held_out = choose([sketch(table, sketched(_QUERIES, by))], _QUERIES, by)
    mask, judged = held_out.mask(table), held_out.judged(table)
    encoder = static_model(folder / "static")

    def tokens(texts: list[str]) -> Any:
        return encoder.tokenizer.encode(texts, _TOKENS)

    hashes = table["document_hash"].to_numpy()
    distinct, place = np.unique(hashes, return_index=True)
    tested = table.filter(pa.array(judged))
    query_hashes, query_place = np.unique(tested["query_hash"].to_numpy(), return_index=True)
    relevant = [
        np.searchsorted(
            distinct, np.unique(tested["document_hash"].to_numpy()[tested["query_hash"].to_numpy() == each])
        )
        for each in query_hashes
    ]
    trained = table.filter(pa.array(~mask))
    query, document = trained["query"].to_pylist(), trained["document"].to_pylist()
    query_tokens, document_tokens = tokens(query), tokens(document)
    if name.startswith("japanese"):
        surrogate = NgramSurrogate.fit(document, _TOKENS)
        vectors = [surrogate.encode(texts, _TOKENS) for texts in (query, document)]
    else:
        weights = _weights(folder)
        vectors = [encode(weights, each) for each in (query_tokens, document_tokens)]
    return Corpus(
        name,
        Pairs(
            query_tokens,
            document_tokens,
            trained["query_hash"].to_numpy(),
            trained["document_hash"].to_numpy(),
            *[np.ascontiguousarray(each, np.float32) for each in vectors],
        ),
        np.array(trained["source"].to_pylist()),
        document,
        tokens(tested["query"].take(pa.array(query_place)).to_pylist()),
        tokens(table["document"].take(pa.array(place)).to_pylist()),
        relevant,
    )


@cache
def _weights(folder: Path) -> np.ndarray:
    return load_file(folder / "static/model.safetensors")["embedding.weight"].numpy()


def clusters_of(corpus: Corpus, vectors: np.ndarray, size: int) -> np.ndarray:
    """Return (N,) cluster numbers, inside each source in packing order; vectors: (N, M), what is clustered."""
    labels = np.zeros(len(vectors), np.int64)
    for source in np.unique(corpus.source):
        rows = np.flatnonzero(corpus.source == source)
        clusters = round(len(rows) / size)
        if clusters < 2:
            continue
        shuffled = np.random.default_rng(0).permutation(rows)
        centroids = fit(LocalRows.of(vectors[shuffled], clusters=clusters), FitSettings(clusters)).centers.centroids
        own = Assigner(centroids)(vectors[rows]).labels.numpy()
        weights = np.bincount(own, minlength=len(centroids))
        place = np.argsort(packing_order(centroids, weights.astype(np.float64)))
        labels[rows] = place[own]
    return labels


class Study:
    """Batches, training and measurement of one corpus; clusters of each size are fitted once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        kept = folder / f"read/{name}.pickle"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(pickle.dumps(read_corpus(folder, name)))
        self.corpus: Corpus = pickle.loads(kept.read_bytes())
        self._labels: dict[tuple[int, str], np.ndarray] = {}
        self._facts = RowFacts(self.corpus, self.folder / "teacher", lambda size: self.labels(size, "own"))

    def labels(self, size: int, vectors: str) -> np.ndarray:
        if (size, vectors) not in self._labels:
            own = self.corpus.pairs.document_vector if vectors == "own" else self._minilm()
            self._labels[size, vectors] = clusters_of(self.corpus, own, size)
        return self._labels[size, vectors]

    def batches(self, arm: str, batch: int, seed: int, most: int | None = None) -> np.ndarray | None:
        """Return (steps, B) rows of the run, or of `most` steps of it; None if the corpus has no such arm.

        STRATEGY[-TIMESx][-half][-MASK][@minilm]; times: batches that a cluster holds, rows of super-batches.
        """
        name, _, vectors = arm.partition("@")
        base, half, _ = name.partition("-half")
        base = base.removesuffix(f"-{_mask_name(name)}")
        strategy, _, times = base.rpartition("-")
        if not times.endswith("x"):
            strategy, times = base, "4x"
        size, source = int(times[:-1]) * batch, self.corpus.source
        sources = len(np.unique(source))
        if strategy == "random" and sources == 1:
            return None
        if strategy == "super":
            return self._packed_batches(size, batch, seed)
        if strategy == "diverse":
            return self._diverse_batches(batch, seed)
        clustered = strategy in ("cluster", "random-groups")
        if clustered and 2 * size > len(source) / sources:
            return None
        labels = self.labels(size, vectors or "own") if clustered else np.zeros(len(source), np.int64)
        layer = self._facts.duplicates(size)[1] if _mask_name(name) == "apart" else None
        return self._planned(strategy.replace("-", "_"), batch, seed, labels, 0.5 if half else 0.0, most, layer)

    def _planned(
        self,
        stratify: str,
        batch: int,
        seed: int,
        labels: np.ndarray,
        random_share: float = 0,
        most: int | None = None,
        layer: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return (steps, B) rows of the batches of clusterbatch.batches; layer: (N,) int64, those of ClusterIndex."""
        clusters = None if stratify in ("random", "source") else 1
        config = BatchesConfig(
            stratify=stratify, size=batch, seed=seed, clusters_per_batch=clusters, random_share=random_share
        )
        index, row_of = index_labels(labels if layer is None else labels * LAYERS + layer, self.corpus.source)
        if layer is not None:
            labels, layer = labels[row_of[index.first_row]], layer[row_of[index.first_row]]
            index = replace(index, cluster=labels.astype(np.int32), layer=layer.astype(np.int8))
        plan = make_plan(index, config)
        steps = plan.steps_of(EPOCHS)
        planned = map(plan.batch, range(steps) if most is None else spaced(steps, most))
        return np.array([row_of[index.first_row[found.piece] + found.row] for found in planned])

    def _packed_batches(self, rows: int, batch: int, seed: int) -> np.ndarray:
        """Return batches of near neighbours inside random super-batches of `rows` rows of a source.

        The first row that is left is joined by those whose query and document score highest with its own, crosswise.
        """
        pairs, found = self.corpus.pairs, []
        for super_batch in self._planned("source", rows, seed, np.zeros(len(self.corpus.source), np.int64)):
            scores = pairs.query_vector[super_batch] @ pairs.document_vector[super_batch].T
            scores, left = scores + scores.T, np.ones(rows, bool)
            while left.any():
                first = int(np.argmax(left))
                near = np.where(left, scores[first], -np.inf)
                near[first] = np.inf
                chosen = np.argsort(-near, kind="stable")[:batch]
                left[chosen] = False
                found.append(super_batch[chosen])
        # Batches of one super-batch come one after the other, as they would in a stream.
        return np.array(found)

    def _diverse_batches(self, batch: int, seed: int) -> np.ndarray:
        """Return batches of a source that take from each of its clusters its share, of as many clusters as rows."""
        source, found = self.corpus.source, []
        random = np.random.default_rng(seed)
        for _ in range(EPOCHS):
            of_epoch = []
            for name in np.unique(source):
                rows = np.flatnonzero(source == name)
                labels = self.labels(max(2, round(len(rows) / batch)), "own")[rows]
                rows = rows[np.lexsort((random.random(len(rows)), labels))]
                batches = len(rows) // batch
                starts = random.integers(0, max(1, len(rows) - batches * batch + 1))
                of_epoch += [rows[starts : starts + batches * batch][number::batches] for number in range(batches)]
            found += [of_epoch[number] for number in random.permutation(len(of_epoch))]
        return np.array(found)

    def run(self, arm: str, batch: int, seed: int, rate: float) -> dict[str, Any] | None:
        """Train and measure; None if there is no such arm on this corpus."""
        batches = self.batches(arm, batch, seed)
        if batches is None:
            return None
        mask, pairs, kept, share = _mask_name(arm.partition("@")[0]), self.corpus.pairs, None, 0.0
        if mask in MASKS:
            kept, share = kept_of_batches(pairs, batches, MASKS[mask], self._facts.known(mask, 4 * batch))
        begun, rates, other = time.process_time(), rates_of(rate, len(batches)), OTHER_MASKS.get(mask)
        table, losses = train(_weights(self.folder), pairs, batches, rates, mask=other, kept=kept)
        seconds = time.process_time() - begun
        return {
            "steps": len(batches),
            "masked": round(share, 6),
            "hardness": _hardness(pairs, batches),
            "loss": float(losses[-max(1, len(losses) // 10) :].mean()),
            "seconds": round(seconds, 3),
            "scores": [round(each, 4) for each in self.scores(table).tolist()],
        }

    def run_backbone(
        self, arm: str, batch: int, seed: int, rate: float, layers: int, steps: int
    ) -> dict[str, Any] | None:
        """Train the first layers of MiniLM with clusterbatch.training, and measure; no steps: the untrained model."""
        encoder = load_encoder(first_layers(self.folder, layers), "backbone")

        def tokens(of: Tokens, rows: np.ndarray | None = None) -> Tokens:
            rows = np.arange(len(of)) if rows is None else rows
            return encoder.tokenizer.surrounded([of[row].tolist() for row in rows.tolist()])

        corpus, pairs = self.corpus, self.corpus.pairs
        batches = self.batches(arm, batch, seed)
        if batches is None:
            return None
        begun, losses = time.process_time(), []
        if steps:
            training = TrainingStep(
                encoder, TrainConfig(encoder="backbone", learning_rate=rate, dropout=0.0, seed=seed), steps, World()
            )
            for step, rows in enumerate(batches[:steps]):
                plain = plain_batch(step, tokens(pairs.query, rows), tokens(pairs.document, rows))
                hashes = {f"{side}_hash": getattr(pairs, f"{side}_hash")[rows] for side in ("query", "document")}
                losses.append(training.run(replace(plain, **hashes)).loss)
            finish(encoder)
        seconds = time.process_time() - begun
        drop_padding(encoder, torch.float32)
        relevant = np.unique(np.concatenate(corpus.relevant))
        others = np.setdiff1d(np.arange(len(corpus.documents)), relevant)
        drawn = np.random.default_rng(0).permutation(others)[: max(0, _SEARCHED - len(relevant))]
        searched = np.sort(np.concatenate([relevant, drawn]))
        queries = encoder.encode(tokens(corpus.queries), 4096)
        documents = np.zeros((len(corpus.documents), queries.shape[1]), np.float32)
        documents[searched] = encoder.encode(tokens(corpus.documents, searched), 4096)
        # The others score below any that were searched.
        queries = np.hstack([queries, np.ones((len(queries), 1), np.float32)])
        absent = np.full((len(documents), 1), -2, np.float32)
        absent[searched] = 0
        documents = np.hstack([documents, absent])
        return {
            "steps": len(losses),
            "hardness": _hardness(pairs, batches),
            "loss": float(np.mean(losses[-20:])) if losses else None,
            "seconds": round(seconds, 1),
            "scores": [round(each, 4) for each in self.ndcg(queries, documents).tolist()],
        }

    def scores(self, table: np.ndarray) -> np.ndarray:
        """Return NDCG@10 of each held-out query, (Q,), by averaged token embeddings."""
        return self.ndcg(encode(table, self.corpus.queries), encode(table, self.corpus.documents))

    def ndcg(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return NDCG@10 of each held-out query, (Q,); unit vectors of the queries and of the documents to search."""
        corpus = self.corpus
        similar = torch.from_numpy(queries) @ torch.from_numpy(documents).T
        best = similar.topk(10, dim=1).indices.numpy()
        discount = 1 / np.log2(np.arange(10) + 2)
        found = [np.isin(row, own) @ discount for row, own in zip(best, corpus.relevant, strict=True)]
        ideal = [discount[: len(own)].sum() for own in corpus.relevant]
        return np.array(found) / np.array(ideal)

    def _minilm(self) -> np.ndarray:
        kept = self.folder / f"minilm/{self.corpus.name}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            encoder = load_encoder(resolve_model("all-MiniLM-L6-v2"), "backbone")
            np.save(kept, encoder.encode(encoder.tokenizer.encode(self.corpus.texts, _TOKENS), 2048).astype(np.float16))
        return np.load(kept).astype(np.float32)


def _mask_name(arm: str) -> str:
    """Return the name of the arm's mask, or nothing."""
    last = arm.rpartition("-")[2]
    return last if last in MASKS or last in OTHER_MASKS else ""


def _hardness(pairs: Pairs, batches: np.ndarray) -> float:
    """Return the mean over queries of the highest surrogate's score of another row's document, of eight batches."""
    found = []
    for rows in batches[np.linspace(0, len(batches) - 1, 8).astype(int)]:
        scores = pairs.query_vector[rows] @ pairs.document_vector[rows].T
        for hashes in (pairs.query_hash, pairs.document_hash):
            scores[hashes[rows][:, None] == hashes[rows][None, :]] = -np.inf
        highest = scores.max(1)
        found.append(highest[np.isfinite(highest)])
    return float(np.mean(np.concatenate(found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--sizes", default="32,256,64,16,128")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--layers", type=int, help="train these first layers of MiniLM instead of the static model")
    parser.add_argument("--steps", type=int, default=200, help="of a run with --layers; 0 measures the untrained model")
    parser.add_argument("--rates", default="", help="learning rates to try instead of those that were chosen")
    parser.add_argument("--report", action="store_true", help="print tables of the finished runs and train nothing")
    options = parser.parse_args()
    folder = options.folder.resolve()
    corpora, arms = options.corpora.split(","), options.arms.split(",")
    sizes = [int(size) for size in options.sizes.split(",")]
    rates = [float(rate) for rate in options.rates.split(",") if rate]
    if options.report:
        try:
            print(report(folder, corpora, sizes, arms, rates))
        except ValueError as error:
            parser.error(str(error))
        return
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    done = {(run["corpus"], run["batch"], run["arm"], run["seed"], run["rate"]) for run in finished(folder)}
    study_of = cache(lambda corpus: Study(folder, corpus))
    with (folder / "runs.jsonl").open("a") as file:
        for batch, corpus, arm in product(sizes, corpora, arms):
            for rate, seed in product(rates or [RATES[batch]], range(options.seeds)):
                if (corpus, batch, arm, seed, rate) in done:
                    continue
                study = study_of(corpus)
                if options.layers is None:
                    found = study.run(arm, batch, seed, rate)
                else:
                    found = study.run_backbone(arm, batch, seed, rate, options.layers, options.steps)
                if found is None:
                    break
                key = {"corpus": corpus, "batch": batch, "arm": arm, "seed": seed, "rate": rate}
                file.write(json.dumps({**key, **found}) + "\n")
                file.flush()
    for cell in cells(folder):
        low, high = cell.interval or (None, None)
        details = {name: getattr(cell, name) for name in ("rate", "seeds", "queries", "mean", "source")}
        case = f"{cell.corpus}, batch {cell.batch}, {cell.arm}"
        emit("grid, gain over source", cell.gain.mean, "NDCG@10", case=case, low=low, high=high, **details)


if __name__ == "__main__":
    main()

"""When do clustered batches gain? Batch sizes x cluster sizes on many corpora, held out by document and by query.

    python -m tests.benchmarks.bench_grid FOLDER [--corpora code,japanese-by-query] [--sizes 32,256] [--arms source,...]
    python -m tests.benchmarks.bench_grid FOLDER --layers 2 --rates 3e-4 --pairs 6400 ...    # a transformer; own FOLDER
    python -m tests.benchmarks.bench_grid FOLDER --report    # Markdown tables of what is finished; trains nothing
    python -m tests.benchmarks.bench_grid FOLDER --picture FILE.svg    # gains by batch and by cluster size; the same
                                                                    # (of corpora NAME:N: by pairs trained on)

Corpora of CLUSTERBATCH_DATA, at most about 12,000 pairs of each; of `tldr:3000` all are searched and 3,000 trained on,
of `tldr:all` all but those held out. The model is small, so that one core trains a run in seconds: the first 128
principal components of MiniLM's token vectors, averaged (static_trainer). Its untrained vectors also cluster the
documents, divide super-batches and mask (those of Japanese: character n-grams). Arms that end in `@minilm` take
MiniLM's own vectors, in `@queries` the queries', in `@trained` (super-batches) those of a model that batches of sources
have trained, in `@live` for the second half those of the model after the first. MiniLM is the teacher of masks
(grid_masks). Hold-out, tokens, clusters, batch plans, masks and statistics are those of the package.

FOLDER/runs.jsonl has a line for each run, {corpus, batch, arm, seed, scores (NDCG@10 of each query), ...}. What is
there is not run again: an interrupted study continues with the same command. JSON lines: of every cell with `source`
beside it the gain over it, with its interval (of this cell alone).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clusterbatch.config import MaskConfig, TrainConfig
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.load import drop_padding, load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training.collectives import World
from clusterbatch.training.prepare_model import finish
from clusterbatch.training.step import TrainingStep
from tests.benchmarks.figures import emit
from tests.benchmarks.grid_arms import OTHER_MASKS, Arms, Sides, hardness, mask_of
from tests.benchmarks.grid_corpora import CORPORA, first_layers, untrained_vectors
from tests.benchmarks.grid_masks import MASKS, kept_of_batches
from tests.benchmarks.grid_picture import picture
from tests.benchmarks.grid_report import BASELINE, cells, finished, report
from tests.benchmarks.grid_size_picture import size_picture
from tests.benchmarks.static_trainer import Mask, encode, rates_of, train
from tests.training.batches import plain_batch

# Of .001, .002, .004 and .008 the best lay between .002 and .004 at 32 pairs, and at .008 at 256, for batches of
# sources and of clusters alike.
RATES = {batch: 0.003 * (batch / 32) ** 0.5 for batch in (16, 32, 64, 128, 256, 512, 1024)}
# Others: clusters of other sizes (cluster-16x), random-groups-4x, super-4x, diverse, each with a mask (source-masked).
ARMS = ["source", "cluster-4x", "cluster-4x-half", "random"]
SEEDS = 3
# Documents that a transformer searches, the relevant ones among them: embedding all of them would take longest.
_SEARCHED = 4000
# Of the model whose vectors divide super-batches in arms that end in `@trained`.
_OTHER_SEED = 1000
# Pairs that a transformer trains on.
_PAIRS = 6400


class Study:
    """Training and measurement on one corpus."""

    def __init__(self, folder: Path, name: str, temperature: float) -> None:
        self.folder, self.arms, self.temperature = folder, Arms(folder, name), temperature
        self.corpus = self.arms.corpus

    def run(self, arm: str, batch: int, seed: int, rate: float, steps: int | None = None) -> dict[str, Any] | None:
        """Train and measure; None if there is no such arm on this corpus. steps: the first of the run; None: all."""
        batches = self._batches(arm, batch, seed, rate, None, steps)
        if batches is None:
            return None
        mask, pairs, kept, share = mask_of(arm), self.corpus.pairs, None, 0.0
        if mask in MASKS:
            kept, share = kept_of_batches(pairs, batches, MASKS[mask], self.arms.facts.known(mask, 4 * batch))
        begun = time.process_time()
        table, losses = self._train_static(batches, len(batches), rate, OTHER_MASKS.get(mask), kept)
        seconds = time.process_time() - begun
        return {
            "steps": len(batches),
            "masked": round(share, 6),
            "hardness": hardness(pairs, batches),
            "loss": float(losses[-max(1, len(losses) // 10) :].mean()),
            "seconds": round(seconds, 3),
            "scores": [round(each, 4) for each in self.scores(table).tolist()],
        }

    def run_backbone(
        self, arm: str, batch: int, seed: int, rate: float, layers: int, steps: int
    ) -> dict[str, Any] | None:
        """Train the first layers of MiniLM with clusterbatch.training, and measure; no steps: the untrained model."""
        batches = self._batches(arm, batch, seed, rate, layers, steps)
        if batches is None:
            return None
        begun, near = time.process_time(), None
        if mask_of(arm) == "masked":
            near = self.arms.near(arm.partition("@")[2], partial(self._trained, batch, rate, layers, steps))
        encoder, losses = self._train_backbone(batches, len(batches), rate, layers, seed, near)
        seconds = time.process_time() - begun
        drop_padding(encoder, inference_dtype("auto", torch.device("cpu")))
        return {
            "steps": len(losses),
            "hardness": hardness(self.corpus.pairs, batches) if losses else None,
            "loss": float(np.mean(losses[-20:])) if losses else None,
            "seconds": round(seconds, 1),
            "scores": [round(each, 4) for each in self.scores_of_some(encoder).tolist()],
        }

    def _batches(
        self, arm: str, batch: int, seed: int, rate: float, layers: int | None, steps: int | None
    ) -> np.ndarray | None:
        """Return (steps, B) rows of a run; None if there is no such arm on this corpus."""
        name, _, vectors = arm.partition("@")
        if vectors != "live":
            trained = partial(self._trained, batch, rate, layers, steps)
            found = self.arms.batches(arm, batch, seed, trained=trained)
            return None if found is None else found[:steps]
        first = self.arms.batches(name, batch, seed)
        if first is None:
            return None
        first = first[:steps]
        half = len(first) // 2
        # As rounds of `refresh` do: the model that has seen one half divides the other.
        live = partial(self._vectors, first[:half], len(first), rate, layers, seed)
        second = self.arms.batches(f"{name}@trained", batch, seed, trained=live)
        assert second is not None
        return np.concatenate([first[:half], second[half : len(first)]])

    def _trained(self, batch: int, rate: float, layers: int | None, steps: int | None) -> Sides:
        """Return vectors of all pairs by the model trained on batches of sources, by a seed that no run has."""
        kept = self.folder / f"trained/{self.corpus.name}-{batch}-{rate:g}.npz"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            batches = self.arms.batches(BASELINE, batch, _OTHER_SEED)
            assert batches is not None
            batches = batches[:steps]
            queries, documents = self._vectors(batches, len(batches), rate, layers, _OTHER_SEED)
            np.savez(kept, query=queries.astype(np.float16), document=documents.astype(np.float16))
        found = np.load(kept)
        return found["query"].astype(np.float32), found["document"].astype(np.float32)

    def _vectors(self, batches: np.ndarray, steps: int, rate: float, layers: int | None, seed: int) -> Sides:
        """Return vectors of all pairs by the model after these batches, the first of a run of so many steps."""
        sides = self.corpus.pairs.query, self.corpus.pairs.document
        if layers is None:
            table, _ = self._train_static(batches, steps, rate)
            return encode(table, sides[0]), encode(table, sides[1])
        encoder, _ = self._train_backbone(batches, steps, rate, layers, seed)
        drop_padding(encoder, inference_dtype("auto", torch.device("cpu")))
        queries, documents = (encoder.encode(_surrounded(encoder, of, np.arange(len(of))), 4096) for of in sides)
        return queries, documents

    def _train_static(
        self,
        batches: np.ndarray,
        steps: int,
        rate: float,
        mask: Mask | None = None,
        kept: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (V, D) token embeddings and the losses of these batches, the first of a run of so many steps."""
        table, rates = untrained_vectors(self.folder), rates_of(rate, steps)[: len(batches)]
        return train(table, self.corpus.pairs, batches, rates, temperature=self.temperature, mask=mask, kept=kept)

    def _train_backbone(
        self, batches: np.ndarray, steps: int, rate: float, layers: int, seed: int, near: Sides | None = None
    ) -> tuple[Encoder, list[float]]:
        """Return the trained encoder, which still pads, and the losses; the same of a transformer.

        near: vectors of all pairs that mask documents that they score near or above the query's own.
        """
        encoder = load_encoder(first_layers(self.folder, layers), "backbone")
        pairs, losses = self.corpus.pairs, []
        if len(batches):
            config = TrainConfig(
                encoder="backbone",
                learning_rate=rate,
                dropout=0.0,
                seed=seed,
                temperature=self.temperature,
                mask=MaskConfig() if near is None else MASKS["masked"],
            )
            training = TrainingStep(encoder, config, steps, World())
            for step, rows in enumerate(batches):
                texts = (_surrounded(encoder, of, rows) for of in (pairs.query, pairs.document))
                facts = {f"{side}_hash": getattr(pairs, f"{side}_hash")[rows] for side in ("query", "document")}
                if near is not None:
                    facts |= {"query_vector": near[0][rows], "document_vector": near[1][rows]}
                losses.append(training.run(replace(plain_batch(step, *texts), **facts)).loss)
            finish(encoder)
        return encoder, losses

    def scores_of_some(self, encoder: Encoder) -> np.ndarray:
        """Return NDCG@10 of each held-out query, (Q,), among the relevant documents and some others."""
        corpus = self.corpus
        relevant = np.unique(np.concatenate(corpus.relevant))
        others = np.setdiff1d(np.arange(len(corpus.documents)), relevant)
        drawn = np.random.default_rng(0).permutation(others)[: max(0, _SEARCHED - len(relevant))]
        searched = np.sort(np.concatenate([relevant, drawn]))
        sides = (corpus.queries, np.arange(len(corpus.queries))), (corpus.documents, searched)
        queries, found = (encoder.encode(_surrounded(encoder, *side), 4096) for side in sides)
        # One more dimension, in which documents that are not searched score below all others.
        documents = np.zeros((len(corpus.documents), queries.shape[1] + 1), np.float32)
        documents[:, -1] = -2
        documents[searched] = np.pad(found, ((0, 0), (0, 1)))
        return self.ndcg(np.pad(queries, ((0, 0), (0, 1)), constant_values=1), documents)

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


def _surrounded(encoder: Encoder, of: Tokens, rows: np.ndarray) -> Tokens:
    """Return those rows with the special tokens that a transformer expects."""
    return encoder.tokenizer.surrounded([of[row].tolist() for row in rows.tolist()])


def differing_settings(folder: Path, settings: dict[str, Any]) -> str:
    """Return what finished runs have otherwise, or nothing; runs recorded without a setting may have any."""
    found = [(name, run.get(name, settings[name])) for run in finished(folder) for name in settings]
    return ", ".join(sorted({f"{name} {value}" for name, value in found if value != settings[name]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--sizes", default="32,256,64,16,128")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--layers", type=int, help="train these first layers of MiniLM instead of the static model")
    parser.add_argument("--pairs", type=int, help=f"of a run; unset: two epochs, or {_PAIRS:,} with --layers")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--rates", default="", help="learning rates to try instead of those that were chosen")
    parser.add_argument("--over", default=BASELINE, metavar="ARM", help="that --report compares with, unset: source")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the finished runs and train nothing")
    parser.add_argument("--report", action="store_true", help="print tables of the finished runs and train nothing")
    options = parser.parse_args()
    folder = options.folder.resolve()
    corpora, arms = options.corpora.split(","), options.arms.split(",")
    sizes = [int(size) for size in options.sizes.split(",")]
    rates = [float(rate) for rate in options.rates.split(",") if rate]
    pairs = _PAIRS if options.layers and options.pairs is None else options.pairs
    if options.report or options.picture:
        try:
            if options.report:
                print(report(folder, corpora, sizes, arms, rates, options.over))
            if options.picture:
                draw = size_picture if all(":" in corpus for corpus in corpora) else picture
                options.picture.write_text(draw(folder, corpora, rates))
        except ValueError as error:
            parser.error(str(error))
        return
    if options.layers and (masked := [arm for arm in arms if mask_of(arm) not in ("", "masked")]):
        parser.error(f"--layers: transformers are trained without these masks: {', '.join(masked)}")
    settings = {"layers": options.layers, "pairs": pairs, "temperature": options.temperature}
    if differing := differing_settings(folder, settings):
        parser.error(f"{folder} has runs with {differing}: give this study a folder of its own")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    done = {(run["corpus"], run["batch"], run["arm"], run["seed"], run["rate"]) for run in finished(folder)}
    study_of = cache(lambda corpus: Study(folder, corpus, options.temperature))
    with (folder / "runs.jsonl").open("a") as file:
        # Seeds before arms: a study that is cut off has arms with the same seeds.
        for batch, corpus, rate, seed, arm in product(sizes, corpora, rates or [None], range(options.seeds), arms):
            key = {"corpus": corpus, "batch": batch, "arm": arm, "seed": seed, "rate": rate or RATES[batch]}
            if tuple(key.values()) in done:
                continue
            study = study_of(corpus)
            if options.layers is None:
                found = study.run(arm, batch, seed, key["rate"], None if pairs is None else pairs // batch)
            else:
                found = study.run_backbone(arm, batch, seed, key["rate"], options.layers, pairs // batch)
            if found is not None:
                file.write(json.dumps({**key, **settings, **found}) + "\n")
                file.flush()
    for cell in cells(folder):
        low, high = cell.interval or (None, None)
        details = {name: getattr(cell, name) for name in ("rate", "seeds", "queries", "mean", "source")}
        case = f"{cell.corpus}, batch {cell.batch}, {cell.arm}"
        emit("grid, gain over source", cell.gain.mean, "NDCG@10", case=case, low=low, high=high, **details)


if __name__ == "__main__":
    main()

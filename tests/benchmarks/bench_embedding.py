"""Embedding, rows per second: this encoder against SentenceTransformer.encode, the whole stage against the encoder.

    python -m tests.benchmarks.bench_embedding encoder [--documents 4000] [--rounds 4]
    python -m tests.benchmarks.bench_embedding stage   [--pairs 20000]
    python -m tests.benchmarks.bench_embedding memory  [--pairs 20000]

Real texts (CLUSTERBATCH_DATA), all-MiniLM-L6-v2, 256 tokens. encoder: one process, all cores; each round takes a share
of the documents through all in turn: this encoder, the peer at its defaults, and at the best batch size of a sweep; on
CPUs with VNNI also this encoder with 8-bit integers.
stage: reading, tokenising, embedding and writing with two workers of one thread each, Ray's start apart, against the
encoder alone with two threads on every third unit of the corpus, half of them before the stage and half after it.
memory: the stage at a tenth of the pairs and at all, in processes of their own, the object store's size fixed. One JSON
line per figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clusterbatch.config import EmbedConfig, RayConfig, RunConfig
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.embedder import Preparer
from clusterbatch.embedding.stage import embed
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.runtime import ray_session
from clusterbatch.store.workspace import Workspace
from tests.benchmarks.figures import emit
from tests.benchmarks.flops import encoder_flops, product_flops
from tests.benchmarks.memory import PeakMemory
from tests.data_folder import require_data_folder
from tests.encoder.corpora import commit_corpus, corpus_table

MODEL, MAX_TOKENS = "all-MiniLM-L6-v2", 256
BATCH_SIZES = (4, 8, 16, 32, 64, 128)
SWEEP_DOCUMENTS = 256
# The encoder alone sees every third unit: with rows in random order that is enough for its rate.
ALONE_UNITS = 3
STORE_BYTES = 200 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=["encoder", "stage", "memory", "one"])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--workspace", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.figure == "encoder":
        encoder_against_peer(options.documents, options.rounds)
    elif options.figure == "stage":
        stage_against_encoder(options.pairs)
    elif options.figure == "memory":
        memory_at_ten_times_the_rows(options.pairs)
    else:
        print(json.dumps(embed_and_watch(options.workspace)))


def encoder_against_peer(documents: int, rounds: int) -> None:
    from sentence_transformers import SentenceTransformer

    texts = real_pairs(documents)["document"].to_pylist()
    folder = resolve_model(MODEL)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(folder, dtype=inference_dtype("auto", device), device=device, packed=True)
    peer = SentenceTransformer(folder, device=str(device))
    peer.max_seq_length = MAX_TOKENS
    budget = EmbedConfig().batch_tokens

    def ours(encoder: Encoder, texts: list[str]) -> np.ndarray:
        return encoder.encode(encoder.tokenizer.encode(texts, MAX_TOKENS), budget)

    sample = texts[:SWEEP_DOCUMENTS]
    sweep = {size: seconds(partial(peer.encode, sample, batch_size=size))[0] for size in BATCH_SIZES}
    best = min(sweep, key=sweep.__getitem__)
    runs: dict[str, Callable[[list[str]], np.ndarray]] = {
        "ours": partial(ours, encoder),
        "peer, defaults": peer.encode,
        "peer, best batch size": partial(peer.encode, batch_size=best),
    }
    if device.type == "cpu" and torch.cpu._is_vnni_supported():
        runs["ours, int8"] = partial(ours, load_encoder(folder, dtype=torch.int8))
    times: dict[str, list[float]] = {name: [] for name in runs}
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in runs if name.startswith("ours")}
    pieces = [texts[number::rounds] for number in range(rounds)]
    for piece in pieces:
        vectors: dict[str, np.ndarray] = {}
        for name, run in runs.items():
            taken, vectors[name] = seconds(partial(run, piece))
            times[name].append(taken)
        for name, of_pieces in cosines.items():
            of_pieces.append((vectors[name] * vectors["peer, defaults"]).sum(axis=1))
    rates = {name: round(documents / sum(taken), 1) for name, taken in times.items()}
    rounds_of = {
        name: [round(len(piece) / each, 1) for piece, each in zip(pieces, taken, strict=True)]
        for name, taken in times.items()
    }
    figure, mine = "embedding, rows/s against SentenceTransformer.encode at its", rates["ours"]
    emit(f"{figure} defaults", mine, "rows/s", peer=rates["peer, defaults"], rows=documents, rounds=rounds_of)
    emit(f"{figure} best batch size", mine, "rows/s", peer=rates["peer, best batch size"], batch_size=best)
    least = float(np.concatenate(cosines["ours"]).min())
    emit("embedding, least cosine to SentenceTransformer.encode", least, rows=documents)
    if "ours, int8" in runs:
        emit(f"{figure} defaults, int8", rates["ours, int8"], "rows/s", peer=rates["peer, defaults"])
        mean = float(np.concatenate(cosines["ours, int8"]).mean())
        emit("embedding, mean cosine of int8 to SentenceTransformer.encode", mean, rows=documents)
    if device.type == "cpu":
        share_of_the_machine(encoder, texts, rates)


def share_of_the_machine(encoder: Encoder, texts: list[str], rates: dict[str, float]) -> None:
    """What bounds the ratios: arithmetic that has to be done, against the rate of the machine's own product."""
    config: Any = encoder.backbone.config
    dtype = next(encoder.backbone.parameters()).dtype
    each = encoder_flops(encoder, encoder.tokenizer.encode(texts, MAX_TOKENS)) / len(texts)
    most = product_flops(config.hidden_size, config.intermediate_size, dtype) / each
    emit(
        "embedding, rows/s against those of the product alone",
        rates["ours"],
        "rows/s",
        peer=most,
        case=str(dtype).removeprefix("torch."),
        # No encoder without padding can have larger ratios than these here.
        largest_ratios={name: round(most / rate, 2) for name, rate in rates.items() if name != "ours"},
    )


def stage_against_encoder(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = workspace(Path(folder), pairs, MODEL, MAX_TOKENS)
        encoder = load_encoder(resolve_model(MODEL), dtype=inference_dtype("auto", torch.device("cpu")), packed=True)
        preparer = Preparer(Workspace(config).corpus, config.embed, config.storage)
        units = row_groups_of(Workspace(config).corpus.require())[::ALONE_UNITS]
        prepared = [preparer.prepare(unit).texts.values() for unit in units]
        texts = [Tokens.from_arrow(side.inputs) for sides in prepared for side in sides]
        tokens = sum(len(part.values) for part in texts)
        # One half before the stage and one after it: the machine's rate may drift.
        half = len(texts) // 2
        alone, _ = seconds(lambda: encode_all(encoder, texts[:half], config.embed.batch_tokens))
        with ExitStack() as session:
            starting, _ = seconds(lambda: session.enter_context(ray_session(config.ray)))
            whole, manifest = seconds(lambda: embed(config))
        alone += seconds(lambda: encode_all(encoder, texts[half:], config.embed.batch_tokens))[0]
        rates = {"stage": manifest.details["tokens"] / whole, "encoder": tokens / alone}
        steps = manifest.details["seconds"]
        available = config.embed.workers * whole
        shares = {step: round(value / available, 4) for step, value in steps.items()}
        emit(
            "embedding stage, tokens/s against the encoder alone",
            rates["stage"],
            "tokens/s",
            peer=rates["encoder"],
            pairs=pairs,
            tokens=manifest.details["tokens"],
            pairs_per_second=round(pairs / whole, 1),
            ray_start_seconds=round(starting, 1),
            # Of the time of all workers; what is left of it is their start and their last wait.
            shares={**shares, "start and wait": round(1 - sum(steps.values()) / available, 4)},
            # Below 1, two processes of one thread disturb each other less than two threads of one process do.
            encode_seconds_to_alone=round(
                steps["encode"] / config.embed.workers / (alone * manifest.details["tokens"] / tokens), 3
            ),
        )


def memory_at_ten_times_the_rows(pairs: int) -> None:
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        # A static model makes rows cheap; what the stage holds of a row is the same.
        model = Path(folder) / "model"
        save_model(load_encoder(resolve_model(MODEL), "static"), model)
        for count in (pairs // 10, pairs):
            config = workspace(Path(folder) / str(count), count, str(model), MAX_TOKENS)
            command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "one"]
            done = subprocess.run([*command, "--workspace", config.workspace], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            peaks.append(json.loads(done.stdout)["peak_bytes"])
    small, large = (peak / 2**20 for peak in peaks)
    emit("embed, peak memory at ten times the rows", large, "MiB", peer=small, pairs=[pairs // 10, pairs])


def embed_and_watch(place: str) -> dict[str, Any]:
    """Embeds a workspace in this process, which has done nothing else."""
    config = RunConfig.model_validate_json((Path(place) / "run.json").read_text())
    with PeakMemory() as memory:
        embed(config)
    return {"peak_bytes": memory.bytes}


def real_pairs(count: int) -> pa.Table:
    """Rows drawn evenly from all files of the data folder."""
    folder = require_data_folder() / "pairs"
    columns = ["query", "document", "source"]
    table = pa.concat_tables([pq.read_table(file, columns=columns) for file in sorted(folder.glob("*.parquet"))])
    rows = np.random.default_rng(0).permutation(table.num_rows)
    return table.take(rows[np.arange(count) % len(rows)])


def workspace(folder: Path, pairs: int, model: str, max_tokens: int) -> RunConfig:
    config = RunConfig(
        workspace=str(folder),
        embed=EmbedConfig(model=model, max_tokens=max_tokens, device="cpu"),
        ray=RayConfig(num_cpus=2, object_store_memory=STORE_BYTES),
    )
    table = real_pairs(pairs)
    rows = corpus_table(*(table[name].to_pylist() for name in ("query", "document", "source")))
    commit_corpus(config, rows, row_group_rows=2048, part_rows=16_384)
    (folder / "run.json").write_text(config.model_dump_json())
    return config


def encode_all(encoder: Encoder, texts: list[Tokens], batch_tokens: int) -> None:
    for tokens in texts:
        encoder.encode(tokens, batch_tokens)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()

"""Training, pairs per second, against the Sentence Transformers trainer with its cached loss, and against padding.

    python -m tests.benchmarks.bench_training [--batch 256] [--steps 2] [--rounds 3] [--precision float32]
    python -m tests.benchmarks.bench_training --contenders ours theirs-bfloat16
    python -m tests.benchmarks.bench_training --query-tokens 24 --document-tokens 64
    python -m tests.benchmarks.bench_training --device cuda --bert-base --batch 16384 --mini-batch 512

Same model (MiniLM, or an untrained one of BERT-base's size), real pairs (CLUSTERBATCH_DATA), same batches in the same
order, no dropout, AdamW with the same settings, one process with all cores or one GPU (bfloat16 for both); both
tokenise as they go. `padded` is this trainer with padding, `theirs-bfloat16` the peer with its option bf16. Every round
of each is a process of its own, rounds alternate and begin from the first weights. Prints one JSON line per figure:
pairs a second of the best rounds (by wall clock and by CPU time, which other processes on the machine disturb less),
peak memory, what share of a step's CPU time is neither in the encoder nor the optimizer, and the largest difference of
the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from clusterbatch.config import TrainConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.training.collectives import World
from clusterbatch.training.grad_cache import CachedEmbedding
from clusterbatch.training.metrics import peak_flops, peak_memory_bytes, training_flops_per_token
from clusterbatch.training.prepare_model import computing_dtype
from clusterbatch.training.step import TrainingStep
from clusterbatch.training.unpadded import IN_TRAINING
from tests.benchmarks.figures import emit
from tests.data_folder import require_data_folder
from tests.training.batches import plain_batch

MODEL, RATE, DECAY, CLIP = "all-MiniLM-L6-v2", 2e-5, 0.01, 1.0
CONTENDERS = ("ours", "padded", "theirs", "theirs-bfloat16")


def real_pairs(count: int) -> list[tuple[str, str]]:
    """Rows drawn evenly from all sources of the data folder."""
    folder = require_data_folder() / "pairs"
    pairs: list[tuple[str, str]] = []
    for file in sorted(folder.glob("*.parquet")):
        table = pq.read_table(file, columns=["query", "document"]).slice(0, 4 * count)
        pairs += zip(table["query"].to_pylist(), table["document"].to_pylist(), strict=True)
    order = np.random.default_rng(0).permutation(len(pairs))[:count]
    return [pairs[row] for row in order]


def bert_base(folder: Path) -> str:
    """Writes an untrained model of BERT-base's size with MiniLM's tokenizer (CLUSTERBATCH_TOKENIZER: another)."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(os.environ.get("CLUSTERBATCH_TOKENIZER") or resolve_model(MODEL))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(folder)
    return str(folder)


def ours(model: str, batches: list[list[tuple[str, str]]], options: argparse.Namespace, padded: bool) -> dict[str, Any]:
    """Seconds and CPU seconds, loss of every step, MFU and share outside encoder and optimizer of the last step."""
    encoder = load_encoder(model, "backbone", device=options.device)
    config = TrainConfig(
        encoder="backbone",
        dropout=0.0,
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        weight_decay=DECAY,
        clip_norm=CLIP,
        temperature=0.05,
        precision=options.precision,
        # The peer masks nothing.
        mask={"duplicates": False},
    )
    training = TrainingStep(encoder, config, len(batches), World())
    if padded:
        encoder.packed = None
        if encoder.backbone.config._attn_implementation == IN_TRAINING:
            encoder.backbone.set_attn_implementation("sdpa")
    inside = _Stopwatch()
    for owner, name in ((CachedEmbedding, "_forward"), (CachedEmbedding, "backward"), (training.optimizer, "step")):
        setattr(owner, name, inside.timing(getattr(owner, name)))
    losses = []
    whole, cpu = time.perf_counter(), time.process_time()
    for step, pairs in enumerate(batches):
        queries = encoder.tokenizer.encode([query for query, _ in pairs], options.query_tokens)
        documents = encoder.tokenizer.encode([document for _, document in pairs], options.document_tokens)
        slice_batch = plain_batch(step, queries, documents)
        inside.seconds, start = 0.0, time.process_time()
        result = training.run(slice_batch)
        outside = 1 - inside.seconds / (time.process_time() - start)
        losses.append(result.loss)
    seconds, cpu = time.perf_counter() - whole, time.process_time() - cpu
    flops = (training_flops_per_token(encoder) or 0.0) * result.tokens
    mfu = flops / result.seconds / peak_flops(encoder.device, computing_dtype(config, encoder))
    return {"seconds": seconds, "cpu_seconds": cpu, "losses": losses, "mfu": mfu, "outside": outside}


class _Stopwatch:
    """CPU seconds within the functions that it has wrapped."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.process_time() - start

        return timed


def theirs(
    model_folder: str, batches: list[list[tuple[str, str]]], options: argparse.Namespace, bf16: bool
) -> dict[str, Any]:
    """The same with SentenceTransformerTrainer and CachedMultipleNegativesRankingLoss; documents' limit for both."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start = seconds = cpu_start = cpu_seconds = 0.0

        def on_train_begin(self, *positional: Any, **named: Any) -> None:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

        def on_step_end(self, *positional: Any, **named: Any) -> None:
            self.seconds = time.perf_counter() - self.start
            self.cpu_seconds = time.process_time() - self.cpu_start

    device = options.device
    model = SentenceTransformer(model_folder, device=device)
    model.max_seq_length = options.document_tokens
    # The peer has one limit for both sides, so queries are cut as text.
    tokenizer = Tokenizer(model_folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    flat = [pair for batch in batches for pair in batch]
    clock = Clock()
    with TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=len(batches[0]),
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=DECAY,
                max_grad_norm=CLIP,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=device == "cpu",
                bf16=bf16,
                disable_tqdm=True,
                batch_sampler=lambda dataset, batch_size, **_: BatchSampler(
                    SequentialSampler(dataset), batch_size, drop_last=False
                ),
            ),
            train_dataset=Dataset.from_dict(
                {
                    "query": [_cut(tokenizer, pair[0], options.query_tokens) for pair in flat],
                    "document": [pair[1] for pair in flat],
                }
            ),
            loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.mini_batch),
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": clock.seconds, "cpu_seconds": clock.cpu_seconds, "losses": losses}


def _cut(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """Drop words from the end of a text until it has at most so many tokens, if it has any to drop."""
    words = text.split()
    while len(words) > 1 and len(tokenizer.encode([" ".join(words)]).values) > tokens:
        words.pop()
    return " ".join(words)


def one_round(contender: str, model: str, batches: list[list[tuple[str, str]]], options: argparse.Namespace) -> None:
    """Train in this process and print what was measured."""
    torch.set_num_threads(options.threads)
    if contender.startswith("theirs"):
        in_bfloat16 = "bfloat16" in (options.precision, contender.removeprefix("theirs-"))
        found = theirs(model, batches, options, in_bfloat16 or options.device != "cpu")
    else:
        found = ours(model, batches, options, contender == "padded")
    print(json.dumps({**found, "peak_bytes": peak_memory_bytes(torch.device(options.device))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--query-tokens", type=int, default=128)
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bert-base", action="store_true")
    parser.add_argument("--mini-batch", type=int, default=32, help="the peer's; its own default is 32")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS[:3]), choices=CONTENDERS)
    parser.add_argument("--round-of", choices=CONTENDERS, help="one round of one of them, in this process")
    parser.add_argument("--model", default=resolve_model(MODEL), help=argparse.SUPPRESS)
    options = parser.parse_args()
    pairs = real_pairs(options.batch * options.steps)
    batches = [pairs[start : start + options.batch] for start in range(0, len(pairs), options.batch)]
    if options.round_of:
        one_round(options.round_of, options.model, batches, options)
        return
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    with TemporaryDirectory() as folder:
        model = bert_base(Path(folder)) if options.bert_base else options.model
        for number in range(options.rounds):
            # Whoever comes first in a round has the warmer or the colder machine; so take turns.
            for name in options.contenders if number % 2 == 0 else reversed(options.contenders):
                command = [sys.executable, "-m", "tests.benchmarks.bench_training", *sys.argv[1:]]
                command += ["--round-of", name, "--model", model]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    size = "BERT-base, untrained" if options.bert_base else MODEL
    lengths = f"{options.query_tokens} + {options.document_tokens} tokens"
    case = f"{size}, batch {options.batch}, {lengths}, {options.device}, {options.precision}"
    for peer in rounds:
        if peer != "ours":
            _compare(rounds["ours"], rounds[peer], len(pairs), PEERS[peer], case)


# The words for each in the names of the figures.
PEERS = {
    "theirs": "Sentence Transformers' cached loss",
    "theirs-bfloat16": "Sentence Transformers' cached loss in bfloat16",
    "padded": "padding",
}


def _compare(ours: list[dict[str, Any]], peers: list[dict[str, Any]], pairs: int, peer: str, case: str) -> None:
    def rates(found: list[dict[str, Any]], clock: str = "seconds") -> list[float]:
        return [round(pairs / entry[clock], 2) for entry in found]

    def peak(found: list[dict[str, Any]]) -> float:
        return max(entry["peak_bytes"] for entry in found) / 2**20

    emit(
        f"training, pairs/s against {peer}",
        max(rates(ours)),
        "pairs/s",
        case=case,
        peer=max(rates(peers)),
        rounds={"ours": rates(ours), "peer": rates(peers)},
        mfu=round(max(entry["mfu"] for entry in ours), 3),
        outside=round(min(entry["outside"] for entry in ours), 4),
    )
    emit(
        f"training, pairs per CPU second against {peer}",
        max(rates(ours, "cpu_seconds")),
        "pairs/s",
        case=case,
        peer=max(rates(peers, "cpu_seconds")),
        rounds={"ours": rates(ours, "cpu_seconds"), "peer": rates(peers, "cpu_seconds")},
    )
    emit(f"training, peak memory against {peer}", peak(ours), "MiB", case=case, peer=peak(peers))
    losses = ours[0]["losses"], peers[0]["losses"]
    difference = max(abs(one / other - 1) for one, other in zip(*losses, strict=True))
    emit("training, largest difference of the losses", difference, case=f"{case}, {peer}", losses=losses)


if __name__ == "__main__":
    main()

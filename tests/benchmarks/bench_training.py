"""Training, pairs per second, against the Sentence Transformers trainer with its cached loss.

    python -m tests.benchmarks.bench_training [--batch 256] [--steps 2] [--rounds 3]
    python -m tests.benchmarks.bench_training --device cuda --bert-base --batch 16384 --mini-batch 512

Same model (MiniLM, or an untrained one of BERT-base's size), real pairs (CLUSTERBATCH_DATA), same batches in the same
order, 128 tokens, no dropout, AdamW with the same settings, one process with all cores or one GPU (bfloat16 for both);
both tokenise as they go. Rounds alternate; each begins from the first weights. Prints one JSON line per figure: pairs a
second of the best rounds, and the largest difference of the losses.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from clusterbatch.batches.loader import SliceBatch
from clusterbatch.config import TrainConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.training.collectives import World
from clusterbatch.training.metrics import peak_flops, training_flops_per_token
from clusterbatch.training.prepare_model import computing_dtype
from clusterbatch.training.step import TrainingStep
from tests.benchmarks.figures import emit
from tests.data_folder import require_data_folder

MODEL, TOKENS, RATE, DECAY, CLIP = "all-MiniLM-L6-v2", 128, 2e-5, 0.01, 1.0


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


def ours(model: str, device: str, batches: list[list[tuple[str, str]]]) -> tuple[float, list[float], float]:
    """(seconds, loss of every step, MFU of the last step)."""
    encoder = load_encoder(model, "backbone", device=device)
    config = TrainConfig(
        encoder="backbone",
        dropout=0.0,
        learning_rate=RATE,
        schedule="constant",
        warmup=0.0,
        weight_decay=DECAY,
        clip_norm=CLIP,
        temperature=0.05,
        # The peer masks nothing.
        mask={"duplicates": False},
    )
    training = TrainingStep(encoder, config, len(batches), World())
    losses = []
    start = time.perf_counter()
    for step, pairs in enumerate(batches):
        queries = encoder.tokenizer.encode([query for query, _ in pairs], TOKENS)
        documents = encoder.tokenizer.encode([document for _, document in pairs], TOKENS)
        number = np.arange(len(pairs), dtype=np.uint64)
        slice_batch = SliceBatch(
            step=step,
            epoch=0,
            query_tokens=queries,
            document_tokens=documents,
            query_hash=number,
            document_hash=number,
            weight=None,
            negative_tokens=None,
            negative_counts=None,
            query_vector=None,
            document_vector=None,
            slice_rows=np.array([len(pairs)]),
            composition=None,  # type: ignore[arg-type]
        )
        result = training.run(slice_batch)
        losses.append(result.loss)
    seconds = time.perf_counter() - start
    flops = (training_flops_per_token(encoder) or 0.0) * result.tokens
    return seconds, losses, flops / result.seconds / peak_flops(encoder.device, computing_dtype(config, encoder))


def theirs(
    model_folder: str, device: str, batches: list[list[tuple[str, str]]], mini_batch: int
) -> tuple[float, list[float]]:
    """The same with SentenceTransformerTrainer and CachedMultipleNegativesRankingLoss."""
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
        start = seconds = 0.0

        def on_train_begin(self, *positional: Any, **named: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *positional: Any, **named: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    model = SentenceTransformer(model_folder, device=device)
    model.max_seq_length = TOKENS
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
                bf16=device != "cpu",
                disable_tqdm=True,
                batch_sampler=lambda dataset, batch_size, **_: BatchSampler(
                    SequentialSampler(dataset), batch_size, drop_last=False
                ),
            ),
            train_dataset=Dataset.from_dict(
                {"query": [pair[0] for pair in flat], "document": [pair[1] for pair in flat]}
            ),
            loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch),
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bert-base", action="store_true")
    parser.add_argument("--mini-batch", type=int, default=32, help="the peer's; its own default is 32")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    pairs = real_pairs(options.batch * options.steps)
    batches = [pairs[start : start + options.batch] for start in range(0, len(pairs), options.batch)]
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    losses: dict[str, list[float]] = {}
    mfu = 0.0
    with TemporaryDirectory() as folder:
        model = bert_base(Path(folder)) if options.bert_base else resolve_model(MODEL)
        for number in range(options.rounds):
            # Whoever comes first in a round has the warmer or the colder machine; so take turns.
            for name in ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours"):
                if name == "ours":
                    spent, losses[name], share = ours(model, options.device, batches)
                    mfu = max(mfu, share)
                else:
                    spent, losses[name] = theirs(model, options.device, batches, options.mini_batch)
                seconds[name].append(spent)
    rates = {name: [len(pairs) / spent for spent in values] for name, values in seconds.items()}
    difference = max(abs(one / other - 1) for one, other in zip(losses["ours"], losses["theirs"], strict=True))
    case = f"{'BERT-base, untrained' if options.bert_base else MODEL}, batch {options.batch}, {options.device}"
    emit(
        "training, pairs/s against Sentence Transformers' cached loss",
        max(rates["ours"]),
        "pairs/s",
        case=case,
        peer=max(rates["theirs"]),
        steps=options.steps,
        tokens=TOKENS,
        rounds={name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        mfu=round(mfu, 3),
    )
    emit("training, largest difference of the losses", difference, case=case, losses=losses)


if __name__ == "__main__":
    main()

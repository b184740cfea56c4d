from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st

from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder, padded
from clusterbatch.encoder.model_files import POOLING_MODES
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError, UsageError
from tests.encoder.models import ARCHITECTURES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _encode(encoder: Encoder, texts: list[str], max_tokens: int | None = None) -> np.ndarray:
    return encoder.encode(encoder.tokenizer.encode(texts, max_tokens or encoder.max_tokens), 512)


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "t5", "xlnet", "qwen2"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99999), (torch.bfloat16, 0.999)])
def test_agrees_with_sentence_transformers(
    architecture: str, dtype: torch.dtype, least: float, tiny: Callable[[str], Path], awkward_texts: list[str]
) -> None:
    folder = tiny(architecture)
    expected = SentenceTransformer(str(folder), device="cpu").encode(awkward_texts, batch_size=4)
    vectors = _encode(load_encoder(str(folder), dtype=dtype), awkward_texts)
    assert _cosines(vectors, expected).min() > least


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_pooling_and_prompts_of_the_folder(pooling: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    transformer = st.Transformer(str(tiny("bert")), max_seq_length=20)
    model = SentenceTransformer(
        modules=[transformer, st.Pooling(32, pooling)], prompts={"query": "the query: ", "document": ""}, device="cpu"
    )
    model.save(str(tmp_path))
    encoder = load_encoder(str(tmp_path))
    assert (encoder.pooling, encoder.max_tokens, encoder.dimensions) == (pooling, 20, 32)
    texts = ["the fox", "the cat and the dog " * 10, ""]
    tokens = encoder.tokenizer.encode(texts, encoder.max_tokens, encoder.prompts["query"])
    assert _cosines(encoder.encode(tokens, 64), model.encode_query(texts)).min() > 0.99999


@pytest.mark.parametrize("kind", ["backbone", "static"])
def test_awkward_texts_give_unit_vectors(kind: str, minilm: str, awkward_texts: list[str]) -> None:
    vectors = _encode(load_encoder(minilm, kind), awkward_texts, 64)  # type: ignore[arg-type]
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_rows_come_back_in_their_order(minilm: str) -> None:
    encoder = load_encoder(minilm)
    texts = ["word " * count for count in (30, 1, 12, 12, 5, 40, 2)]
    alone = np.concatenate([_encode(encoder, [text]) for text in texts])
    assert np.abs(_encode(encoder, texts) - alone).max() < 1e-5


def test_no_padding_beyond_the_longest() -> None:
    ids, lengths = padded(Tokens.from_lists([[5, 6], [7], []]), padding=9)
    assert ids.tolist() == [[5, 6], [7, 9], [9, 9]]
    # An empty text attends to one padding token: attention over nothing would not be finite.
    assert lengths.tolist() == [2, 1, 1]


def test_differentiable_in_every_trained_parameter(tiny: Callable[[str], Path]) -> None:
    encoder = load_encoder(str(tiny("bert")))
    tokens = encoder.tokenizer.encode(["the fox", "the lazy dog sleeps"], 16)
    vectors = encoder(tokens)
    assert vectors.dtype == torch.float32
    (vectors[0] @ vectors[1]).backward()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
    assert sum(parameter.numel() for parameter in trained) > 0.9 * sum(p.numel() for p in encoder.parameters())


def test_empty_text_gives_finite_gradients() -> None:
    weights = torch.nn.EmbeddingBag(4, 3, mode="mean")
    encoder = Encoder("static", weights, None, pooling="mean", max_tokens=None, prompts={})  # type: ignore[arg-type]
    vectors = encoder(Tokens.from_lists([[], [1, 2]]))
    (vectors @ vectors.T).sum().backward()
    assert weights.weight.grad is not None
    assert torch.isfinite(weights.weight.grad).all()


def test_dropout_follows_the_mode_and_never_touches_encode(tiny: Callable[[str], Path]) -> None:
    encoder = load_encoder(str(tiny("bert")))
    tokens = encoder.tokenizer.encode(["the quick brown fox"], 16)
    still = encoder.encode(tokens, 64)
    encoder.train()
    torch.manual_seed(0)
    first, second = encoder(tokens), encoder(tokens)
    assert not torch.equal(first, second)
    assert np.array_equal(encoder.encode(tokens, 64), still)
    assert encoder.training


def test_static_encoder_of_a_transformer(minilm: str) -> None:
    encoder = load_encoder(minilm, "static")
    texts = ["the quick brown fox", "埼玉県"]
    embeddings = load_encoder(minilm).backbone.get_input_embeddings().weight.detach()  # type: ignore[operator,union-attr]
    tokens = encoder.tokenizer.encode(texts)
    assert encoder.tokenizer.added == 0
    expected = torch.stack([embeddings[tokens[row].tolist()].mean(dim=0) for row in range(2)]).numpy()
    assert _cosines(encoder.encode(tokens, 64), expected).min() > 0.999999


def test_static_folder_is_no_backbone(minilm: str, tmp_path: Path) -> None:
    from clusterbatch.encoder.save import save_model

    save_model(load_encoder(minilm, "static"), tmp_path)
    with pytest.raises(UsageError, match="static encoder"):
        load_encoder(str(tmp_path), "backbone")


def test_no_texts_no_vectors(minilm: str) -> None:
    encoder = load_encoder(minilm, "static")
    assert encoder.encode(encoder.tokenizer.encode([]), 64).shape == (0, 384)


@pytest.mark.parametrize("kind", ["backbone", "static"])
def test_tokens_without_embeddings_are_named(kind: str, tiny: Callable[[str], Path]) -> None:
    encoder = load_encoder(str(tiny("bert")), kind)  # type: ignore[arg-type]
    rows = encoder.tokenizer.vocabulary
    assert encoder.encode(Tokens.from_lists([[rows - 1]]), 64).shape == (1, 32)
    with pytest.raises(DataError, match=f"{tiny('bert')}: its tokenizer made token {rows}, .* of {rows:,} tokens"):
        encoder.encode(Tokens.from_lists([[1], [2, rows]]), 64)

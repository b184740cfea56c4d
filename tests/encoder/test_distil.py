"""Static encoders distilled from a transformer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.distil import distil_static
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.errors import UsageError


def _texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of 12 words, some of them frequent and most of them rare, as in any language."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, len(_words()) + 1)
    return [" ".join(rng.choice(_words(), 12, p=shares / shares.sum())) for _ in range(count)]


@cache
def _words() -> list[str]:
    known = load_encoder(resolve_model("all-MiniLM-L6-v2"), "static").tokenizer.backend.get_vocab()
    words = sorted(word for word in known if word.isalpha() and word.isascii())
    return [words[row] for row in np.random.default_rng(0).permutation(len(words))[:400]]


def test_it_is_the_regression_of_the_models_vectors_on_the_means_of_tokens() -> None:
    folder = resolve_model("all-MiniLM-L6-v2")
    sides = {"query": _texts(150), "document": _texts(250, seed=1)}
    found = distil_static(folder, sides, max_tokens=64)  # type: ignore[arg-type]
    texts = [*sides["query"], *sides["document"]]

    static = load_encoder(folder, "static")
    model = load_encoder(folder, packed=True, dtype=inference_dtype("auto", torch.device("cpu")))
    table = static.backbone.weight.detach().numpy()  # type: ignore[union-attr]
    ids = [static.tokenizer.encode([text]).values for text in texts]
    features = np.array([table[of].mean(axis=0, dtype=np.float64) for of in ids])
    # By sides: which texts share a micro-batch changes the last bits of bfloat16.
    wanted = np.concatenate([model.encode(model.prepare(of, 64), 2048) for of in sides.values()])
    spread = ((features - features.mean(0)) ** 2).sum() / features.shape[1]
    fit = Ridge(alpha=1e-2 * spread, solver="svd").fit(features, wanted)
    expected = fit.predict(features)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = found.encode(found.prepare(texts, 64), 2048)
    assert np.abs(vectors - expected).max() < 1e-4


def test_it_comes_nearer_to_the_model_than_plain_means_on_other_texts() -> None:
    folder = resolve_model("all-MiniLM-L6-v2")
    found = distil_static(folder, {"document": _texts(400)}, max_tokens=64)
    others = _texts(60, seed=9)
    model = load_encoder(folder)
    wanted = model.encode(model.prepare(others, 64), 2048)

    def error(vectors: np.ndarray) -> float:
        """Mean squared difference of all cosines between the texts."""
        return float(np.square(vectors @ vectors.T - wanted @ wanted.T).mean())

    plain = load_encoder(folder, "static")
    assert error(found.encode(found.prepare(others, 64), 2048)) < 0.5 * error(
        plain.encode(plain.prepare(others, 64), 2048)
    )


def test_it_is_saved_as_a_model_that_others_open(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    found = distil_static(str(tiny("bert")), {"query": _texts(5), "document": _texts(9)}, max_tokens=None)
    save_model(found, tmp_path)
    texts = _texts(4, seed=3)
    vectors = found.encode(found.prepare(texts, None), 2048)
    assert np.abs(SentenceTransformer(str(tmp_path), device="cpu").encode(texts) - vectors).max() < 1e-5
    again = load_encoder(str(tmp_path))
    assert again.kind == "static"
    assert np.array_equal(again.encode(again.prepare(texts, None), 2048), vectors)


def test_what_cannot_be_distilled_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no texts"):
        distil_static(str(tiny("bert")), {"document": []})
    save_model(load_encoder(str(tiny("bert")), "static"), tmp_path)
    with pytest.raises(UsageError, match="only a transformer"):
        distil_static(str(tmp_path), {"document": ["a"]})

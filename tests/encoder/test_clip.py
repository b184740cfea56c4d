"""Two towers: the features are those of transformers, images and texts go through batches in any order, and the saved
folder opens in Sentence Transformers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clusterbatch.corpus.images import data_uri
from clusterbatch.encoder.clip import TowersEncoder, image_processor
from clusterbatch.encoder.images import ImageProcessor, Pixels
from clusterbatch.encoder.inputs import Mixed, concatenate
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model_files import read_layout
from clusterbatch.encoder.save import save_model
from clusterbatch.errors import DataError, UsageError
from clusterbatch.training.grad_cache import CachedEmbedding, RandomKey
from tests.integration.test_examples import example

CAPTIONS = ["a large red circle at the top on dark ground", "a small blue bar at the left on grey ground", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("clip")
    example("images").write_clip(place, CAPTIONS, seed=0)
    return str(place)


@pytest.fixture(scope="module")
def encoder(folder: str) -> TowersEncoder:
    loaded = load_encoder(folder, "backbone")
    assert isinstance(loaded, TowersEncoder)
    return loaded


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """Of several shapes and modes; none has the size of the tower."""
    random, files = np.random.default_rng(0), []
    for mode, kind, size in [("RGB", "PNG", (50, 40)), ("L", "PNG", (33, 90)), ("RGBA", "PNG", (64, 64))]:
        values = random.integers(0, 256, (*size[::-1], len(mode)), np.uint8).squeeze()
        file = io.BytesIO()
        Image.fromarray(values, mode).save(file, kind)
        files.append(file.getvalue())
    return files


def test_vectors_are_the_normalised_features_of_transformers(
    folder: str, encoder: TowersEncoder, pictures: list[bytes]
) -> None:
    from transformers import AutoModel, CLIPImageProcessorPil, CLIPTokenizer

    model, processor = AutoModel.from_pretrained(folder).eval(), CLIPImageProcessorPil.from_pretrained(folder)
    values = processor([Image.open(io.BytesIO(data)).convert("RGB") for data in pictures], return_tensors="pt")
    words = CLIPTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        images = model.get_image_features(**values).pooler_output
        texts = model.get_text_features(**words).pooler_output
    for theirs, ours in (
        (images, encoder.encode(encoder.images.pixels(pictures), 17)),
        (texts, encoder.encode(encoder.prepare(CAPTIONS, 24), 512)),
    ):
        cosines = torch.cosine_similarity(theirs, torch.from_numpy(ours))
        assert float(cosines.min()) > 0.999999


def test_rows_of_both_kinds_keep_their_order_and_gradient(encoder: TowersEncoder, pictures: list[bytes]) -> None:
    texts, images = encoder.tokenizer.encode(CAPTIONS), encoder.images.pixels(pictures)
    mixed = concatenate([texts, images, texts])
    assert isinstance(mixed, Mixed)
    apart = torch.cat([encoder(texts), encoder(images), encoder(texts)])
    rows = np.array([7, 3, 0, 4, 8])
    torch.testing.assert_close(encoder(mixed.take(rows)), apart[torch.from_numpy(rows)])
    assert np.array_equal(mixed.take(rows).lengths, mixed.lengths[rows])
    assert mixed.lengths[3] == 17  # sixteen patches and the class token

    def gradient(limit: int, room: int) -> torch.Tensor:
        encoder.zero_grad()
        cached = CachedEmbedding(encoder, mixed, RandomKey(0, 0, 0), micro_batch_tokens=limit, activation_bytes=room)
        cached.vectors.pow(3).sum().backward()
        cached.backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    # In one micro-batch; and in many, of which most are computed twice.
    torch.testing.assert_close(gradient(30, 0), gradient(10_000, 2**30), atol=1e-5, rtol=1e-4)


def test_pixels_survive_arrow(encoder: TowersEncoder, pictures: list[bytes]) -> None:
    pixels = encoder.images.pixels(pictures)
    again = encoder.images.from_arrow(pixels.to_arrow())
    assert np.array_equal(again.values, pixels.values)
    assert again.each == pixels.each
    assert len(encoder.images.pixels([])) == 0
    assert len(set(pixels.hashes.tolist())) == len(pictures)
    assert np.array_equal(pixels.take(np.array([2, 0])).values, pixels.values[[2, 0]])


def test_texts_or_images_not_both(encoder: TowersEncoder, pictures: list[bytes]) -> None:
    uris = [data_uri(data, "png") for data in pictures]
    assert isinstance(encoder.prepare(uris, None), Pixels)
    with pytest.raises(DataError, match="3 of 4"):
        encoder.prepare([*uris, "a text"], None)


def test_a_saved_model_opens_here_and_in_sentence_transformers(
    encoder: TowersEncoder, pictures: list[bytes], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    save_model(encoder, tmp_path)
    again = load_encoder(str(tmp_path))
    texts, images = encoder.prepare(CAPTIONS, 24), encoder.images.pixels(pictures)
    np.testing.assert_allclose(again.encode(texts, 512), encoder.encode(texts, 512), atol=1e-6)
    np.testing.assert_allclose(again.encode(images, 512), encoder.encode(images, 512), atol=1e-6)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    opened = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    for given, inputs in ((CAPTIONS, texts), (opened, images)):
        cosines = np.sum(theirs.encode(given) * encoder.encode(inputs, 512), axis=1)
        assert cosines.min() > 0.99999


def test_a_tower_that_nothing_goes_through_is_not_trained(folder: str) -> None:
    for images, frozen in (([], "vis"), (["query", "document"], "text"), (["document"], "logit_scale")):
        encoder = load_encoder(folder)
        assert isinstance(encoder, TowersEncoder)
        encoder.freeze_unused(images)
        still = {name for name, parameter in encoder.backbone.named_parameters() if not parameter.requires_grad}
        expected = {name for name, _ in encoder.backbone.named_parameters() if name.startswith((frozen, "logit_scale"))}
        assert still == expected


def test_models_without_a_tower_for_images_are_refused(folder: str, minilm: str) -> None:
    assert isinstance(image_processor(folder, "embed.model"), ImageProcessor)
    with pytest.raises(UsageError, match=r"embed\.model"):
        image_processor(minilm, "embed.model")
    with pytest.raises(UsageError, match="static"):
        load_encoder(folder, "static")
    assert read_layout(folder).max_tokens == 24

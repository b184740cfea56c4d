"""Images as input: every form becomes the same data URI, what cannot be an image is rejected with its reason."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clusterbatch.config import RunConfig, fingerprint, load_config
from clusterbatch.corpus.images import ImageError, image_bytes, load_image, open_image, readable
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.normalise import text_hash
from clusterbatch.errors import DataError, UsageError
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.store import Folder
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.in_process import run_in_process


def encoded(shade: int, kind: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(file, kind)
    return file.getvalue()


def huge_png(side: int) -> bytes:
    """The header of a large square, and next to nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))


def corpus(folder: Path, column: pa.Array, **more: object) -> RunConfig:
    rows = {"caption": [f"number {row}" for row in range(len(column))], "picture": column}
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), folder / "in" / "pairs.parquet")
    words = [f"workspace={folder}/ws", f"corpus.paths={folder}/in/pairs.parquet", "evaluate.holdout=0"]
    words += ["corpus.columns={query: caption, document: picture, images: [document]}", "train.encoder=backbone"]
    return load_config(None, [*words, *(f"{key}={value}" for key, value in more.items())])


def ingested(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict], list[dict]]:
    """Rows and rejects."""
    run_in_process(monkeypatch)
    manifest = ingest(config)
    artifact = Workspace(config).corpus
    tables = {
        role: [
            row
            for part in manifest.parts
            if part.details.get("role") == role
            for row in read_parquet(artifact.folder, part).to_pylist()
        ]
        for role in ("pairs", "rejects")
    }
    assert manifest.counts.read == len(tables["pairs"]) + len(tables["rejects"])
    return tables["pairs"], tables["rejects"]


def test_bytes_structs_and_addresses_are_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = encoded(10, "JPEG")
    (tmp_path / "in" / "more").mkdir(parents=True)
    (tmp_path / "in" / "more" / "a.jpg").write_bytes(image)
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = [
        pa.array([image], pa.binary()),
        pa.array([{"bytes": image, "path": "a.jpg"}], struct_type),
        pa.array([{"bytes": None, "path": "more/a.jpg"}], struct_type),
        pa.array(["more/a.jpg"]),
        pa.array([f"{tmp_path}/in/more/a.jpg"]),
        pa.array([f"data:image/anything;base64,{base64.b64encode(image).decode()}"]),
    ]
    seen = []
    for number, column in enumerate(columns):
        config = corpus(tmp_path, column, workspace=f"{tmp_path}/{number}")
        rows, rejects = ingested(config, monkeypatch)
        assert not rejects
        seen += rows
    assert len({row["pair_id"] for row in seen}) == len({row["document_hash"] for row in seen}) == 1
    assert image_bytes(seen[0]["document"]) == image
    assert seen[0]["document"].startswith("data:image/jpeg;base64,")


def test_what_is_no_image_is_rejected_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(200, size=(64, 64))
    images = [whole, whole[:90], b"no image", huge_png(9_000), None, b"", huge_png(60_000)]
    rows, rejects = ingested(corpus(tmp_path, pa.array(images, pa.binary())), monkeypatch)
    assert [image_bytes(row["document"]) for row in rows] == [whole]
    reasons = {row["row"]: row["reason"] for row in rejects}
    assert "damaged" in reasons[1]
    assert "none of PNG" in reasons[2]
    assert "9000 x 9000 pixels" in reasons[3]
    assert reasons[4] == "document: null"
    assert "none of PNG" in reasons[5]
    assert "too many pixels" in reasons[6]
    assert all(len(row["content"]) <= 2000 for row in rejects)


def test_addresses_that_lead_nowhere_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["missing.png", "../up.png", "https://example.org/a.png", "data:image/png,plain", "data:image/png;base64,*"]
    config = corpus(tmp_path, pa.array([*given, "a.png"]))
    (tmp_path / "in" / "a.png").write_bytes(encoded(1))
    rows, rejects = ingested(config, monkeypatch)
    assert len(rows) == 1
    reasons = [row["reason"] for row in sorted(rejects, key=lambda row: row["row"])]
    assert ["cannot be read" in reasons[0], "'..'" in reasons[1], "https://" in reasons[2]] == [True] * 3
    assert all("base64" in reason for reason in reasons[3:])


def test_addresses_of_what_is_no_file_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {
        "": "empty or whitespace",
        " \t": "empty or whitespace",
        "more": "not a file",
        ".": "not a file",
        "pipe": "not a file",
        "a.png/b.png": "cannot be read (FileNotFoundError)",
        "a\0b.png": "characters that cannot be part of an address",
        "x" * 300: "cannot be read (File name too long)",
        "loop.png": "cannot be read (Too many levels of symbolic links)",
        "s3://key:secret@bucket/a.png": "s3:// address: credentials come from the environment, not from the address",
    }
    config = corpus(tmp_path, pa.array([*reasons, "a.png"]))
    (tmp_path / "in" / "a.png").write_bytes(encoded(1))
    (tmp_path / "in" / "more").mkdir()
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "in" / "pipe")
    rows, rejects = ingested(config, monkeypatch)
    assert len(rows) == 1
    found = [row["reason"] for row in sorted(rejects, key=lambda row: row["row"])]
    assert found == [f"document: {reason}" for reason in reasons.values()]


def test_equal_images_are_duplicates_and_their_letters_are_not_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(1)
    rows, _ = ingested(corpus(tmp_path, pa.array([first, encoded(2), first], pa.binary())), monkeypatch)
    hashes = {row["query"]: row["document_hash"] for row in rows}
    assert hashes["number 0"] == hashes["number 2"] != hashes["number 1"]
    assert text_hash("data:image/png;base64,AAAa") != text_hash("data:image/png;base64,aaaa")


def test_damage_anywhere_is_a_reason_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        whole = encoded(90, kind, (24, 24))
        assert open_image(whole).size == (24, 24)
        for _ in range(120):
            data = bytearray(whole)
            for place in random.integers(len(data), size=3):
                data[place] = random.integers(256)
            # Any other error would be a stack trace for the user.
            with suppress(ImageError):
                open_image(bytes(data[: random.integers(1, len(data) + 1)]))


def test_a_test_collection_keeps_its_images_out_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = tmp_path / "test"
    (collection / "qrels").mkdir(parents=True)
    (collection / "one.png").write_bytes(encoded(3))
    (collection / "corpus.jsonl").write_text(json.dumps({"_id": "d", "image": "one.png"}) + "\n")
    (collection / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "the third"}) + "\n")
    (collection / "qrels" / "test.tsv").write_text("q\td\t1\n")
    images = pa.array([encoded(shade) for shade in range(6)], pa.binary())
    config = corpus(tmp_path, images, **{"evaluate.path": collection})
    run_in_process(monkeypatch)
    manifest = ingest(config)
    assert manifest.counts.written == 5
    assert manifest.counts.set_aside["copy of a test text"] == 1


def test_what_goes_with_images_and_what_does_not(tmp_path: Path) -> None:
    images = pa.array([encoded(1)], pa.binary())
    for key, value in {"embed.model": "char-ngrams", "train.encoder": "static", "evaluate.models": "[bm25]"}.items():
        with pytest.raises(UsageError, match="images"):
            corpus(tmp_path, images, **{key: value})
    with pytest.raises(UsageError, match="negatives"):
        load_config(None, ["workspace=x", "corpus.columns={images: [document], negatives: [bad]}"])
    # Corpora that were made before there were images are still known.
    config = load_config(None, ["workspace=x"])
    assert "images" not in config.corpus.columns.identity()
    with_images = load_config(None, ["workspace=x", "corpus.columns.images=[query]", "train.encoder=backbone"])
    assert fingerprint(config.corpus) != fingerprint(with_images.corpus)


def test_held_out_images_are_a_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(shade) for shade in range(60)]
    run_in_process(monkeypatch)
    config = corpus(tmp_path, pa.array(images, pa.binary()), **{"evaluate.holdout": 6})
    manifest = ingest(config)
    [collection] = configured_collections(config)
    ids, documents = collection.read_documents(0, collection.documents_bytes())
    assert len(ids) == 60
    assert {image_bytes(document) for document in documents} == set(images)
    assert manifest.counts.set_aside["held out"] == 60 - manifest.counts.written > 0
    (tmp_path / "ws" / "corpus" / "holdout" / "corpus.jsonl").write_text('{"_id": "d", "image": "nowhere.png"}\n')
    with pytest.raises(DataError, match=r"image of d: cannot be read"):
        collection.read_documents(0, 100)


@pytest.mark.parametrize("text", ["data:image/svg+xml,<svg/> # as it is in a page", "data:image/png;base64,AAAA"])
def test_texts_that_begin_like_an_image_are_texts(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{text}{'A' * 4 * row}" for row in range(40)]
    config = corpus(tmp_path, pa.array(texts), **{"evaluate.holdout": 6, "corpus.columns.images": "[]"})
    run_in_process(monkeypatch)
    ingest(config)
    [collection] = configured_collections(config)
    _, documents = collection.read_documents(0, collection.documents_bytes())
    assert sorted(documents) == texts


def test_people_see_the_beginning_of_a_damaged_image() -> None:
    damaged = "data:image/png;base64,what a page shows"
    assert readable(damaged, 10) == damaged[:10]
    assert text_hash(damaged) == text_hash(damaged.upper())


def test_people_see_a_size_instead_of_letters(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(1))
    uri = load_image("a.png", Folder(str(tmp_path)))
    assert readable(uri, 10) == f"[image/png, {len(encoded(1)):,} bytes]"
    assert readable("a long text", 6) == "a long"

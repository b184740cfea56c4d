"""What ingest holds in memory, and how many rows it compares, is bounded whatever the input is like."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from clusterbatch.config import CorpusConfig, StorageConfig, load_config
from clusterbatch.corpus import append, holdout, images, join, near_duplicates, write
from clusterbatch.corpus import read as sizing
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.corpus.holdout import SKETCH, choose, sketch
from clusterbatch.corpus.image_sizes import referenced_bytes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.rows import Chunk
from clusterbatch.store.folder import Folder
from tests.corpus.test_ingest import configuration, corpus_rows, write_lines


def test_what_is_held_out_of_many_sources_is_what_a_loop_over_them_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(0)
    rows = [
        (f"site {source:04d}", numbers.randrange(2**64), numbers.randrange(2**64))
        for source in range(1500)
        for _ in range(source % 7)
    ]
    rows += [("large", numbers.randrange(2**64), numbers.randrange(2**64)) for _ in range(4000)]
    sources, documents, queries = zip(*rows, strict=True)
    arrays = [pa.array(sources), pa.array(documents, pa.uint64()), pa.array(queries, pa.uint64())]
    table = pa.table(arrays, schema=SKETCH)
    total = 600
    chosen = choose([sketch(table, total)], total)

    def largest(count: int) -> int:
        return min(total, max(int(count * 0.1), 1 if count >= 2 else 0))

    by_source: dict[str, list[tuple[int, int, int]]] = {}
    for source, document, query in rows:
        key = int(holdout._keys(np.array([document], np.uint64))[0])
        by_source.setdefault(source, []).append((key, document, query))
    available = {source: largest(len(found)) for source, found in by_source.items()}
    # The number of documents of a large source is estimated, from its smallest keys.
    smallest = sorted(key for key, _, _ in by_source["large"])
    available["large"] = largest(int((total - 1) / (smallest[total - 1] / 2**64)))
    quotas = holdout.equal_shares(available, total)
    expected = [row for source, found in by_source.items() for row in sorted(found)[: quotas[source]]]
    assert sorted(document for _, document, _ in expected) == chosen.documents.tolist()
    assert sorted(query for _, _, query in expected) == chosen.queries.tolist()


def test_sketches_are_merged_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many small sources every sketch stays whole: rows that are sorted again with each few grow as a square."""
    numbers = random.Random(0)
    rows = [(f"site {n % 4000:04d}", numbers.randrange(2**64), numbers.randrange(2**64)) for n in range(16_000)]
    arrays = zip(*rows, strict=True)
    table = pa.table([pa.array(next(arrays)), *(pa.array(each, pa.uint64()) for each in arrays)], schema=SKETCH)
    whole = choose([sketch(table, 100)], 100)
    merged: list[int] = []
    original = holdout.sketch

    def counting(pairs: pa.Table, *arguments: Any) -> pa.Table:
        merged.append(pairs.num_rows)
        return original(pairs, *arguments)

    monkeypatch.setattr(holdout, "sketch", counting)
    chosen = choose([table.slice(start, 20) for start in range(0, 16_000, 20)], 100)
    assert chosen.documents.tolist() == whole.documents.tolist()
    assert chosen.queries.tolist() == whole.queries.tolist()
    assert sum(merged) <= 4 * 16_000


def test_a_compressed_collection_is_written_as_it_is_read(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [json.dumps({"_id": f"d{n}", "text": f"the text of document {n}"}) for n in range(3000)]
    documents[77] = "no json"
    files = {
        "corpus.jsonl": documents,
        "queries.jsonl": [json.dumps({"_id": f"q{n}", "text": f"question {n}"}) for n in range(500)],
        "qrels/train.tsv": ["query-id\tcorpus-id\tscore", *(f"q{n % 500}\td{n}\t{n % 3}" for n in range(3000))],
    }
    for name, lines in files.items():
        write_lines(tmp_path / "plain" / name, lines)
        path = tmp_path / "zipped" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(f"{line}\n" for line in lines).encode()
        if name.endswith(".jsonl"):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
        else:
            path.write_bytes(data)

    def corpus(name: str) -> list[tuple[str, str]]:
        config = configuration(tmp_path / name, [tmp_path / name], source="one")
        manifest = ingest(config)
        assert manifest.counts.rejected == 2  # the line, and the judgement of its document
        return sorted((row["query"], row["document"]) for row in corpus_rows(config, manifest))

    expected = corpus("plain")
    monkeypatch.setattr(join, "_CHUNK_ROWS", 100)
    monkeypatch.setattr(sizing, "_LEAST_WAITING", 2**14)
    monkeypatch.setattr(sizing, "_MOST_WAITING", 2**14)
    written: list[int] = []
    original = join.write_buckets

    def counting(output: Any, number: int, table: pa.Table, *arguments: Any, **options: Any) -> Any:
        if options["role"] == "documents":
            written.append(table.num_rows)
        return original(output, number, table, *arguments, **options)

    monkeypatch.setattr(join, "write_buckets", counting)
    assert corpus("zipped") == expected
    assert sum(written) == 2999
    assert max(written) <= 600


def test_pairs_are_compared_a_bounded_number_at_a_time(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[Any] = [{"query": f"q {n}", "document": f"short {n}", "source": "x"} for n in range(700)]
    monkeypatch.setattr(near_duplicates, "_PAIRS_ROWS", 100)
    monkeypatch.setattr(append, "_NEAR_BYTES", 2**12)
    made: list[int] = []
    original = near_duplicates.entries

    def counting(some: pa.Table, threshold: float) -> pa.Table:
        made.append(some.num_rows)
        return original(some, threshold)

    monkeypatch.setattr(near_duplicates, "entries", counting)
    write_lines(tmp_path / "in/one.jsonl", pairs)
    config = configuration(tmp_path, [tmp_path / "in"], near_duplicates="set_aside", row_group_rows=64)
    ingest(config)
    assert sum(made) == 700
    made.clear()
    write_lines(tmp_path / "in/two.jsonl", [{**pair, "query": f"new {pair['query']}"} for pair in pairs[:5]])
    assert ingest(config, append=True).counts.written == 705
    # All pairs of the version before, and the new ones.
    assert sum(made) == 705
    assert max(made) <= 100


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_images_are_counted_and_passed_on_by_their_own_bytes(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{n}.png" for n in range(60)]
    for number, name in enumerate(names):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(picture(number))
    file = write_lines(
        tmp_path / "in/pairs.jsonl", [{"query": f"q {n}", "document": name} for n, name in enumerate(names)]
    )
    columns = {"images": ["document"]}
    corpus = CorpusConfig.model_validate({"paths": [str(file)], "columns": columns})
    exact = sum(len(picture(number)) for number in range(60)) * 4 / 3
    estimated = referenced_bytes(find_inputs(corpus, corpus.paths, StorageConfig()).files, corpus, StorageConfig())
    assert 0.9 * exact < estimated < 1.1 * exact

    monkeypatch.setattr(images, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(images, "_BYTES_AT_ONCE", 100_000)
    addresses = pa.array([*names, "missing.png"])
    chunk = Chunk(np.arange(61), {"query": pa.array(["q"] * 61), "document": addresses})
    pieces = list(images.with_images(chunk, corpus.columns, Folder(str(tmp_path / "in"))))
    assert len(pieces) > 5
    assert max(piece.columns["document"].nbytes for piece in pieces) < 200_000
    assert np.concatenate([piece.rows for piece in pieces]).tolist() == list(range(60))
    assert [reject.row for piece in pieces for reject in piece.rejects] == [60]

    # As many buckets as the images need, not their addresses.
    words = [f"workspace={tmp_path}/ws", f"corpus.paths={file}", "evaluate.holdout=0", "corpus.part_bytes=65536"]
    config = load_config(None, [*words, "corpus.columns.images=[document]", "train.encoder=backbone"])
    manifest = ingest(config)
    assert manifest.counts.written == 60
    assert sum(part.details.get("role") == "pairs" and part.rows > 0 for part in manifest.parts) > 8


def test_a_bucket_beyond_32_bit_offsets_gives_the_same_corpus(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = [{"query": f"q {n}", "document": f"d {n % 200}", "neg": [f"n {n}"]} for n in range(300)]
    file = write_lines(tmp_path / "pairs.jsonl", [*rows, rows[0]])

    def outcome(name: str) -> tuple[Any, ...]:
        config = configuration(tmp_path / name, [file], columns={"negatives": ["neg"]})
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"holdout": 20})})
        manifest = ingest(config)
        folder = Path(config.workspace) / "corpus/holdout"
        collection = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
        return corpus_rows(config, manifest), manifest.counts, collection

    expected = outcome("small")
    widened: list[pa.Schema] = []
    original = write._with_large_texts
    monkeypatch.setattr(write, "_with_large_texts", lambda schema: widened.append(schema) or original(schema))
    monkeypatch.setattr(write, "_LARGE_BYTES", 0)
    assert outcome("large") == expected
    assert widened

"""Near-duplicate pairs of the corpus itself: set aside on request, the first of them stays, whatever the units are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import RunConfig
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.minhash import PERMUTATIONS, bands
from clusterbatch.corpus.near_duplicates import NEAR_PAIR, entries, near_earlier
from clusterbatch.corpus.write import ASIDE
from clusterbatch.store import Folder, Manifest
from clusterbatch.store.tables import read_parquet
from tests.corpus.test_ingest import corpus_rows, write_lines

_WORDS = [f"word{number}" for number in range(2000)]


def pairs() -> list[dict[str, str]]:
    """300 unlike pairs; then 40 near copies, 40 with another query, 40 with another document: each of a pair before."""
    numbers = random.Random(0)
    rows = [
        {"query": " ".join(numbers.choices(_WORDS, k=30)), "document": " ".join(numbers.choices(_WORDS, k=120))}
        for _ in range(300)
    ]
    for number in range(40):
        like = rows[number]
        near = {"query": like["query"] + " please", "document": f"Well: {like['document']} !"}
        rows += [near, {**near, "query": f"another question {number}"}]
        rows += [{**like, "query": like["query"] + " now", "document": " ".join(numbers.choices(_WORDS, k=120))}]
    return rows


def ingested(folder: Path, name: str, **corpus: Any) -> tuple[RunConfig, Manifest]:
    settings = {"paths": [str(folder / "in")], "part_bytes": 2**16, **corpus}
    config = RunConfig.model_validate({"workspace": str(folder / name), "corpus": settings, "evaluate": {"holdout": 0}})
    return config, ingest(config)


@pytest.mark.parametrize("unit_bytes", [2**15, 2**25])
def test_near_duplicates_are_set_aside_and_kept_with_their_reason(
    tmp_path: Path, in_process: None, unit_bytes: int
) -> None:
    rows = pairs()
    write_lines(tmp_path / "in/one.jsonl", rows[:200])
    write_lines(tmp_path / "in/two.jsonl", rows[200:])
    config, manifest = ingested(tmp_path, "set-aside", near_duplicates="set_aside", unit_bytes=unit_bytes)
    assert manifest.counts.set_aside == {NEAR_PAIR: 40}
    assert manifest.counts.read == len(rows) == manifest.counts.written + 40
    folder = Folder(config.workspace).child("corpus")
    aside = [
        row
        for part in manifest.parts
        if part.details.get("role") == ASIDE
        for row in read_parquet(folder, part.path).to_pylist()
    ]
    assert {row["reason"] for row in aside} == {NEAR_PAIR}
    # Of 120 rows behind the first 300, every third is the near copy.
    assert sorted((Path(row["file"]).name, row["row"]) for row in aside) == [
        ("two.jsonl", 100 + 3 * number) for number in range(40)
    ]
    assert {json.loads(row["content"])["query"] for row in aside} == {row["query"] for row in rows[300::3]}
    kept = {(row["query"], row["document"]) for row in corpus_rows(config, manifest)}
    assert kept == {
        (row["query"], row["document"]) for number, row in enumerate(rows) if number not in range(300, 420, 3)
    }


def test_they_stay_unless_asked_for(tmp_path: Path, in_process: None) -> None:
    rows = pairs()
    write_lines(tmp_path / "in/all.jsonl", rows)
    _, manifest = ingested(tmp_path, "kept")
    assert manifest.counts.written == len(rows)


def test_near_copies_of_a_rejected_row_stay(tmp_path: Path, in_process: None) -> None:
    """The first of three near copies has a vector of another length; it goes, and the second stays for the third."""
    rows: list[Any] = [{**pair, "vector": [1.0, 0.0]} for pair in pairs()[:100]]
    first, *others = (
        {"query": f"{rows[0]['document'][:200]} {n}", "document": f"{rows[0]['document']} {n}", "vector": [1.0, 0.0]}
        for n in range(3)
    )
    write_lines(tmp_path / "in/one.jsonl", [{**first, "vector": [1.0, 0.0, 0.0]}, *others, *rows])
    columns = {"vector": "vector"}
    config, manifest = ingested(tmp_path, "set-aside", near_duplicates="set_aside", columns=columns)
    assert manifest.counts.rejected == manifest.counts.set_aside[NEAR_PAIR] == 1
    queries = {row["query"] for row in corpus_rows(config, manifest)}
    assert {others[0]["query"], others[1]["query"]} & queries == {others[0]["query"]}


def test_pairs_are_found_from_the_threshold_on() -> None:
    """Against the exact Jaccard similarity: far above the threshold all are found, far below none."""
    numbers = random.Random(1)
    document = [f"w{number}" for number in range(400)]
    table: list[dict[str, Any]] = []
    similarities = []
    for row in range(120):
        changed = sorted(numbers.sample(range(398), numbers.randrange(0, 60)))
        words = [f"x{row}-{place}" if place in changed else word for place, word in enumerate(document)]
        one, two = ({tuple(text[place : place + 3]) for place in range(398)} for text in (document, words))
        similarities.append(len(one & two) / len(one | two))
        for text in (document, words):
            table.append(
                {
                    "query": f"the same question about row {row}",
                    "document": " ".join([f"row{row}", *text]),
                    "document_hash": 2 * row,
                    "slice": row,
                    "position": len(table) % 2,
                }
            )
    schema = pa.schema({"document_hash": pa.uint64(), "slice": pa.int64(), "position": pa.int64()})
    rows = pa.Table.from_pylist(table)
    rows = rows.select(["query", "document"]).add_column(2, "document_hash", rows["document_hash"].cast(pa.uint64()))
    for name in ("slice", "position"):
        rows = rows.append_column(schema.field(name), pa.array([row[name] for row in table]))
    found_entries = entries(rows, 0.8).sort_by([("slice", "ascending"), ("position", "ascending")])
    near = near_earlier(found_entries, 0.8)
    found = set(found_entries["slice"].to_numpy()[near].tolist())
    assert all(row in found for row, similarity in enumerate(similarities) if similarity > 0.93)
    assert not any(row in found for row, similarity in enumerate(similarities) if similarity < 0.65)
    assert any(similarity > 0.93 for similarity in similarities)
    assert any(similarity < 0.65 for similarity in similarities)


def test_bands_cover_most_of_a_signature() -> None:
    pieces = bands(0.8)
    covered = np.concatenate([np.arange(PERMUTATIONS)[piece] for piece in pieces])
    assert len(set(covered.tolist())) == len(covered) > PERMUTATIONS // 2

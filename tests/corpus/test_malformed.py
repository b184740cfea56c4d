"""A thousand malformed files of 45 kinds: every row accounted for, a reason for each, no exception."""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clusterbatch.config import RunConfig
from clusterbatch.corpus.ingest import ingest
from tests.corpus.malformed import KINDS
from tests.corpus.reading import read
from tests.corpus.test_ingest import corpus_rows, rejects

FILES = 1000


def test_a_thousand_malformed_files_are_accounted_for(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = random.Random(0)
    kinds: dict[str, str] = {}
    certain: dict[str, int] = {}
    (tmp_path / "in").mkdir()
    for number in range(FILES):
        kind = list(KINDS)[number % len(KINDS)]
        pairs = [(f"query {number} {row}", f"document {number} {row}") for row in range(numbers.randrange(2, 8))]
        extension, content, readable = KINDS[kind](numbers, pairs)
        name = f"file-{number:03d}x.{extension}"
        (tmp_path / "in" / name).write_bytes(content)
        kinds[name] = kind
        if readable is not None:
            certain[name] = readable
    config = RunConfig.model_validate(
        {
            "workspace": str(tmp_path / "ws"),
            "corpus": {
                "paths": [str(tmp_path / "in")],
                "on_error": "reject",
                "too_long": "reject",
                "max_characters": 2000,
            },
            "evaluate": {"holdout": 0},
        }
    )
    manifest = ingest(config)
    rows = corpus_rows(config, manifest)
    refused = rejects(config, manifest)
    assert manifest.counts.read == manifest.counts.written + manifest.counts.rejected
    assert (manifest.counts.written, manifest.counts.rejected) == (len(rows), len(refused))
    written = Counter(row["source"] for row in rows)
    assert {name: written[name.split(".")[0]] for name in certain} == certain
    # Each file has something wrong with it, which is told in one line.
    told = {Path(row["file"]).name for row in refused}
    assert told == set(kinds)
    assert all(row["reason"] and "\n" not in row["reason"] for row in refused)
    said = capsys.readouterr()
    assert not any("Traceback" in text for text in (said.out, said.err, *(row["reason"] for row in refused)))
    print(
        f"{len(kinds)} files of {len(set(kinds.values()))} kinds: {manifest.counts.read} rows read = "
        f"{manifest.counts.written} written + {manifest.counts.rejected} rejected for "
        f"{len({row['reason'] for row in refused})} different reasons"
    )


def test_flipped_bytes_in_parquet_footers_are_reasons_not_exceptions(tmp_path: Path) -> None:
    pairs = {"query": [f"query {row}" for row in range(50)], "document": [f"document {row}" for row in range(50)]}
    file = tmp_path / "pairs.parquet"
    pq.write_table(pa.table(pairs), file)
    data = file.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    broken = 0
    for position in range(len(data) - 8 - length, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0xFF if position % 2 else 0x01
        file.write_bytes(damaged)
        outcome = read(file)
        if outcome.broken is not None:
            broken += 1
            assert "\n" not in outcome.broken
        else:
            # The input has no checksums: what can still be read is taken.
            assert len(outcome.rows) + len(outcome.rejects) == 50
    assert broken > 30

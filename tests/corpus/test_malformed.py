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
from clusterbatch.errors import DataError
from tests.corpus.malformed import KINDS
from tests.corpus.reading import read
from tests.corpus.test_ingest import configuration, corpus_rows, rejects

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


def large_parquet(file: Path) -> None:
    """4,000 rows in 8 row groups of about 50 KB."""
    numbers = random.Random(0)
    columns = {
        name: [f"{name} {row} {numbers.getrandbits(200):x}" for row in range(4000)] for name in ("query", "document")
    }
    pq.write_table(pa.table(columns), file, row_group_size=500)


def test_what_is_lost_in_the_middle_of_a_file_is_told(tmp_path: Path, in_process: None) -> None:
    file = tmp_path / "pairs.parquet"
    large_parquet(file)
    group = pq.ParquetFile(file).metadata.row_group(3)
    data = bytearray(file.read_bytes())
    for column in (group.column(0), group.column(1)):
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    config = configuration(tmp_path, [file], on_error="reject", unit_bytes=len(data) // 12 + 1)
    manifest = ingest(config)
    found = {int(row["query"].split()[1]) for row in corpus_rows(config, manifest)}
    assert found == set(range(4000)) - set(range(1500, 2000))
    [reject] = rejects(config, manifest)
    assert (Path(reject["file"]).name, reject["row"]) == ("pairs.parquet", None)
    assert reject["reason"] in manifest.details["rejects"]
    assert (manifest.counts.read, manifest.counts.written, manifest.counts.rejected) == (3501, 3500, 1)
    with pytest.raises(DataError, match=r"pairs\.parquet"):
        ingest(configuration(tmp_path, [file], unit_bytes=len(data) // 12 + 1), force=True)


def test_a_file_that_is_broken_as_a_whole_has_one_line(tmp_path: Path, in_process: None) -> None:
    for name in ("one", "two"):
        large_parquet(tmp_path / f"{name}.parquet")
        data = (tmp_path / f"{name}.parquet").read_bytes()
        (tmp_path / f"{name}.parquet").write_bytes(data[:-200])
    (tmp_path / "good.jsonl").write_text('{"query": "a question", "document": "an answer"}\n')
    config = configuration(tmp_path, [tmp_path / "*.*"], on_error="reject", unit_bytes=len(data) // 5)
    manifest = ingest(config)
    assert sorted(Path(row["file"]).name for row in rejects(config, manifest)) == ["one.parquet", "two.parquet"]
    assert (manifest.counts.read, manifest.counts.written) == (3, 1)

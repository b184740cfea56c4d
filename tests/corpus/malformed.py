"""Files that are wrong in many ways, for tests: each kind with the rows in it that can be read."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Maker = Callable[[random.Random, list[tuple[str, str]]], tuple[str, bytes, int]]


def _lines(pairs: list[tuple[str, str]]) -> list[bytes]:
    return [json.dumps({"query": query, "document": document}).encode() for query, document in pairs]


def _jsonl(lines: list[bytes], end: bytes = b"\n") -> bytes:
    return end.join(lines) + end


def _csv(pairs: list[tuple[str, str]], extra: list[bytes] = []) -> bytes:  # noqa: B006
    rows = [b"query,document", *(f'"{query}","{document}"'.encode() for query, document in pairs), *extra]
    return b"\n".join(rows) + b"\n"


def _parquet(columns: dict[str, list]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _columns(pairs: list[tuple[str, str]]) -> dict[str, list]:
    return {"query": [query for query, _ in pairs], "document": [document for _, document in pairs]}


def _with_line(line: bytes) -> Maker:
    """A bad line somewhere among good ones."""

    def make(numbers: random.Random, pairs: list[tuple[str, str]]) -> tuple[str, bytes, int]:
        lines = _lines(pairs)
        lines.insert(numbers.randrange(len(lines) + 1), line)
        return "jsonl", _jsonl(lines), len(pairs)

    return make


def _with_row(row: bytes) -> Maker:
    return lambda numbers, pairs: ("csv", _csv(pairs, [row]), len(pairs))


# Name of the kind -> (extension, content, rows that can be read).
KINDS: dict[str, Maker] = {
    "cut in the middle of a line": lambda n, p: ("jsonl", _jsonl(_lines(p))[:-20], len(p) - 1),
    "no JSON": _with_line(b"this is no JSON"),
    "array": _with_line(b'["a", "b"]'),
    "number": _with_line(b"17"),
    "unclosed": _with_line(b'{"query": "a", "document": "b"'),
    "missing key": _with_line(b'{"query": "a"}'),
    "null": _with_line(b'{"query": null, "document": "b"}'),
    "empty": _with_line(b'{"query": "", "document": "b"}'),
    "blank": _with_line('{"query": "a", "document": "\u00a0\u3000 "}'.encode()),
    "wrong type": _with_line(b'{"query": {"text": "a"}, "document": "b"}'),
    "list for a text": _with_line(b'{"query": "a", "document": ["b", 3]}'),
    "boolean": _with_line(b'{"query": true, "document": "b"}'),
    "invalid UTF-8": _with_line(b'{"query": "caf\xe9", "document": "b"}'),
    "lone surrogate": _with_line(b'{"query": "\\ud83d", "document": "b"}'),
    "NaN": _with_line(b'{"query": NaN, "document": "b"}'),
    "deep": _with_line(b"[" * 50_000),
    "NUL bytes": _with_line(b"\0\0\0\0"),
    "too long": _with_line(b'{"query": "a", "document": "' + b"x" * 5000 + b'"}'),
    "extra field": _with_row(b"a,b,c"),
    "lacking field": _with_row(b"alone"),
    "bad quotes": _with_row(b'"a"b,c'),
    "unclosed quote": _with_row(b'a,"never closed'),
    "CSV invalid UTF-8": _with_row(b"a,\xff\xfe\xfd"),
    "CSV blank": _with_row(b'" ",b'),
    "CSV without the columns": lambda n, p: ("csv", b"question,answer\na,b\n", 0),
    "CSV with a column twice": lambda n, p: ("csv", b"query,document,query\na,b,c\n", 0),
    "binary as CSV": lambda n, p: ("csv", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + n.randbytes(300), 0),
    "random bytes as Parquet": lambda n, p: ("parquet", n.randbytes(500), 0),
    "cut Parquet": lambda n, p: ("parquet", _parquet(_columns(p))[:-100], 0),
    "Parquet with a broken footer": lambda n, p: ("parquet", _parquet(_columns(p))[:-12] + b"\xff" * 8 + b"PAR1", 0),
    "Parquet of numbers": lambda n, p: ("parquet", _parquet({"query": [1], "document": [2]}), 0),
    "Parquet without the columns": lambda n, p: ("parquet", _parquet({"text": ["a"]}), 0),
    "Parquet with nulls": lambda n, p: (
        "parquet",
        _parquet({"query": [None, *_columns(p)["query"]], "document": ["d", *_columns(p)["document"]]}),
        len(p),
    ),
    "Parquet with bytes": lambda n, p: (
        "parquet",
        _parquet({name: [b"\xc3\x28", *(text.encode() for text in texts)] for name, texts in _columns(p).items()}),
        len(p),
    ),
    "JSON Lines as Parquet": lambda n, p: ("parquet", _jsonl(_lines(p)), 0),
    "Parquet as JSON Lines": lambda n, p: ("jsonl", _parquet(_columns(p)), 0),
    "plain text as gzip": lambda n, p: ("jsonl.gz", _jsonl(_lines(p)), 0),
    "gzip without its name": lambda n, p: ("jsonl", gzip.compress(_jsonl(_lines(p))), 0),
    "gzip as zstd": lambda n, p: ("jsonl.zst", gzip.compress(_jsonl(_lines(p))), 0),
    "gzip twice": lambda n, p: ("jsonl.gz", gzip.compress(gzip.compress(_jsonl(_lines(p)))), 0),
    "gzip with a wrong checksum": lambda n, p: ("jsonl.gz", gzip.compress(_jsonl(_lines(p)))[:-8] + b"\0" * 8, None),
    "cut zstd": lambda n, p: ("jsonl.zst", zstandard.ZstdCompressor().compress(_jsonl(_lines(p)))[:-10], None),
    "nothing": lambda n, p: ("jsonl", b"", 0),
    "one JSON array": lambda n, p: ("json", json.dumps([{"query": q, "document": d} for q, d in p]).encode(), 0),
    "UTF-16 JSON Lines": lambda n, p: ("jsonl", _jsonl(_lines(p)).decode().encode("utf-16"), 0),
}

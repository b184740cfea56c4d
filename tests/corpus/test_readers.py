"""Every input format gives the same rows; what is not a row is rejected with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.rows import InputColumns, check_columns
from tests.corpus.reading import read

PAIRS = [
    ("what is a cluster", "rows of one source\nnearest one centroid"),
    ('quoted "words", and commas', "tab\tand; semicolon | bar"),
    ("クラスタとは何ですか", "一つの重心に最も近い行のあつまりです。"),
    ("naïve café — ½ €", "Ünïcode \U0001f600"),
]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(delimiter: str, encoding: str = "utf-8", pairs: list[tuple[str, str]] = PAIRS) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([("query", "document"), *pairs])
    return text.getvalue().encode(encoding)


def as_parquet(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


LINES = json_lines([{"query": query, "document": document} for query, document in PAIRS])
TABLE = pa.table({"query": [query for query, _ in PAIRS], "document": [document for _, document in PAIRS]})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pairs.parquet", as_parquet(TABLE)),
        ("pairs.jsonl", LINES),
        ("pairs.ndjson", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("pairs.jsonl.gz", gzip.compress(LINES[:100], mtime=0) + gzip.compress(LINES[100:], mtime=0)),
        ("pairs.json.zst", zstandard.ZstdCompressor().compress(LINES)),
        ("pairs.csv", as_csv(",")),
        ("pairs.csv.gz", gzip.compress(as_csv(";"), mtime=0)),
        ("excel.csv", as_csv(",", "utf-8-sig")),
        ("unicode.csv", as_csv("\t", "utf-16")),
        ("no_extension", LINES),
        ("no_extension_either", as_csv("|")),
    ],
)
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = read(tmp_path / name)
    assert outcome.broken is None
    assert outcome.pairs == PAIRS
    assert outcome.rejects == []
    assert {row["source"] for row in outcome.rows} == {name.split(".")[0]}


def test_tsv_has_quoted_fields_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "pandas.tsv").write_bytes(as_csv("\t"))
    assert read(tmp_path / "pandas.tsv", tsv_quotes=True).pairs == PAIRS
    assert "corpus.tsv_quotes" in read(tmp_path / "pandas.tsv").rejects[0].reason
    plain = [('"starts with a quote', "one"), ('6" pipe', '"whole"'), ("plain", 'ends"'), ("last", "row")]
    (tmp_path / "plain.tsv").write_text("".join(f"{q}\t{d}\n" for q, d in [("query", "document"), *plain]))
    outcome = read(tmp_path / "plain.tsv")
    assert (outcome.pairs, outcome.rejects) == (plain, [])


@pytest.mark.parametrize(
    "bad", [b'a,"never closed', b'"never, closed', b'"a \\" b",c', b'"ends with a backslash \\"",c', b'"a"b,c']
)
@pytest.mark.parametrize("quoted", [True, False])
def test_a_quote_that_is_not_closed_costs_its_own_row_alone(tmp_path: Path, bad: bytes, quoted: bool) -> None:
    good = [(f"query {n}", f"document {n}") for n in range(6)]
    rows = [f'"{q}","{d}"'.encode() if quoted else f"{q},{d}".encode() for q, d in good]
    (tmp_path / "x.csv").write_bytes(b"\n".join([b"query,document", *rows[:2], bad, *rows[2:4], bad, *rows[4:]]))
    outcome = read(tmp_path / "x.csv")
    assert outcome.pairs == good
    assert [reject.row for reject in outcome.rejects] == [2, 5]
    assert all(reject.reason.startswith("not CSV") for reject in outcome.rejects)
    assert [reject.content.encode().strip() for reject in outcome.rejects if reject.content] == [bad, bad]


@pytest.mark.parametrize(
    "bad",
    [
        b'"first line\nsecond "stray" line\nthird",doc',
        b'"say "x" now\nand more",doc',
        b'"first\nsee a, b\nsay "x", now",doc',
        b'"first\n\nafter a blank line, the "last" one",doc',
        b'"escaped \\"as MySQL does\\"\nnot doubled",doc',
        b'a,"stray "x" in\nthe last\nfield"',
        b'"all on "one" line",doc',
        b'"doubled ""here""\nbut not "there" at all",doc',
    ],
)
@pytest.mark.parametrize("quoted", [True, False])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_stray_quote_costs_the_row_with_all_its_lines_for_one_reason(
    tmp_path: Path, bad: bytes, quoted: bool, end: bytes
) -> None:
    good = [(f"query {n}", f"document {n}\nof two lines" if quoted else f"document {n}") for n in range(6)]
    rows = [f'"{q}","{d}"'.encode() if quoted else f"{q},{d}".encode() for q, d in good]
    lines = [b"query,document", *rows[:2], bad, *rows[2:4], bad, *rows[4:]]
    (tmp_path / "x.csv").write_bytes(b"".join(line.replace(b"\n", end) + end for line in lines))
    outcome = read(tmp_path / "x.csv")
    assert [(q, d.replace("\r", "")) for q, d in outcome.pairs] == good
    assert [(reject.row, reject.reason) for reject in outcome.rejects] == [
        (row, "not CSV: a quote inside a quoted field is not doubled") for row in (2, 5)
    ]
    # What is lost is shown whole.
    seen = [(reject.content or "").encode().replace(b"\r", b"").strip() for reject in outcome.rejects]
    assert seen == [bad, bad]


def test_rows_of_csv_with_damaged_quotes_are_never_made_of_pieces(tmp_path: Path) -> None:
    """Whatever quotes are lost or added: a pair is a row of the file, and all others have reasons."""
    random = Random(0)
    # A break inside a query leaves pieces that no reader can tell from rows.
    breaks = ["line\nbreak", 'a, b\nc "d"\n\ne']
    words = ["one", "two, three", 'a "word"', "", 'ends"', '"begins']
    for _ in range(400):
        rows = [(f"q{n} {random.choice(words)}", f"d{n} {random.choice([*words, *breaks])}") for n in range(8)]
        data = bytearray(as_csv(",", pairs=rows))
        quotes = [place for place in range(len("query,document\r\n"), len(data)) if data[place] == ord('"')]
        if quotes and random.random() < 0.7:
            del data[random.choice(quotes)]
        else:
            data.insert(random.randrange(len("query,document\r\n"), len(data)), ord('"'))
        (tmp_path / "x.csv").write_bytes(data)
        outcome = read(tmp_path / "x.csv")
        seen = "".join(reject.content or "" for reject in outcome.rejects)
        for query, document in outcome.pairs:
            query, document = query.replace('"', ""), document.replace('"', "")
            number = query[1:2]
            assert query.startswith(f"q{number} "), (bytes(data), query)
            assert document.startswith(f"d{number} "), (bytes(data), query, document)
            assert re.findall("[qd][0-9]", query + document) == [f"q{number}", f"d{number}"], (bytes(data), document)
            seen += query
        assert set(re.findall("q[0-9]", seen.replace('"', ""))) == {f"q{number}" for number in range(8)}, bytes(data)


def test_what_follows_a_row_of_too_few_fields_is_not_taken_for_a_row_if_it_ends_a_quote(tmp_path: Path) -> None:
    rows = [b"query,document", b"q0,d0", b"q1 opens without a quote", b'and ends with one",d1', b'q2 6" pipe,d2']
    (tmp_path / "x.csv").write_bytes(b"\n".join(rows))
    outcome = read(tmp_path / "x.csv")
    assert outcome.pairs == [("q0", "d0"), ('q2 6" pipe', "d2")]
    assert [(reject.row, reject.reason) for reject in outcome.rejects] == [
        (1, "1 fields, the header has 2"),
        (2, "a quote inside a field that is not quoted"),
    ]


@pytest.mark.parametrize(
    ("head", "delimiter"),
    [
        (b'"query","docu\nment",note\n', ","),
        (b"sep=;\r\nquery;docu\nment;note\n".replace(b"docu\nment", b'"docu\nment"'), ";"),
        (b'note|"docu\nment"|query\n', "|"),
    ],
)
def test_a_header_of_several_lines_as_spreadsheets_write_it(tmp_path: Path, head: bytes, delimiter: str) -> None:
    names = ["note", "docu\nment", "query"] if delimiter == "|" else ["query", "docu\nment", "note"]
    row = {"query": "a query", "docu\nment": '"an\nanswer"', "note": "3"}
    (tmp_path / "x.csv").write_bytes(head + delimiter.join(row[name] for name in names).encode() + b"\n")
    outcome = read(tmp_path / "x.csv", columns={"document": "docu\nment"})
    assert (outcome.broken, outcome.rejects, outcome.pairs) == (None, [], [("a query", "an\nanswer")])


@pytest.mark.parametrize("unit_bytes", [4096, 5000, 10_000_000])
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_slices_cover_every_row_once_and_in_order(tmp_path: Path, unit_bytes: int, extension: str) -> None:
    rows = [{"query": f"query {number}", "document": "x" * (number * 37 % 900) + "y"} for number in range(400)]
    path = tmp_path / f"pairs.{extension}"
    if extension == "jsonl":
        path.write_bytes(json_lines(rows))
    else:
        path.write_bytes(as_parquet(pa.Table.from_pylist(rows), row_group_size=7, compression="none"))
    outcome = read(path, unit_bytes=unit_bytes)
    assert [row["query"] for row in outcome.rows] == [row["query"] for row in rows]


def test_japanese_csv_in_cp932_is_recognised(tmp_path: Path) -> None:
    japanese = [("注文をキャンセルできますか", "はい、発送の前であればできます。①～"), ("送料は", "無料です")]
    (tmp_path / "faq.csv").write_bytes(as_csv(",", "cp932", japanese))
    assert read(tmp_path / "faq.csv").pairs == japanese
    (tmp_path / "faq.jsonl").write_bytes(
        "".join(json.dumps({"query": q, "document": d}, ensure_ascii=False) + "\n" for q, d in japanese).encode("cp932")
    )
    assert read(tmp_path / "faq.jsonl").pairs == japanese


def test_latin_1_is_not_taken_for_japanese_but_read_when_named(tmp_path: Path) -> None:
    french = [("où est la gare", "à côté de l'église"), ("plain", "text")]
    (tmp_path / "fr.csv").write_bytes(as_csv(",", "latin-1", french))
    outcome = read(tmp_path / "fr.csv")
    assert outcome.pairs == [french[1]]
    assert [reject.row for reject in outcome.rejects] == [0]
    assert "encoding" in outcome.rejects[0].reason
    assert read(tmp_path / "fr.csv", encoding="latin-1").pairs == french


def test_hugging_face_export_with_list_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "anchor": pa.array(["a query"] * 3, pa.large_string()),
            "positive": pa.array(["first text", "second text", "third text"]).dictionary_encode(),
            "negatives": pa.array([["no", "nor this"], [], None], pa.list_(pa.large_string())),
            "score": pa.array([1, None, 2], pa.int64()),
            "label": pa.array([7, 8, None], pa.int32()),
            "book": pa.array([3, 3, 4], pa.int64()),
        }
    )
    (tmp_path / "train-00000-of-00002.parquet").write_bytes(as_parquet(table))
    columns = {"query": "anchor", "document": "positive", "negatives": "negatives", "weight": "score", "group": "label"}
    columns["document_id"] = "book"
    outcome = read(tmp_path / "train-00000-of-00002.parquet", columns=columns)
    assert outcome.pairs == [("a query", "first text"), ("a query", "second text"), ("a query", "third text")]
    assert [row["negatives"] for row in outcome.rows] == [["no", "nor this"], [], []]
    assert [row["weight"] for row in outcome.rows] == [1.0, 1.0, 2.0]
    assert [row["group"] for row in outcome.rows] == ["7", "8", None]
    assert [row["document_id"] for row in outcome.rows] == ["3", "3", "4"]
    assert {row["source"] for row in outcome.rows} == {"train"}


def test_source_is_a_constant_a_column_or_the_name_of_the_file(tmp_path: Path) -> None:
    rows = [{"query": "a b", "document": "c", "source": "given", "site": "elsewhere"}, {"query": "d", "document": "e"}]
    (tmp_path / "faq.jsonl").write_bytes(json_lines(rows))
    assert [row["source"] for row in read(tmp_path / "faq.jsonl").rows] == ["given", "faq"]
    assert [row["source"] for row in read(tmp_path / "faq.jsonl", source="one").rows] == ["one", "one"]
    outcome = read(tmp_path / "faq.jsonl", columns={"source": "site"})
    # Writers leave nulls out.
    assert ([row["source"] for row in outcome.rows], outcome.rejects) == (["elsewhere", "faq"], [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[1, 2]", "not a JSON object but list"),
        (b'"text"', "not a JSON object but str"),
        (b'{"query": "a"}', "document: no column 'document'"),
        (b'{"query": null, "document": "a"}', "query: null"),
        (b'{"query": "", "document": "a"}', "query: empty or whitespace"),
        ('{"query": "a", "document": "\u3000 \\t\\n"}'.encode(), "document: empty or whitespace"),
        (b'{"query": 3, "document": "a"}', "query: int instead of text"),
        (b'{"query": "a", "document": ["b", 3]}', "document: int instead of text"),
        (b'{"query": "a", "document": []}', "document: null"),
        (b'{"query": ["a"], "document": "b"}', "query: list instead of text"),
        (b'{"query": "a", "document": "\xff\xfe"}', "invalid UTF-8 at byte 28"),
        (b'{"query": "a", "document": "\\ud800"}', "document: invalid bytes"),
        (b'{"query": "a", "document": "' + b"x" * 101 + b'"}', "document: more than 100 characters"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"query": "a", "document": "b", "n": ' + b"9" * 5000 + b"}", "an integer with too many digits"),
        (b'{"query": "a", "document": "b", "pair_id": 1' + b"0" * 4999 + b"}", "an integer with too many digits"),
    ],
)
def test_each_bad_line_is_rejected_with_its_place_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    good = b'{"query": "a good", "document": "row"}'
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good, line, good]))
    outcome = read(tmp_path / "x.jsonl", too_long="reject", max_characters=100)
    assert outcome.pairs == [("a good", "row")] * 2
    [reject] = outcome.rejects
    assert reject.row == 1
    assert reject.reason.startswith(reason)
    assert reject.content


def test_numbers_beyond_what_can_be_stored_are_rejected(tmp_path: Path) -> None:
    large = 10**400
    lines = [{"query": f"q{row}", "document": "d", "w": 1, "v": [1.0]} for row in range(3)]
    lines[1]["w"], lines[2]["v"] = large, [large]
    (tmp_path / "x.jsonl").write_bytes(json_lines(lines))
    outcome = read(tmp_path / "x.jsonl", columns={"weight": "w", "vector": "v"})
    assert [row["query"] for row in outcome.rows] == ["q0"]
    assert [reject.reason for reject in outcome.rejects] == [
        "weight: an integer that is too large",
        "vector: an integer that is too large",
    ]
    (tmp_path / "x.csv").write_bytes(b"query,document,v\nq,d," + b"[" * 100_000 + b"\n")
    [reject] = read(tmp_path / "x.csv", columns={"vector": "v"}).rejects
    assert reject.reason == "vector: str instead of a list of numbers"


def test_long_text_is_cut_by_default(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines([{"query": "q", "document": "é" * 300}]))
    assert read(tmp_path / "x.jsonl", max_characters=100).pairs == [("q", "é" * 100)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"only one field", "1 fields, the header has 2"),
        (b"a,b,c", "3 fields, the header has 2"),
        (b'"a"b,c', "not CSV"),
        (b"a,\xff\xff", "document: invalid bytes"),
    ],
)
def test_each_bad_csv_row_is_rejected_with_its_place_and_reason(tmp_path: Path, row: bytes, reason: str) -> None:
    (tmp_path / "x.csv").write_bytes(b"\n".join([b"query,document", b'"a\nb",good', row, b"c,good"]))
    outcome = read(tmp_path / "x.csv")
    assert outcome.pairs == [("a\nb", "good"), ("c", "good")]
    assert [(reject.row, reject.reason.startswith(reason)) for reject in outcome.rejects] == [(1, True)]


def test_parquet_text_that_is_not_utf_8_is_rejected_by_row(tmp_path: Path) -> None:
    table = pa.table({"query": [b"fine", b"\xff", b"fine too"], "document": ["a", "b", "c"]})
    (tmp_path / "x.parquet").write_bytes(as_parquet(table))
    outcome = read(tmp_path / "x.parquet")
    assert outcome.pairs == [("fine", "a"), ("fine too", "c")]
    assert [(reject.row, reject.reason) for reject in outcome.rejects] == [(1, "query: invalid UTF-8")]


PARQUET = as_parquet(pa.table({"query": ["a"] * 2000, "document": [f"text {n}" for n in range(2000)]}))
ZIPPED = gzip.compress(LINES, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", PARQUET[: len(PARQUET) // 2], ""),
        ("b.parquet", LINES, "not what its name says: no Parquet file"),
        ("c.jsonl", PARQUET, "not what its name says: no JSON Lines"),
        ("d.jsonl.gz", LINES, "not what its name says: gzip by name, not compressed by content"),
        ("e.jsonl", ZIPPED, "not what its name says: not compressed by name, gzip by content"),
        ("f.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], "Compressed file ended before the end"),
        ("g.jsonl.zst", ZIPPED, "not what its name says: zstd by name, gzip by content"),
        ("h.jsonl.gz", gzip.compress(ZIPPED, mtime=0), "compressed twice"),
        ("i.jsonl", b"", "empty file"),
        ("j.json", b'\n [{"query": "a", "document": "b"}]', "one JSON array"),
        ("k.csv", b"question,answer\na,b\n", "no column query, document (has: question, answer)"),
        ("l.parquet", as_parquet(pa.table({"query": ["a"]})), "no column document (has: query)"),
        ("m.parquet", as_parquet(pa.table({"query": [1], "document": ["a"]})), "column query is int64, expected text"),
        ("n.csv", b"query,document,query\na,b,c\n", "column query occurs twice"),
        ("o.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not what its name says: binary data"),
        ("p.jsonl", LINES.decode().encode("utf-16"), "UTF-16 text"),
        ("q.parquet.gz", gzip.compress(PARQUET, mtime=0), "a compressed Parquet file"),
    ],
)
def test_each_broken_file_has_a_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = read(tmp_path / name)
    assert outcome.broken is not None
    assert outcome.broken.startswith(reason)
    assert "\n" not in outcome.broken


def test_a_configuration_that_was_written_and_read_again_means_the_same() -> None:
    config = CorpusConfig(paths=["x"])
    again = CorpusConfig.model_validate_json(config.model_dump_json())
    assert InputColumns.of(again) == InputColumns.of(config)
    check_columns(["query", "document"], InputColumns.of(again))


def test_rows_without_a_document_id_are_rejected(tmp_path: Path) -> None:
    rows = [{"query": f"q{number}", "document": "d", "book": book} for number, book in enumerate(["a", None, "", 7])]
    rows.append({"query": "q4", "document": "d"})
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "none.jsonl").write_text(json.dumps({"query": "q", "document": "d"}))
    columns = {"document_id": "book"}
    outcome = read(tmp_path / "x.jsonl", columns=columns)
    assert [row["document_id"] for row in outcome.rows] == ["a", "7"]
    assert {reject.row: reject.reason for reject in outcome.rejects} == dict.fromkeys(
        (1, 2, 4), "document_id: null or empty"
    )
    none = read(tmp_path / "none.jsonl", columns=columns)
    assert not none.rows

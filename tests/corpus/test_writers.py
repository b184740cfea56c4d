"""Files as data frame libraries, databases and makers of data sets write them, each written by what writes it."""

from __future__ import annotations

import csv
import gzip
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from clusterbatch.corpus.ingest import ingest
from clusterbatch.errors import ClusterbatchError
from tests.corpus.reading import Outcome, read
from tests.corpus.test_ingest import configuration, corpus_rows, rejects

ROWS: dict[str, list[Any]] = {
    "query": ["what is a cluster", 'a "quoted" question', "クラスタとは"],
    "document": ["rows,\nnearest to\tone centroid", "6\" pipes; and 'more'", "一つの重心に最も近い行"],
    "neg": [["one"], ["two", "three"], []],
    "w": [1, 2, 3],
    "group": ["x", "y", "x"],
    "v": [[0.5, 1.0], [1.0, 0.0], [0.25, 0.25]],
}
COLUMNS = {"negatives": ["neg"], "weight": "w", "group": "group", "vector": "v"}


def check(outcome: Outcome, lists: bool = True) -> None:
    assert (outcome.broken, outcome.rejects) == (None, [])
    rows = sorted(outcome.rows, key=lambda row: ROWS["query"].index(row["query"]))
    for name, column in [("query", "query"), ("document", "document"), ("weight", "w"), ("group", "group")]:
        assert [row[name] for row in rows] == ROWS[column]
    if lists:
        assert [row["negatives"] for row in rows] == ROWS["neg"]
        assert all(len(row["document_vector"]) == 2 for row in rows)


@pytest.mark.parametrize("kind", ["object", "string", "category"])
def test_pandas(tmp_path: Path, kind: str) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame["group"] = frame["group"].astype(kind)
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_json(tmp_path / "x.jsonl", orient="records", lines=True)
    for name in ("x.parquet", "x.jsonl"):
        check(read(tmp_path / name, columns=COLUMNS))
    plain = frame[["query", "document", "w", "group"]]
    columns = {"weight": "w", "group": "group"}
    plain.to_csv(tmp_path / "x.csv", index=False)
    check(read(tmp_path / "x.csv", columns=columns), lists=False)
    plain.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    check(read(tmp_path / "x.tsv", columns=columns, tsv_quotes=True), lists=False)
    plain.to_parquet(tmp_path / "parts", partition_cols=["group"])
    rows = [row for path in (tmp_path / "parts").rglob("*.parquet") for row in read(path, columns=columns).rows]
    assert {(row["query"], row["group"], row["source"]) for row in rows} == {
        (query, group, f"group={group}") for query, group in zip(ROWS["query"], ROWS["group"], strict=True)
    }


def test_polars(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(ROWS).with_columns(
        polars.col("v").cast(polars.Array(polars.Float32, 2)), polars.col("group").cast(polars.Categorical)
    )
    frame.write_parquet(tmp_path / "x.parquet")
    frame.write_ndjson(tmp_path / "x.jsonl")
    for name in ("x.parquet", "x.jsonl"):
        check(read(tmp_path / name, columns=COLUMNS))
    frame.select("query", "document", "w", "group").write_csv(tmp_path / "x.csv")
    check(read(tmp_path / "x.csv", columns={"weight": "w", "group": "group"}), lists=False)


def test_duckdb(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    connection.execute(
        'create table pairs (query text, document text, neg text[], w decimal(18, 3), "group" text, v float[], id uuid)'
    )
    for row in zip(*ROWS.values(), strict=True):
        connection.execute("insert into pairs values (?, ?, ?, ?, ?, ?, uuid())", list(row))
    connection.execute(f"copy pairs to '{tmp_path}/x.parquet' (format parquet)")
    connection.execute(f"copy pairs to '{tmp_path}/x.jsonl' (format json)")
    for name in ("x.parquet", "x.jsonl"):
        outcome = read(tmp_path / name, columns={**COLUMNS, "pair_id": "id"})
        check(outcome)
        assert all(row["pair_id"].count("-") == 4 for row in outcome.rows)
    connection.execute(f"copy pairs to '{tmp_path}/hive' (format parquet, partition_by (\"group\"))")
    files = list((tmp_path / "hive").rglob("*.parquet"))
    rows = [row for path in files for row in read(path, columns=COLUMNS).rows]
    assert sorted(row["group"] for row in rows) == ["x", "x", "y"]
    assert {row["source"] for row in rows} == {"group=x", "group=y"}


def test_fastparquet(tmp_path: Path) -> None:
    fastparquet = pytest.importorskip("fastparquet")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({name: ROWS[name] for name in ("query", "document", "w", "group")})
    fastparquet.write(str(tmp_path / "x.parquet"), frame)
    check(read(tmp_path / "x.parquet", columns={"weight": "w", "group": "group"}), lists=False)


# Kinds of files by name: what writes one below a folder, with the packages it needs. It returns configuration beside
# `corpus.paths`, and under "expected" the columns that are to be found (all, if it says none) and the source.
Writer = Callable[[Path], dict[str, Any]]
KINDS: dict[str, tuple[Writer, tuple[str, ...]]] = {}
CELLS = ["query", "document", "weight", "group"]
CELL_COLUMNS = {"weight": "w", "group": "group"}
ALL_COLUMNS = {"negatives": ["neg"], "weight": "w", "group": "group"}
TABLE = pa.table({name: ROWS[name] for name in ("query", "document", "neg", "w", "group")})
FRAME = {name: ROWS[name] for name in ("query", "document", "w", "group")}


def kind(name: str, *packages: str) -> Callable[[Writer], Writer]:
    def register(writer: Writer) -> Writer:
        KINDS[name] = (writer, packages)
        return writer

    return register


def cells(source: str = "x", **config: Any) -> dict[str, Any]:
    return {"columns": CELL_COLUMNS, "expected": CELLS, "source": source, **config}


def everything(source: str | None = "x", **config: Any) -> dict[str, Any]:
    return {"columns": ALL_COLUMNS, "expected": [*CELLS, "negatives"], "source": source, **config}


def lines(path: Path, rows: list[Any], opener: Any = open) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def inside(folder: Path, name: str) -> Path:
    """A path in the folder that is read."""
    path = folder / "in" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def rows_of() -> list[dict[str, Any]]:
    return TABLE.to_pylist()


@kind("pandas: CSV with the index, all quoted, semicolons and a mark, as for Excel", "pandas")
def _(folder: Path) -> dict[str, Any]:
    _frame().to_csv(folder / "x.csv", sep=";", quoting=csv.QUOTE_ALL, encoding="utf-8-sig", lineterminator="\r\n")
    return cells()


@kind("pandas: compressed CSV, written in two goes with the header twice", "pandas")
def _(folder: Path) -> dict[str, Any]:
    _frame().iloc[:1].to_csv(folder / "x.csv.gz", index=False, compression="gzip")
    _frame().iloc[1:].to_csv(folder / "x.csv.gz", index=False, compression="gzip", mode="a")
    return {**cells(), "rejects": ["the header again"]}


@kind("pandas: JSON Lines with escapes, compressed", "pandas")
def _(folder: Path) -> dict[str, Any]:
    _frame(neg=True).to_json(folder / "x.jsonl.gz", orient="records", lines=True, force_ascii=True)
    return everything()


@kind("pandas: Parquet with a named index and Arrow's types, brotli", "pandas")
def _(folder: Path) -> dict[str, Any]:
    frame = _frame(neg=True).convert_dtypes(dtype_backend="pyarrow")
    frame.index.name = "row"
    frame.to_parquet(folder / "x.parquet", compression="brotli")
    return everything()


@kind("pandas: Feather", "pandas")
def _(folder: Path) -> dict[str, Any]:
    _frame(neg=True).to_feather(folder / "x.feather", compression="lz4")
    return everything()


@kind("pandas: one JSON array", "pandas")
def _(folder: Path) -> dict[str, Any]:
    _frame().to_json(folder / "x.json", orient="records")
    return {"refused": "one JSON array"}


@kind("pandas: Parquet by fastparquet, lists as JSON, in hive layout with metadata files", "pandas", "fastparquet")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("fastparquet").write(
        str(folder / "in"),
        _frame(neg=True),
        file_scheme="hive",
        partition_on=["group"],
        object_encoding={"query": "utf8", "document": "utf8", "neg": "json", "group": "utf8"},
    )
    return everything(None)


@kind("fastparquet: texts as bytes, categories, gzip", "pandas", "fastparquet")
def _(folder: Path) -> dict[str, Any]:
    frame = _frame()
    frame["query"] = frame["query"].str.encode("utf-8").astype(object)
    frame["group"] = frame["group"].astype("category")
    encoding = {"query": "bytes", "document": "utf8"}
    importlib.import_module("fastparquet").write(
        str(folder / "x.parquet"), frame, compression="GZIP", object_encoding=encoding
    )
    return cells()


@kind("Arrow: Parquet with data pages of version 2, delta encodings and checksums, zstd")
def _(folder: Path) -> dict[str, Any]:
    encodings = {"query": "DELTA_BYTE_ARRAY", "document": "DELTA_LENGTH_BYTE_ARRAY", "w": "DELTA_BINARY_PACKED"}
    pq.write_table(
        TABLE,
        folder / "x.parquet",
        use_dictionary=False,
        column_encoding=encodings,
        data_page_version="2.0",
        compression="zstd",
        write_page_checksum=True,
    )
    return everything()


@kind("Arrow: a data set in hive layout with empty parts, _metadata and _common_metadata")
def _(folder: Path) -> dict[str, Any]:
    pyarrow.dataset.write_dataset(
        TABLE, folder / "in", format="parquet", partitioning=["group"], partitioning_flavor="hive"
    )
    pq.write_metadata(TABLE.schema, folder / "in/_common_metadata")
    pq.write_table(TABLE.schema.empty_table().drop_columns(["group"]), folder / "in/group=y/part-7.parquet")
    return everything(None)


def _in_types(texts: pa.DataType, listed: Callable[[pa.DataType], pa.DataType]) -> pa.Table:
    of_text = {name: pa.array(ROWS[name], texts) for name in ("query", "document")}
    return pa.table({**of_text, "neg": pa.array(ROWS["neg"], listed(texts)), "w": ROWS["w"], "group": ROWS["group"]})


def _arrow(path: Path, table: pa.Table, new: Callable[..., Any], batch: int | None = None, **options: Any) -> None:
    with new(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, batch)


@kind("Arrow: a stream of string views and list views, one row a batch")
def _(folder: Path) -> dict[str, Any]:
    _arrow(folder / "x.arrow", _in_types(pa.string_view(), pa.list_view), pa.ipc.new_stream, 1)
    return everything()


@kind("Arrow: a file of large strings and large list views, lz4")
def _(folder: Path) -> dict[str, Any]:
    _arrow(folder / "x.arrow", _in_types(pa.large_string(), pa.large_list_view), pa.ipc.new_file, 2, compression="lz4")
    return everything()


@kind("Arrow: a stream of dictionaries that grow from batch to batch, and of runs")
def _(folder: Path) -> dict[str, Any]:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3], pa.int32()), pa.array(ROWS["w"]))
    table = TABLE.set_column(4, "group", TABLE["group"].combine_chunks().dictionary_encode())
    table = table.set_column(0, "query", pa.array(ROWS["query"]).dictionary_encode()).set_column(3, "w", runs)
    _arrow(folder / "x.arrow", table, pa.ipc.new_stream, 1, emit_dictionary_deltas=True)
    return everything()


class _Text(pa.ExtensionType):
    """An extension type that nobody has registered who reads it."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.text")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> pa.ExtensionType:
        return cls()


@kind("Arrow: extension types, in Parquet")
def _(folder: Path) -> dict[str, Any]:
    texts = pa.ExtensionArray.from_storage(_Text(), pa.array(ROWS["query"]))
    pq.write_table(TABLE.set_column(0, "query", texts), folder / "x.parquet")
    return everything()


@kind("Arrow: CSV")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("pyarrow.csv").write_csv(TABLE.drop_columns(["neg"]), folder / "x.csv")
    return cells()


@kind("Arrow: ORC beside what is read")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("pyarrow.orc").write_table(TABLE, inside(folder, "old.orc"))
    pq.write_table(TABLE, inside(folder, "x.parquet"))
    return everything(skipped="old.orc")


@kind("polars: Parquet of string views, categories and fixed arrays", "polars")
def _(folder: Path) -> dict[str, Any]:
    polars = importlib.import_module("polars")
    frame = polars.DataFrame({**FRAME, "neg": ROWS["neg"]}).with_columns(polars.col("group").cast(polars.Categorical))
    frame.with_columns(polars.col("w").cast(polars.Decimal(12, 2))).write_parquet(folder / "x.parquet")
    return everything()


@kind("polars: IPC", "polars")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("polars").DataFrame({**FRAME, "neg": ROWS["neg"]}).write_ipc(
        folder / "x.ipc", compression="zstd"
    )
    return everything()


@kind("polars: IPC stream", "polars")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("polars").DataFrame({**FRAME, "neg": ROWS["neg"]}).write_ipc_stream(folder / "x.arrow")
    return everything()


@kind("polars: CSV with all quoted, and JSON Lines of enums", "polars")
def _(folder: Path) -> dict[str, Any]:
    polars = importlib.import_module("polars")
    frame = polars.DataFrame(FRAME).with_columns(polars.col("group").cast(polars.Enum(["x", "y"])))
    frame.head(2).write_csv(inside(folder, "x.csv"), quote_style="always", separator="|")
    frame.tail(1).write_ndjson(inside(folder, "x.jsonl"))
    return cells()


@kind("DuckDB: CSV of nulls, separated by bars", "duckdb")
def _(folder: Path) -> dict[str, Any]:
    _duckdb(
        f"copy pairs to '{folder}/x.csv' (header, delimiter '|', force_quote (query))", 'query, document, w, "group"'
    )
    return cells()


@kind("DuckDB: Parquet of enums, a file a thread", "duckdb")
def _(folder: Path) -> dict[str, Any]:
    types = "query, document, neg, w::hugeint as w, \"group\"::enum('x', 'y') as \"group\""
    _duckdb(f"copy pairs to '{folder}/in' (format parquet, codec zstd, per_thread_output true)", types)
    return everything("in")


@kind("DuckDB: compressed JSON Lines", "duckdb")
def _(folder: Path) -> dict[str, Any]:
    _duckdb(f"copy pairs to '{folder}/x.json.gz' (format json, compression gzip)", "*")
    return everything()


@kind("DuckDB: a JSON array", "duckdb")
def _(folder: Path) -> dict[str, Any]:
    _duckdb(f"copy pairs to '{folder}/x.json' (format json, array true)", "*")
    return {"refused": "one JSON array"}


@kind("DataFusion: Parquet and CSV", "datafusion")
def _(folder: Path) -> dict[str, Any]:
    context = importlib.import_module("datafusion").SessionContext()
    context.from_arrow(TABLE.slice(0, 1)).write_parquet(str(folder / "in/a"))
    context.from_arrow(TABLE.slice(1, 2)).write_json(str(folder / "in/b"))
    return everything(None)


@kind("Delta: a table", "deltalake")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("deltalake").write_deltalake(str(folder / "in"), TABLE)
    return {"refused": "is a table of Delta"}


@kind("Spark: Parquet with _SUCCESS and checksums, in partitions", "pyspark")
def _(folder: Path) -> dict[str, Any]:
    _spark().write.partitionBy("group").parquet(str(folder / "in"))
    assert (folder / "in/_SUCCESS").exists()
    return everything(None)


@kind("Spark: Parquet with legacy lists and INT96", "pyspark")
def _(folder: Path) -> dict[str, Any]:
    frame = _spark()
    for key, value in [("parquet.writeLegacyFormat", "true"), ("parquet.outputTimestampType", "INT96")]:
        frame.sparkSession.conf.set(f"spark.sql.{key}", value)
    frame.selectExpr("*", "current_timestamp() as time", "struct(w, neg) as nested").write.parquet(str(folder / "in"))
    return everything("in")


@kind("Spark: JSON, which leaves nulls out", "pyspark")
def _(folder: Path) -> dict[str, Any]:
    _spark().selectExpr("*", "nullif(w, 1) as v").repartition(3).write.json(str(folder / "in"), compression="gzip")
    return {**everything("in"), "columns": {**ALL_COLUMNS, "weight": "v"}, "null": 1}


@kind("Spark: CSV, whose quotes are escaped by backslashes", "pyspark")
def _(folder: Path) -> dict[str, Any]:
    _spark().drop("neg").coalesce(1).write.csv(str(folder / "in"), header=True)
    return {**cells("in"), "rejects": ["not CSV: a quote inside a quoted field is not doubled"], "lost": 1}


@kind("Spark: CSV with doubled quotes", "pyspark")
def _(folder: Path) -> dict[str, Any]:
    frame = _spark().drop("neg")
    frame.coalesce(1).write.csv(str(folder / "in"), header=True, escape='"', ignoreLeadingWhiteSpace=False)
    return cells("in")


@kind("Spark-style: Parquet by Arrow with INT96 and an older version of the format")
def _(folder: Path) -> dict[str, Any]:
    table = TABLE.append_column("time", pa.array([0, 1, 2], pa.timestamp("us")))
    path = inside(folder, "part-00000-1b9d6bcd-bbfd-4b2d-9b5d-ab8dfbbd4bed-c000.snappy.parquet")
    options: dict[str, Any] = {"flavor": "spark", "version": "1.0", "use_deprecated_int96_timestamps": True}
    pq.write_table(table, path, use_compliant_nested_type=False, **options)
    for name in ("_SUCCESS", f".{path.name}.crc"):
        (folder / "in" / name).write_bytes(b"")
    return everything("in")


@kind("Hugging Face: a data set saved to disk, with a cache beside it", "datasets")
def _(folder: Path) -> dict[str, Any]:
    datasets = importlib.import_module("datasets")
    made = datasets.Dataset(TABLE)
    datasets.DatasetDict({"train": made}).save_to_disk(str(folder / "in/mine"), num_proc=1)
    loaded = datasets.load_from_disk(str(folder / "in/mine"))["train"]
    loaded.map(lambda row: {"query": "mapped"})
    assert list((folder / "in/mine/train").glob("cache-*.arrow"))
    return everything("mine")


@kind("Hugging Face: a data set with shuffled indices, saved to disk", "datasets")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("datasets").Dataset(TABLE).shuffle(seed=1).save_to_disk(str(folder / "in"))
    return everything("in")


@kind("Hugging Face: Parquet of class labels", "datasets")
def _(folder: Path) -> dict[str, Any]:
    datasets = importlib.import_module("datasets")
    made = datasets.Dataset(TABLE).class_encode_column("group")
    made.to_parquet(folder / "train-00000-of-00001.parquet")
    return {**everything("train"), "group": {"x": "0", "y": "1"}}


@kind("Hugging Face: JSON Lines", "datasets")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("datasets").Dataset(TABLE).to_json(folder / "x.jsonl")
    return everything()


@kind("Hugging Face: CSV", "datasets")
def _(folder: Path) -> dict[str, Any]:
    importlib.import_module("datasets").Dataset(TABLE).remove_columns("neg").to_csv(folder / "x.csv")
    return cells()


@kind("BigQuery: JSON Lines with integers as texts, without nulls, with records and repeated fields")
def _(folder: Path) -> dict[str, Any]:
    rows = [{**row, "w": str(row["w"]), "meta": {"tags": [{"k": "a"}]}, "neg": row["neg"] or None} for row in rows_of()]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    lines(folder / "in/000000000000.json", rows[:2])
    # A shard in which no row has the field.
    lines(folder / "in/000000000001.json", rows[2:])
    return everything("in")


@kind("BigQuery: Parquet with lists of `item`")
def _(folder: Path) -> dict[str, Any]:
    pq.write_table(TABLE, folder / "pairs-000000000000.parquet", use_compliant_nested_type=False, compression="snappy")
    return everything("pairs")


def _passages(texts: list[str]) -> list[dict[str, str]]:
    return [{"docid": str(number), "title": "", "text": text} for number, text in enumerate(texts)]


def _with_passages() -> list[dict[str, Any]]:
    return [
        {
            "query_id": str(number),
            "query": row["query"],
            "positive_passages": _passages([row["document"]]),
            "negative_passages": _passages(row["neg"]),
        }
        for number, row in enumerate(rows_of())
    ]


PASSAGES = {
    "columns": {"document": "positive_passages", "negatives": ["negative_passages"]},
    "expected": ["query", "document", "negatives"],
}


@kind("Tevatron: JSON Lines of passages")
def _(folder: Path) -> dict[str, Any]:
    lines(folder / "train.jsonl.gz", _with_passages(), gzip.open)
    return {**PASSAGES, "source": "train"}


@kind("MIRACL: passages, as Hugging Face converts them to Parquet")
def _(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.Table.from_pylist(_with_passages()), folder / "0000.parquet")
    return PASSAGES


@kind("DPR: contexts, one object a line")
def _(folder: Path) -> dict[str, Any]:
    rows = [
        {"question": row["query"], "answers": [], "positive_ctxs": _passages([row["document"]])}
        | {"hard_negative_ctxs": [{**each, "score": 1.5} for each in _passages(row["neg"])]}
        for row in rows_of()
    ]
    lines(folder / "x.jsonl", rows)
    names = {"query": "question", "document": "positive_ctxs", "negatives": ["hard_negative_ctxs"]}
    return {**PASSAGES, "columns": names, "source": "x"}


@kind("FlagEmbedding: lists of positives and negatives with scores")
def _(folder: Path) -> dict[str, Any]:
    rows = [
        {"query": row["query"], "pos": [row["document"]], "neg": row["neg"], "pos_scores": [0.9], "prompt": "find"}
        for row in rows_of()
    ]
    lines(folder / "x.jsonl", rows)
    return {**PASSAGES, "columns": {"document": "pos", "negatives": ["neg"]}, "source": "x"}


@kind("Sentence Transformers: a column for each negative")
def _(folder: Path) -> dict[str, Any]:
    rows = rows_of()
    columns = {"anchor": [row["query"] for row in rows], "positive": [row["document"] for row in rows]}
    for number in range(2):
        columns[f"negative_{number + 1}"] = [[*row["neg"], None, None][number] for row in rows]
    pq.write_table(pa.table(columns), folder / "triplets-00000-of-00001.parquet")
    names = {"query": "anchor", "document": "positive", "negatives": ["negative_1", "negative_2"]}
    return {**PASSAGES, "columns": names, "source": "triplets"}


def _judged(folder: Path, judgements: dict[str, str], texts: str) -> None:
    """Documents d0 to d2 and queries q0 to q2 in BEIR's layout or (texts: "tsv") MS MARCO's, with judgement files."""
    folder.mkdir(parents=True)
    named = [(f"q{n}", query, f"d{n}", document) for n, (query, document) in enumerate(_one_line())]
    if texts == "tsv":
        (folder / "collection.tsv").write_text("".join(f"{d}\t{text}\n" for *_, d, text in named))
        (folder / "queries.train.tsv").write_text("".join(f"{q}\t{text}\n" for q, text, *_ in named))
    else:
        opener = gzip.open if texts.endswith("gz") else open
        lines(
            folder / f"corpus.{texts}",
            [{"_id": d, "title": "", "text": t, "metadata": {}} for *_, d, t in named],
            opener,
        )
        lines(folder / f"queries.{texts}", [{"_id": q, "text": text} for q, text, *_ in named], opener)
    for name, text in judgements.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def _one_line() -> list[tuple[str, str]]:
    """The texts without tabs and line breaks, which these layouts cannot hold."""
    return [(row["query"], " ".join(row["document"].split())) for row in rows_of()]


def _collection(source: str = "mine") -> dict[str, Any]:
    return {"columns": {}, "expected": ["query", "document"], "source": source, "one line": True}


@kind("BEIR: qrels with a header and grades")
def _(folder: Path) -> dict[str, Any]:
    judged = "query-id\tcorpus-id\tscore\n" + "".join(f"q{n}\td{n}\t{n + 1}\n" for n in range(3)) + "q0\td1\t0\n"
    _judged(folder / "in/mine", {"qrels/train.tsv": judged, "qrels/test.tsv": judged.replace("d1", "d2")}, "jsonl")
    return _collection()


@kind("BEIR: compressed, with judgements of TREC")
def _(folder: Path) -> dict[str, Any]:
    judged = "".join(f"q{n} Q0 d{n} 1\n" for n in range(3))
    _judged(folder / "in/mine", {"qrels/train.tsv": judged}, "jsonl.gz")
    return _collection()


@kind("MS MARCO: collection, queries and qrels of four columns")
def _(folder: Path) -> dict[str, Any]:
    judged = "".join(f"q{n}\t0\td{n}\t1\n" for n in range(3))
    _judged(folder / "in/mine", {"qrels.train.tsv": judged, "qrels.dev.small.tsv": "q0\t0\td1\t1\n"}, "tsv")
    return _collection()


@kind("MS MARCO: triples, which have no header")
def _(folder: Path) -> dict[str, Any]:
    (folder / "triples.train.small.tsv").write_text("".join(f"{q}\t{d}\tno\n" for q, d in _one_line()))
    return {"refused": "no column query, document"}


@kind("MTEB: corpus, queries and judgements in Parquet")
def _(folder: Path) -> dict[str, Any]:
    for name, columns in [
        ("corpus", {"_id": ["d"], "title": [""], "text": ["t"]}),
        ("queries", {"_id": ["q"], "text": ["t"]}),
        ("data", {"query-id": ["q"], "corpus-id": ["d"], "score": [1]}),
    ]:
        pq.write_table(pa.table(columns), inside(folder, f"{name}/test-00000-of-00001.parquet"))
    return {"refused": "no column query, document"}


@kind("TREC: topics and judgements")
def _(folder: Path) -> dict[str, Any]:
    inside(folder, "topics.txt").write_text("<top>\n<num> Number: 301\n<title> a query\n</top>\n")
    inside(folder, "qrels.trec8").write_text("301 0 FBIS3-10082 1\n")
    return {"refused": "no such file, or no file there that could be read as pairs"}


@kind("SQLite: CSV of its shell")
def _(folder: Path) -> dict[str, Any]:
    sqlite = importlib.import_module("sqlite3").connect(":memory:")
    sqlite.execute('create table pairs (query, document, w, "group")')
    sqlite.executemany("insert into pairs values (?, ?, ?, ?)", zip(*FRAME.values(), strict=True))
    cursor = sqlite.execute("select * from pairs")
    with (folder / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file, dialect="unix")
        writer.writerow([name for name, *_ in cursor.description])
        writer.writerows(cursor)
    return cells()


@kind("Excel: text with tabs in UTF-16, and a line that names the delimiter")
def _(folder: Path) -> dict[str, Any]:
    for name, rows, options in [
        ("x.csv", slice(0, 1), {"delimiter": ";"}),
        ("x.tsv", slice(1, 3), {"dialect": "excel-tab"}),
    ]:
        with inside(folder, name).open("w", newline="", encoding="utf-16" if "tsv" in name else "utf-8-sig") as file:
            file.write("sep=;\r\n" if "csv" in name else "")
            writer = csv.writer(file, **options)
            writer.writerow(FRAME)
            writer.writerows(list(zip(*FRAME.values(), strict=True))[rows])
    return cells(tsv_quotes=True)


def _frame(neg: bool = False) -> Any:
    pandas = importlib.import_module("pandas")
    return pandas.DataFrame({**FRAME, **({"neg": ROWS["neg"]} if neg else {})})


def _duckdb(command: str, columns: str) -> None:
    connection = importlib.import_module("duckdb").connect()
    connection.register("given", TABLE)
    connection.execute(f"create view pairs as select {columns} from given")
    connection.execute(command)


def _spark() -> Any:
    """The rows as a frame of a session of Spark, which is started once."""
    sql = importlib.import_module("pyspark.sql")
    builder = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    session = builder.config("spark.sql.shuffle.partitions", "1").getOrCreate()
    return session.createDataFrame([tuple(row.values()) for row in rows_of()], list(rows_of()[0]))


@pytest.mark.parametrize("name", KINDS)
def test_files_of_many_writers_give_the_same_rows(
    name: str, tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    write, packages = KINDS[name]
    for package in packages:
        pytest.importorskip(package)
    folder = tmp_path / "data"
    folder.mkdir()
    asked = write(folder)
    paths = [folder / "in"] if (folder / "in").exists() else list(folder.iterdir())
    corpus = {key: value for key, value in asked.items() if key in ("columns", "tsv_quotes")}
    config = configuration(tmp_path, paths, **corpus)
    if "refused" in asked:
        with pytest.raises(ClusterbatchError, match=asked["refused"]) as refusal:
            ingest(config)
        assert "\n" not in str(refusal.value)
        return
    manifest = ingest(config)
    reasons = [row["reason"] for row in rejects(config, manifest)]
    assert reasons == asked.get("rejects", [])
    assert asked.get("skipped", "") in capsys.readouterr().err
    expected = {name: list(values) for name, values in ROWS.items()}
    expected = {"query": expected["query"], "document": expected["document"], "negatives": expected["neg"]} | {
        "group": [asked.get("group", {}).get(value, value) for value in expected["group"]],
        "weight": [1 if asked.get("null") == value else value for value in expected["w"]],
    }
    if asked.get("one line"):
        expected["document"] = [text for _, text in _one_line()]
    found = sorted(corpus_rows(config, manifest), key=lambda row: ROWS["query"].index(row["query"]))
    lost = [number for number, query in enumerate(ROWS["query"]) if query not in {row["query"] for row in found}]
    assert len(lost) == asked.get("lost", 0)
    for column in asked["expected"]:
        values = [value for number, value in enumerate(expected[column]) if number not in lost]
        assert [row[column] for row in found] == values, column
    if asked.get("source"):
        assert {row["source"] for row in found} == {asked["source"]}

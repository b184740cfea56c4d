#!/usr/bin/env bash
# DuckDB: a Parquet column of float16 in BYTE_STREAM_SPLIT is refused.
#
# Parquet allows this encoding for fixed-length bytes, which float16 is, since version 2.11 (2024); Arrow writes and reads
# it. The same values in the plain encoding are read by both. No wrong value is given.
#
# Seen: "BYTE_STREAM_SPLIT encoding is only supported for FLOAT, DOUBLE, INT32 or INT64 data".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'pyarrow==26.0.1' 'numpy==2.4.6' 'duckdb==2.0.1'
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

values = [0.5, 1.5, -2.0]
table = pa.table({"half": pa.array(np.array(values, np.float16))})
for encoding in ("PLAIN", "BYTE_STREAM_SPLIT"):
    path = f"{sys.argv[1]}/{encoding}.parquet"
    pq.write_table(table, path, use_dictionary=False, column_encoding={"half": encoding})
    assert pq.read_table(path)["half"].to_pylist() == values
    try:
        found = [row[0] for row in duckdb.sql(f"select half from '{path}'").fetchall()]
    except duckdb.Error as error:
        found = str(error).splitlines()[0]
    print(f"duckdb {duckdb.__version__}, {encoding}: {found}")
    assert (found == values) == (encoding == "PLAIN"), "the behaviour has changed"
PY

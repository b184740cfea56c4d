#!/usr/bin/env bash
# Arrow: a gzip file that is padded with zeros, as tapes and block devices leave it, cannot be read to its end.
#
# GNU gzip and Python's gzip module ignore zeros behind the last member. pyarrow 26.0.0 takes them for the header of
# another member: its stream raises OSError, and so do the readers on top of it (pyarrow.csv, pyarrow.json).
#
# Seen: "gzip: 2 lines", "pyarrow: OSError".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'pyarrow==26.0.0'
cat >"$folder/check.py" <<'PY'
import gzip
import subprocess
import sys

import pyarrow as pa

path = sys.argv[1]
data = gzip.compress(b"one\ntwo\n")
with open(path, "wb") as file:
    file.write(data.ljust(-(-len(data) // 512) * 512, b"\0"))
with gzip.open(path) as file:
    lines = len(file.read().splitlines())
assert len(subprocess.run(["gzip", "-dc", path], capture_output=True).stdout.splitlines()) == lines
try:
    with pa.CompressedInputStream(path, "gzip") as stream:
        found = f"{len(stream.read().splitlines())} lines"
except OSError as error:
    found = "OSError"
print(f"pyarrow {pa.__version__}; gzip: {lines} lines; pyarrow: {found}")
assert (lines, found) == (2, "OSError"), "the behaviour has changed"
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder/padded.gz"

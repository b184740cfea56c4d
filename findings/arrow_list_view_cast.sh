#!/usr/bin/env bash
# Arrow: a cast of a list view to a list loses the items of the last list.
#
# The last offset of the result is wrong (0 for a single list), so its last list is empty, or has a negative length.
# No error is raised. Seen with pyarrow 26.0.1, for list_view and large_list_view, to list and large_list.
#
# Seen: "[['a'], ['b', 'c']] becomes [['a'], []]".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'pyarrow==26.0.1'
"$folder/venv/bin/python" - <<'PY'
import pyarrow as pa

values = [["a"], ["b", "c"]]
for view in (pa.list_view, pa.large_list_view):
    for plain in (pa.list_, pa.large_list):
        found = pa.array(values, view(pa.string())).cast(plain(pa.string())).to_pylist()
        assert found == [["a"], []], "the behaviour has changed"
print(f"pyarrow {pa.__version__}: {values} becomes {found}")
PY

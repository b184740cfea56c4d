"""Where real pairs and test collections lie, for the tests and benchmarks that need some."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CLUSTERBATCH_DATA"


def data_folder() -> Path | None:
    """The folder with `pairs/*.parquet` and `eval/`: CLUSTERBATCH_DATA, else shared/data beside the checkout."""
    folder = Path(os.environ.get(VARIABLE, Path(__file__).parents[2] / "shared" / "data"))
    return folder if (folder / "pairs").is_dir() else None


def require_data_folder() -> Path:
    """For commands: ends with one line where there is none."""
    folder = data_folder()
    if folder is None:
        raise SystemExit(f"real pairs are needed: set {VARIABLE} to a folder with pairs/*.parquet and eval/")
    return folder

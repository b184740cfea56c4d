"""`corpus`: where the pairs come from and what a valid pair is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from clusterbatch.config.base import Section, operational


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]

# The built-in sample: pairs mined from the docstrings of the installed Python packages.
DOCSTRINGS = "docstrings://"


class ColumnsConfig(Section):
    """Names of the input's columns."""

    query: str = "query"
    document: str = "document"
    source: str | None = "source"
    pair_id: str | None = None


class CorpusConfig(Section):
    paths: Paths = []
    columns: ColumnsConfig = ColumnsConfig()
    # Overrides `columns.source`: one name for all rows.
    source: str | None = None
    max_characters: int = Field(20_000, ge=16)
    row_group_rows: int = Field(2048, ge=64)
    part_bytes: int = Field(64 * 2**20, ge=2**16)
    # The built-in sample only.
    sample_pairs: int = Field(18_000, ge=100)
    sample_seed: int = 0
    workers: int = operational(2, ge=1)

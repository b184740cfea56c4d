"""`corpus`: where the pairs come from and what a valid pair is."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clusterbatch.config.base import Section, added, operational


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_off(value: object) -> object:
    # In YAML, and so on the command line, a bare `off` is false.
    return "off" if value is False else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]

# The built-in sample: pairs mined from the docstrings of the installed Python packages.
DOCSTRINGS = "docstrings://"


class ColumnsConfig(Section):
    """Names of the input's columns."""

    query: str = "query"
    document: str = "document"
    # Unset: a column called `source` where a file has one, else the file's own name. Named here, it must be there.
    source: str | None = None
    pair_id: str | None = None
    # Texts that do not answer the query: list columns, or several columns of one text each.
    negatives: Paths = []
    weight: str | None = None
    # The user's own segment of a row (customer group, category).
    group: str | None = None
    # Vectors that the user has already, of any length: nothing is then embedded. The document's, or the row's where the
    # query has none of its own.
    vector: str | None = None
    query_vector: str | None = None
    # Which of query and document are images: bytes, data URIs, or addresses (local, or s3://). The models of `embed`
    # and `train` must then have towers for both.
    images: list[Literal["query", "document"]] = added([])

    @model_validator(mode="after")
    def _consistent(self) -> ColumnsConfig:
        if self.query_vector is not None and self.vector is None:
            raise ValueError("query_vector needs vector, the document's")
        if "document" in self.images and self.negatives:
            raise ValueError("negatives that are images are not supported (mine.negatives finds some)")
        return self


class CorpusConfig(Section):
    paths: Paths = []
    columns: ColumnsConfig = ColumnsConfig()
    # Overrides `columns.source`: one name for all rows.
    source: str | None = None
    # Which judgements of a BEIR folder or of MS MARCO's files are the pairs: `train` for qrels/train.tsv or
    # qrels.train.tsv. Unset: the training ones, else all there are.
    split: str | None = None
    # A file that cannot be read: stop with one line that names it, or list it among the rejects and go on. One of a
    # collection (BEIR, MS MARCO) always stops: pairs are joined from all of its files.
    on_error: Literal["fail", "reject"] = "fail"
    # Of text files. Unset: UTF-8, or CP932 (Shift_JIS) where the text is not UTF-8 but Japanese; collections (BEIR, MS
    # MARCO) are then UTF-8.
    encoding: str | None = None
    max_characters: int = Field(20_000, ge=16)
    # What happens to a text that is longer.
    too_long: Literal["cut", "reject"] = "cut"
    # Pairs with a copy of a test query of `evaluate.path`, or of a document that answers one, are set aside: also near
    # copies (estimated Jaccard similarity of word triples), only exact ones, or none.
    decontaminate: Annotated[Literal["near", "exact", "off"], BeforeValidator(_as_off)] = "near"
    # Pairs whose query and document are both nearly those of an earlier pair: set aside, into corpus/aside/ with their
    # reason, or kept like any other. Looking for them takes several times as long as the rest of ingest.
    near_duplicates: Literal["keep", "set_aside"] = "keep"
    # The similarity from which texts count as near copies, here and against the test collections.
    near_threshold: float = Field(0.8, gt=0, le=1)
    # Rows that later stages read at once, as one unit of work.
    row_group_rows: int = Field(1024, ge=64)
    # Of a file of the corpus, about: decides into how many buckets rows are sorted.
    part_bytes: int = Field(64 * 2**20, ge=2**16)
    # Bytes of input that one unit of work reads.
    unit_bytes: int = Field(32 * 2**20, ge=2**12)
    # The built-in sample only.
    sample_pairs: int = Field(18_000, ge=100)
    sample_seed: int = 0
    # Processes that read and write, one CPU core each.
    workers: int = operational(2, ge=1)
    # What `ingest --append` takes out again: files of pair_ids, one a line, each applied once, to the rows that the
    # corpus then holds; and sources that the corpus is not to have.
    delete: Paths = operational([])
    drop_sources: Paths = operational([])

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        if encoding is None:
            return None
        try:
            name = codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"unknown encoding {encoding!r}, expected for instance utf-8 or cp932") from None
        # Files that are called Shift_JIS mostly have Microsoft's additions.
        return "cp932" if name == "shift_jis" else name

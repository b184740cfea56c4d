"""CSV and TSV with a header line."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from clusterbatch.config import ColumnsConfig
from clusterbatch.corpus.readers.records import ChunkBuilder, Extractor, RowError
from clusterbatch.corpus.rows import BrokenFileError, Chunk, check_columns

# A quote that is opened and never closed swallows what follows, up to here.
_LONGEST_FIELD = 64 * 2**20
_CSV_DELIMITERS = ",;\t|"


def read_delimited(file: BinaryIO, columns: ColumnsConfig, encoding: str, *, tabs: bool) -> Iterator[Chunk]:
    """Rows after the header; fields may be quoted. CSV may be separated by , ; | or tabs: whichever gives the columns.

    Raises BrokenFileError where the columns are not there.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    # Bytes that are not text in this encoding become lone surrogates, and their row a reject.
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    first = text.readline()
    delimiter, header = _header(first, columns, "\t" if tabs else _CSV_DELIMITERS)
    lines = _Lines(text)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    builder = ChunkBuilder()
    extract = Extractor(columns)
    row = 0
    while True:
        lines.forget()
        try:
            fields = next(rows)
            if fields:
                builder.add(row, extract(_record(header, fields)))
        except StopIteration:
            break
        except RowError as error:
            builder.reject(row, str(error), lines.seen)
        except csv.Error as error:
            if "field limit" in str(error):
                raise BrokenFileError(f"row {row}: a field of more than {_LONGEST_FIELD >> 20} MiB") from None
            builder.reject(row, f"not {'TSV' if tabs else 'CSV'}: {error}", lines.seen)
        row += bool(lines.seen.strip())
        if builder.is_full:
            yield builder.take()
    text.detach()  # the file is its opener's to close
    if not builder.is_empty:
        yield builder.take()


def _header(line: str, columns: ColumnsConfig, delimiters: str) -> tuple[str, list[str]]:
    failure: BrokenFileError | None = None
    for delimiter in delimiters:
        try:
            header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
            check_columns(header, columns)
        except csv.Error as error:
            raise BrokenFileError(f"header: {error}") from None
        except BrokenFileError as error:
            failure = failure or error
            continue
        twice = [name for name, count in Counter(header).items() if count > 1 and name]
        if twice:
            raise BrokenFileError(f"column {twice[0]} stands twice in the header")
        return delimiter, header
    assert failure is not None
    raise failure


def _record(header: list[str], fields: list[str]) -> dict[str, str | None]:
    if len(fields) != len(header):
        raise RowError(f"{len(fields)} fields, the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


class _Lines:
    """The lines of a file, and which of them the current row took: for the rejects."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self.seen = ""

    def forget(self) -> None:
        self.seen = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        # Only the beginning is shown; a quote that is never closed would keep the whole file.
        if len(self.seen) < csv.field_size_limit() // 1024:
            self.seen += line
        return line

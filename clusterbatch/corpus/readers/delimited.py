"""CSV and TSV with a header line."""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, BinaryIO

from clusterbatch.corpus.readers.records import ChunkBuilder, Extractor, RowError
from clusterbatch.corpus.rows import BrokenFileError, Chunk, InputColumns, check_columns

# A quote that is opened and never closed takes what follows, up to here.
_LONGEST_FIELD = 64 * 2**20
_LONGEST_SHOWN = 64 * 2**10
_CSV_DELIMITERS = ",;\t|"


def read_delimited(
    file: BinaryIO, columns: InputColumns, encoding: str, *, tabs: bool, quotes: bool
) -> Iterator[Chunk]:
    """Yield the rows after the header. CSV may be separated by , ; | or tabs: whichever gives the columns.

    quotes: fields may be quoted, and then have line breaks. A quote that is not closed costs its own row alone.

    Raises BrokenFileError if the columns are not there.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    # Bytes that are not text in this encoding become lone surrogates, and their row a reject.
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    delimiter, header = _header(text.readline(), columns, "\t" if tabs else _CSV_DELIMITERS, quoting)
    options: dict[str, Any] = {"delimiter": delimiter, "strict": True, "quoting": quoting}
    lines = _Lines(text)
    rows = csv.reader(lines, **options)
    builder = ChunkBuilder()
    extract = Extractor(columns)
    row = 0
    while True:
        lines.begin_row()
        try:
            fields = next(rows)
            if fields:
                if lines.is_again and _has_stray_quote(lines.seen, fields, delimiter):
                    raise RowError("a quote inside a field that is not quoted")
                builder.add(row, extract(_record(header, fields, quotes)))
        except StopIteration:
            break
        except RowError as error:
            builder.reject(row, str(error), lines.seen)
        except csv.Error as error:
            # Its first line is the row; the lines after it were taken only because a quote was open.
            lines.keep_first()
            rows = csv.reader(lines, **options)
            builder.reject(row, f"not {'TSV' if tabs else 'CSV'}: {error}", lines.seen)
        row += bool(lines.seen.strip())
        if builder.is_full:
            yield builder.take()
    text.detach()  # the file is its opener's to close
    if not builder.is_empty:
        yield builder.take()


def _header(line: str, columns: InputColumns, delimiters: str, quoting: Any) -> tuple[str, list[str]]:
    failure: BrokenFileError | None = None
    for delimiter in delimiters:
        try:
            header = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, quoting=quoting), [])]
            twice = [name for name, count in Counter(header).items() if count > 1 and name]
            check_columns(list(dict.fromkeys(header)), columns)
        except csv.Error as error:
            raise BrokenFileError(f"header: {error}") from None
        except BrokenFileError as error:
            failure = failure or error
            continue
        if twice:
            raise BrokenFileError(f"column {twice[0]} occurs twice in the header")
        return delimiter, header
    assert failure is not None
    raise failure


def _record(header: list[str], fields: list[str], quotes: bool) -> dict[str, str | None]:
    if len(fields) != len(header):
        quoted = not quotes and any(field.startswith('"') or field.endswith('"') for field in fields)
        hint = "; if fields are quoted, set corpus.tsv_quotes" if quoted else ""
        raise RowError(f"{len(fields)} fields, the header has {len(header)}{hint}")
    return dict(zip(header, fields, strict=True))


def _has_stray_quote(line: str, fields: list[str], delimiter: str) -> bool:
    """Return whether a field that does not begin with a quote has one, as the rest of a quoted field would."""
    whole = delimiter + line
    return any(
        '"' in field and f"{delimiter}{field}" in whole and not field.startswith('"')
        for field in (field.rstrip("\r\n") for field in fields)
    )


class _Lines:
    """The lines of a file, and those that the current row took."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._taken: list[str] = []
        self._waiting: deque[str] = deque()
        self.is_again = False

    def begin_row(self) -> None:
        self._taken = []
        # Lines that are read again, after a row that began before them turned out to be none.
        self.is_again = bool(self._waiting)

    def keep_first(self) -> None:
        """Give all lines of the current row but its first back, to be read again."""
        self._waiting.extendleft(reversed(self._taken[1:]))
        del self._taken[1:]

    @property
    def seen(self) -> str:
        """The beginning of the current row, as it is in the file."""
        text = ""
        for line in self._taken:
            text += line
            if len(text) >= _LONGEST_SHOWN:
                break
        return text

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._text)
        self._taken.append(line)
        return line

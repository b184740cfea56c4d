"""CSV and TSV with a header line."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from clusterbatch.corpus.readers.records import ChunkBuilder, Extractor, RowError
from clusterbatch.corpus.rows import BrokenFileError, Chunk, InputColumns, check_columns

# A quote that is opened and never closed takes what follows, up to here.
_LONGEST_FIELD = 64 * 2**20
_LONGEST_SHOWN = 64 * 2**10
# Characters after a misplaced quote in which the end of its row is looked for.
_LONGEST_SEARCH = 2**20
_CSV_DELIMITERS = ",;\t|"
# A first line that tells spreadsheets the delimiter.
_DELIMITER_LINE = re.compile(r"sep=(.)\r?\n?")
_QUOTES = re.compile('"+')


def read_delimited(
    file: BinaryIO, columns: InputColumns, encoding: str, *, tabs: bool, quotes: bool
) -> Iterator[Chunk]:
    """Yield the rows after the header. CSV may be separated by , ; | or tabs: whichever gives the columns.

    quotes: fields may be quoted, and then have line breaks. A quote that is not closed costs its own row alone; one
    that is not doubled inside a quoted field costs the row with all of its lines.

    Raises BrokenFileError if the columns are not there.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    # Bytes that are not text in this encoding become lone surrogates, and their row a reject.
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    lines = _Lines(text)
    delimiter, header = _header(lines, columns, "\t" if tabs else _CSV_DELIMITERS, quoting)
    options: dict[str, Any] = {"delimiter": delimiter, "strict": True, "quoting": quoting}
    rows = csv.reader(lines, **options)
    builder = ChunkBuilder()
    extract = Extractor(columns)
    row = 0
    # Behind a row of too few or too many fields, a row may be the rest of it, as may one that is read again.
    after_misfit = False
    while True:
        lines.begin_row()
        try:
            fields = next(rows)
            if fields:
                if fields[0].strip() == header[0] and [field.strip() for field in fields] == header:
                    raise RowError("the header again")
                in_doubt = lines.is_again or after_misfit
                after_misfit = len(fields) != len(header)
                if in_doubt and _has_stray_quote(lines.seen, fields, delimiter):
                    raise RowError("a quote inside a field that is not quoted")
                builder.add(row, extract(_record(header, fields, quotes)))
        except StopIteration:
            break
        except RowError as error:
            builder.reject(row, str(error), lines.seen)
        except csv.Error as error:
            reason = str(error)
            if _take_misquoted_row(lines, len(header), options):
                reason = "a quote inside a quoted field is not doubled"
            else:
                # Its first line is the row; the lines after it were taken only because a quote was open.
                lines.keep_first()
            rows = csv.reader(lines, **options)
            builder.reject(row, f"not {'TSV' if tabs else 'CSV'}: {reason}", lines.seen)
        row += bool(lines.seen.strip())
        if builder.is_full:
            yield builder.take()
    text.detach()  # the file is its opener's to close
    if not builder.is_empty:
        yield builder.take()


def _header(lines: _Lines, columns: InputColumns, delimiters: str, quoting: Any) -> tuple[str, list[str]]:
    """Take the header, which may have several lines; return the delimiter and the names of the columns."""
    named = _DELIMITER_LINE.fullmatch(lines.peek())
    if named and quoting != csv.QUOTE_NONE:
        next(lines)
        delimiters = named[1]
    failure: BrokenFileError | None = None
    for delimiter in delimiters:
        lines.begin_row()
        try:
            header = [name.strip() for name in next(csv.reader(lines, delimiter=delimiter, quoting=quoting), [])]
            twice = [name for name, count in Counter(header).items() if count > 1 and name]
            check_columns(list(dict.fromkeys(header)), columns)
        except csv.Error as error:
            raise BrokenFileError(f"header: {error}") from None
        except BrokenFileError as error:
            failure = failure or error
            lines.give_back()
            continue
        if twice:
            raise BrokenFileError(f"column {twice[0]} occurs twice in the header")
        return delimiter, header
    assert failure is not None
    raise failure


def _take_misquoted_row(lines: _Lines, fields: int, options: Mapping[str, Any]) -> bool:
    """Take all lines of a row whose quoted fields have quotes that are not doubled; return whether there is such a row.

    There is none if it would have fewer fields than the header (more are possible: a quote before a delimiter may be
    text, as may one at a line's end before the last field), or if the lines after its first are rows of their own: in
    that case a quote was opened and not closed.
    """
    delimiters, inside = 0, False
    for line in lines.around():
        more, inside = _delimiters_outside(line, options["delimiter"], inside)
        delimiters += more
        if delimiters + 1 < fields and line.rstrip("\r\n").endswith('"'):
            inside = True
        if not inside:
            following = lines.taken[1:]
            return delimiters + 1 >= fields and not (following and _are_rows(following, fields, options))
    return False


def _delimiters_outside(line: str, delimiter: str, inside: bool) -> tuple[int, bool]:
    """Return how many delimiters of a line are outside of quotes, and whether its end is inside of them.

    inside: whether its beginning is. Of quotes inside of a field only those before a delimiter or a line's end close.
    """
    count = place = 0
    while place < len(line):
        if not inside and line.startswith('"', place):
            inside, place = True, place + 1
        if inside:
            runs = (run for run in _QUOTES.finditer(line, place) if len(run[0]) % 2)
            closing = next(
                (run for run in runs if line[run.end() : run.end() + 1] in (delimiter, "\r", "\n", "")), None
            )
            if closing is None:
                return count, True
            inside, place = False, closing.end()
        place = line.find(delimiter, place) + 1
        if not place:
            break
        count += 1
    return count, False


def _are_rows(lines: Sequence[str], fields: int, options: Mapping[str, Any]) -> bool:
    """Return whether lines are whole rows without stray quotes; the last one may go on behind them."""
    rows = csv.reader(lines, **options)
    first = 0
    try:
        for row in rows:
            text = "".join(lines[first : rows.line_num])
            if row and (len(row) != fields or _has_stray_quote(text, row, options["delimiter"])):
                return False
            first = rows.line_num
    except csv.Error:
        return (
            rows.line_num == len(lines) and _delimiters_outside("".join(lines[first:]), options["delimiter"], False)[1]
        )
    return True


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
        self.taken: list[str] = []
        self._waiting: deque[str] = deque()
        self.is_again = False

    def begin_row(self) -> None:
        self.taken = []
        # Lines that are read again, after a row that began before them turned out to be none.
        self.is_again = bool(self._waiting)

    def keep_first(self) -> None:
        """Give all lines of the current row but its first back, to be read again."""
        self._waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def give_back(self) -> None:
        """Give all lines of the current row back."""
        self._waiting.extendleft(reversed(self.taken))
        self.taken = []

    def peek(self) -> str:
        """Return the next line, which stays to be read; empty at the end."""
        if not self._waiting:
            self._waiting.extend(line for line in [self._text.readline()] if line)
        return self._waiting[0] if self._waiting else ""

    def around(self) -> Iterator[str]:
        """Yield the lines of the current row, then take and yield those after it, up to a bound."""
        yield from list(self.taken)
        searched = 0
        while searched < _LONGEST_SEARCH:
            line = next(self, None)
            if line is None:
                return
            searched += len(line)
            yield line

    @property
    def seen(self) -> str:
        """The beginning of the current row, as it is in the file."""
        text = ""
        for line in self.taken:
            text += line
            if len(text) >= _LONGEST_SHOWN:
                break
        return text

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._text)
        self.taken.append(line)
        return line

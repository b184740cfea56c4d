"""JSON Lines: one object a line, read by byte ranges so that a large file is many slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers.records import ChunkBuilder, Extractor, RowError
from clusterbatch.corpus.rows import BrokenFileError, Chunk, InputColumns

_LONGEST_LINE = 64 * 2**20
_MARK = b"\xef\xbb\xbf"


def read_json_lines(file: BinaryIO, piece: Slice | None, columns: InputColumns, encoding: str) -> Iterator[Chunk]:
    """Yield the rows of the lines that begin in the slice, or of all (None); positions count from its first row.

    Blank lines are no rows. Raises BrokenFileError for an encoding in which bytes do not show where lines end.
    """
    if encoding.startswith(("utf-16", "utf-32")):
        raise BrokenFileError(f"{encoding.upper()} text; JSON Lines must be UTF-8")
    builder = ChunkBuilder()
    extract = Extractor(columns)
    for row, line in enumerate(line for line in lines_of(file, piece) if line.strip()):
        try:
            builder.add(row, extract(parse_object(line, encoding)))
        except RowError as error:
            builder.reject(row, str(error), line.decode(encoding, "backslashreplace"))
        if builder.is_full:
            yield builder.take(extract.absent)
    if not builder.is_empty:
        yield builder.take(extract.absent)


def lines_of(file: BinaryIO, piece: Slice | None = None) -> Iterator[bytes]:
    """Yield the lines that begin in the slice, or all; without line ends and without a byte order mark."""
    start, end = (piece.start, piece.end) if piece else (0, None)
    position = 0
    if start:
        # The line that begins before the slice belongs to the slice before.
        file.seek(start - 1)
        position = start - 1 + len(file.readline(_LONGEST_LINE))
    while end is None or position < end:
        line = file.readline(_LONGEST_LINE)
        if not line:
            return
        if len(line) >= _LONGEST_LINE:
            raise BrokenFileError(f"a line of more than {_LONGEST_LINE >> 20} MiB at byte {position}")
        yield (line.removeprefix(_MARK) if position == 0 else line).rstrip(b"\r\n")
        position += len(line)


def parse_object(line: bytes, encoding: str = "utf-8") -> dict[str, Any]:
    """Return the object of one line. Raises RowError if it is none."""
    try:
        value = json.loads(line.decode(encoding))
    except UnicodeDecodeError as error:
        raise RowError(f"invalid {encoding.upper()} at byte {error.start} of the line") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowError(f"not JSON: {getattr(error, 'msg', 'nested too deeply')}") from None
    except ValueError:
        # Python converts no integer of thousands of digits.
        raise RowError("an integer with too many digits") from None
    if not isinstance(value, dict):
        raise RowError(f"not a JSON object but {type(value).__name__}")
    return value

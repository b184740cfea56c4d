"""Lines of judgement files: BEIR's three columns, TREC's four; for pairs of a corpus and for test collections."""

from __future__ import annotations

import math

# Names of the last column in header lines.
_GRADE_NAMES = {"score", "grade", "relevance", "rel", "label", "relevancy"}


def is_header(line: str) -> bool:
    """Return whether a line names columns instead of judging."""
    fields = _fields(line)
    return len(fields) >= 3 and fields[-1].strip().lower() in _GRADE_NAMES


def parse_judgement(line: str) -> tuple[str, str, float]:
    """Return query id, document id and grade of `query document grade`, or TREC's `query iteration document grade`.

    Columns are separated by tabs or, if there are none, by white space. Raises ValueError for anything else.
    """
    fields = _fields(line)
    if len(fields) == 4:
        # TREC's iteration, 0 or Q0, is not used.
        del fields[1]
    if len(fields) != 3:
        raise ValueError(f"{len(fields)} columns")
    query, document, grade = fields[0], fields[1], float(fields[2])
    if not query or not document or not math.isfinite(grade):
        raise ValueError("an empty id or a grade that is not a number")
    return query, document, grade


def _fields(line: str) -> list[str]:
    text = line.rstrip("\r\n")
    return text.split("\t") if "\t" in text else text.split()

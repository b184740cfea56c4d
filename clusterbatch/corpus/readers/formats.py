"""The format of a file: what its name says, and whether its first bytes agree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Compression = Literal["gzip", "zstd"]

# Extension of a file's name: the kind by which its reader is found (readers.dispatch.READERS).
EXTENSIONS: dict[str, str] = {
    "parquet": "parquet",
    "pq": "parquet",
    "arrow": "arrow",
    "feather": "arrow",
    "ipc": "arrow",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "tsv": "tsv",
}
_COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd"}
_MAGIC: dict[Compression, bytes] = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_PARQUET, _ENCRYPTED = b"PAR1", b"PARE"
# Arrow's file format, and a message of its stream format.
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
# Formats of binary files, which no other name fits.
_BINARY = ("parquet", "arrow")
# Zstandard has 16 marks for frames that are to be skipped; parallel compressors begin with one.
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*\{")
_NAMES = {"parquet": "Parquet file", "arrow": "Arrow file", "jsonl": "JSON Lines", "csv": "CSV", "tsv": "TSV"}


@dataclass(frozen=True)
class Format:
    """`kind` is None if the name does not say."""

    kind: str | None
    compression: Compression | None = None

    @property
    def is_known(self) -> bool:
        return self.kind is not None

    @property
    def can_be_cut(self) -> bool:
        """True if a reader can begin in the middle: not with quoted line breaks (CSV) or compression."""
        return self.kind in ("parquet", "jsonl") and self.compression is None


def format_of_name(name: str) -> Format:
    """Return the format by the extension, or the two last ones of a compressed file (`pairs.jsonl.gz`)."""
    *_, extension = [None, *name.lower().rsplit("/", 1)[-1].split(".")[1:]]
    compression = _COMPRESSIONS.get(extension or "")
    if compression:
        return Format(format_of_name(name[: -len(extension or "") - 1]).kind, compression)
    return Format(EXTENSIONS.get(extension or ""))


def format_of_content(head: bytes) -> Format:
    """Return the format by the first bytes; text that is not JSON is taken for CSV."""
    if head.startswith(_PARQUET):
        return Format("parquet")
    if head.startswith(_ARROW):
        return Format("arrow")
    if _SKIPPABLE.match(head):
        return Format(None, "zstd")
    for compression, magic in _MAGIC.items():
        if head.startswith(magic):
            return Format(None, compression)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return Format(None)
    return Format("jsonl" if text[:1] in b"{[" else "csv")


def agree(name: str, head: bytes) -> tuple[Format, str | None]:
    """Return the format to read a file with, and why it cannot be read if name and content contradict each other."""
    if head.startswith(_ENCRYPTED):
        return format_of_name(name), "an encrypted Parquet file; it must be decrypted first"
    named, seen = format_of_name(name), format_of_content(head)
    if named.compression != seen.compression:
        claimed, found = named.compression or "not compressed", seen.compression or "not compressed"
        return named, f"not what its name says: {claimed} by name, {found} by content"
    if named.compression:
        return named, None
    return _agree_on_kind(named, seen, head)


def agree_inside(named: Format, head: bytes) -> tuple[Format, str | None]:
    """Do the same for a compressed file, by the first bytes of its content."""
    seen = format_of_content(head)
    if seen.compression:
        return named, "compressed twice"
    for kind in _BINARY:
        if kind in (seen.kind, named.kind):
            name = _NAMES[kind]
            return named, f"a compressed {name}; {name.removesuffix(' file')} is compressed inside"
    format, contradiction = _agree_on_kind(Format(named.kind), seen, head)
    return Format(format.kind, named.compression), contradiction


def _agree_on_kind(named: Format, seen: Format, head: bytes) -> tuple[Format, str | None]:
    if named.kind is None:
        return seen, None
    if named.kind != seen.kind and (named.kind in _BINARY or seen.kind in _BINARY):
        return named, f"not what its name says: no {_NAMES.get(named.kind, named.kind)} by content"
    if named.kind == "jsonl" and _ARRAY_OF_OBJECTS.match(head.removeprefix(b"\xef\xbb\xbf")):
        return named, "one JSON array; expected JSON Lines, one object a line"
    return named, None

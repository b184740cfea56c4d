"""Bytes of text files: decompression, and detection of the encoding."""

from __future__ import annotations

import codecs
import gzip
import io
import re
from typing import BinaryIO

import pyarrow as pa

from clusterbatch.corpus.readers.formats import Compression

_BUFFER = 2**20
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    # Before UTF-16: its mark begins like theirs.
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Japanese text has hiragana or katakana; Latin-1 bytes that happen to decode as CP932 give kanji and half-width forms.
_KANA = re.compile("[\u3041-\u30ff]")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_LEAST_KANA = 0.1


def decompressed(file: BinaryIO, compression: Compression | None) -> BinaryIO:
    """Return the content of a file. Reading raises OSError, EOFError or zlib.error if the compressed stream is damaged.

    A stream may have several members or frames, and gzip's may be padded with zeros.
    """
    if compression is None:
        return file
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)  # type: ignore[type-var]
    return io.BufferedReader(pa.CompressedInputStream(file, compression), _BUFFER)


def detect_encoding(head: bytes) -> str:
    """Return UTF-8 (also if nothing fits: such rows are rejected), UTF-16 or 32 by their marks, or CP932."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if _decode(head, "utf-8") is not None:
        return "utf-8"
    text = _decode(head, "cp932")
    if text is not None:
        others = len(_NOT_ASCII.findall(text))
        if others and len(_KANA.findall(text)) >= _LEAST_KANA * others:
            return "cp932"
    return "utf-8"


def _decode(head: bytes, encoding: str) -> str | None:
    try:
        # Not final: the head may end inside a character.
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None

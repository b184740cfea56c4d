"""Bytes of text files: decompressed, and decoded by an encoding that is configured or found out."""

from __future__ import annotations

import codecs
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
    """The content of a file. Reading raises OSError where the compressed stream is damaged or ends too early."""
    if compression is None:
        return file
    return io.BufferedReader(pa.CompressedInputStream(file, compression), _BUFFER)


def detect_encoding(head: bytes) -> str:
    """UTF-8 (also where nothing fits: rows that are not are rejected), UTF-16 or 32 by their marks, or CP932."""
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

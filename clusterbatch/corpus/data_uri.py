"""How an image is written in a column of text: as a data URI (RFC 2397) of its encoded bytes.

So whatever carries texts (readers, buckets, rejects, held-out collections, shards for people) carries images, and equal
images are equal texts.
"""

from __future__ import annotations

import base64
import binascii

PREFIX = "data:image/"
_BASE64 = ";base64,"


def is_data_uri(text: str) -> bool:
    return text.startswith(PREFIX)


def data_uri(data: bytes, kind: str) -> str:
    """`kind` is the part of the media type after the slash: png, jpeg."""
    return f"{PREFIX}{kind}{_BASE64}{base64.b64encode(data).decode()}"


def image_bytes(text: str) -> bytes:
    """The encoded image in a data URI; raises ValueError where that is none."""
    head, mark, body = text.partition(_BASE64)
    if not is_data_uri(head) or not mark:
        raise ValueError("not a data URI in base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ValueError("not a data URI in base64") from None


def readable(text: str, characters: int) -> str:
    """What people are shown of a text, or of an image."""
    if is_data_uri(text):
        kind = text[len("data:") : text.find(";")]
        return f"[{kind}, {len(image_bytes(text)):,} bytes]"
    return text[:characters]

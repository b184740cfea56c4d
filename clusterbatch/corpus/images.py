"""Images as input: bytes or addresses are fetched, checked, and become data URIs (RFC 2397) in a column of text.

So everything that carries texts (readers, buckets, rejects, held-out collections, shards for people) carries images,
and equal images are equal texts.

An image is decoded once, here, so that no later stage meets one that cannot be decoded: an image that is damaged, of
another format or too large is rejected with its reason. Its size is known from its header, before anything is unpacked,
so that a small file cannot fill the memory.
"""

from __future__ import annotations

import base64
import binascii
import errno
import io
import os
import posixpath
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
from PIL import Image

from clusterbatch.config import ColumnsConfig
from clusterbatch.corpus.rows import Chunk, Reject, shown
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.store.folder import Folder

PREFIX = "data:image/"
_BASE64 = ";base64,"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# As `data_uri` writes it: to the end of the text, as pages and programs quote beginnings of such addresses.
_URI = re.compile(rf"{PREFIX}[a-z]+{_BASE64}([A-Za-z0-9+/]+={{0,2}})")
# Of one image: 8,192 x 8,192.
MOST_PIXELS = 2**26
_MOST_BYTES = 64 * 2**20
_FETCHERS = 8
# Rows whose images are loaded at once, and bytes of images that are passed on at once.
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 64, 32 * 2**20
# No address has these: NUL, and halves of characters.
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")
# Failures that are the fault of the address, not of the disk it leads to.
_MISLED = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
# What decoders raise on damaged data, beside their own errors, which are OSErrors.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class ImageError(ValueError):
    """This image cannot be taken; the message is the reason."""


def is_data_uri(text: str) -> bool:
    """Return whether a text is an image as `data_uri` writes it, from beginning to end."""
    found = _URI.fullmatch(text)
    return found is not None and len(found[1]) % 4 == 0


def data_uri(data: bytes, kind: str) -> str:
    """Return encoded bytes as a data URI; `kind` is the part of the media type after the slash: png, jpeg."""
    return f"{PREFIX}{kind}{_BASE64}{base64.b64encode(data).decode()}"


def image_bytes(text: str) -> bytes:
    """Return the encoded image in a data URI; raises ValueError if it is none."""
    head, mark, body = text.partition(_BASE64)
    if not head.startswith(PREFIX) or not mark:
        raise ValueError("not a data URI in base64")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error:
        raise ValueError("not a data URI in base64") from None


def readable(text: str, characters: int) -> str:
    """Return the beginning of a text, or a description of an image, for people."""
    if is_data_uri(text):
        kind = text[len("data:") : text.find(";")]
        return f"[{kind}, {len(image_bytes(text)):,} bytes]"
    return text[:characters]


def open_image(data: bytes) -> Image.Image:
    """Return the decoded image, as it is stored (of an animation the first frame). Raises ImageError."""
    try:
        with warnings.catch_warnings():
            # This project has its own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            image.load()
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"none of {', '.join(FORMATS)}") from error
    except _DAMAGED as error:
        raise ImageError(f"damaged ({error})") from error
    return image


def load_image(address: str, base: Folder) -> str:
    """Return the image at `address` as a data URI, checked.

    address: a data URI, an s3:// address, or a path, relative to `base` unless it is absolute. Raises ImageError, and
    what `Folder` raises if storage cannot be reached.
    """
    data = _fetch(address, base)
    image = open_image(data)
    assert image.format is not None
    return data_uri(data, image.format.lower())


def with_images(chunk: Chunk, columns: ColumnsConfig, base: Folder) -> Iterator[Chunk]:
    """Yield the chunk with its columns of images as data URIs, in pieces of a few megabytes of images.

    Rows whose image cannot be taken become rejects.
    """
    names = [name for name in columns.images if name in chunk.columns]
    if not names or not len(chunk.rows):
        yield chunk
        return
    loaded: dict[str, list[str | ImageError | None]] = {name: [] for name in names}
    rejects, first, size = chunk.rejects, 0, 0
    with ThreadPoolExecutor(_FETCHERS) as pool:
        for start in range(0, len(chunk.rows), _ROWS_AT_ONCE):
            for name in names:
                addresses = chunk.columns[name].slice(start, _ROWS_AT_ONCE).to_pylist()
                some = list(pool.map(partial(_load_or_reason, base=base), addresses))
                loaded[name] += some
                size += sum(len(image) for image in some if isinstance(image, str))
            end = min(start + _ROWS_AT_ONCE, len(chunk.rows))
            if size >= _BYTES_AT_ONCE or end == len(chunk.rows):
                piece = {name: column.slice(first, end - first) for name, column in chunk.columns.items()}
                yield _replaced(Chunk(chunk.rows[first:end], piece, rejects), loaded)
                loaded = {name: [] for name in names}
                rejects, first, size = [], end, 0


def _replaced(chunk: Chunk, loaded: Mapping[str, Sequence[str | ImageError | None]]) -> Chunk:
    """Return the chunk with the loaded images in place of their addresses."""
    columns = dict(chunk.columns)
    reasons: dict[int, str] = {}
    for name, images in loaded.items():
        for position, image in enumerate(images):
            if isinstance(image, ImageError):
                reasons.setdefault(position, f"{name}: {image}")
        columns[name] = pa.array([None if isinstance(image, ImageError) else image for image in images], pa.string())
    rejects = [
        Reject(
            int(chunk.rows[position]),
            reason,
            shown({name: column[position].as_py() for name, column in chunk.columns.items()}),
        )
        for position, reason in sorted(reasons.items())
    ]
    kept = np.ones(len(chunk.rows), bool)
    kept[list(reasons)] = False
    mask = pa.array(kept)
    filtered = {name: column.filter(mask) for name, column in columns.items()}
    return Chunk(chunk.rows[kept], filtered, [*chunk.rejects, *rejects])


def stored_bytes(address: str, base: Folder) -> int:
    """Return the bytes of the image at an address; 0 for a data URI or what cannot be found."""
    if address.startswith(PREFIX):
        return 0
    try:
        folder, name = _located(address, base)
        return folder.size(name)
    except (ImageError, FileNotFoundError, NotADirectoryError, InfrastructureError):
        return 0


def _load_or_reason(address: str | None, base: Folder) -> str | ImageError | None:
    if address is None:
        return None
    try:
        return load_image(address, base)
    except ImageError as error:
        return error


def _fetch(address: str, base: Folder) -> bytes:
    if address.startswith(PREFIX):
        try:
            return image_bytes(address)
        except ValueError as error:
            raise ImageError(str(error)) from None
    base, address = _located(address, base)
    try:
        size = base.size(address)
        # Folders cannot be read, pipes and devices may have no end.
        if base.is_local and not os.path.isfile(base.path(address)):
            raise ImageError("not a file")
        if size > _MOST_BYTES:
            raise ImageError(f"more than {_MOST_BYTES:,} bytes")
        return base.read(address)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"cannot be read ({type(error).__name__})") from None
    except InfrastructureError as error:
        cause = error.__cause__
        if base.is_local and isinstance(cause, OSError) and cause.errno in _MISLED:
            raise ImageError(f"cannot be read ({cause.strerror})") from None
        raise


def _located(address: str, base: Folder) -> tuple[Folder, str]:
    """Return the folder and name of an image. Raises ImageError if the address cannot be one."""
    if not address.strip():
        raise ImageError("empty or whitespace")
    if _IMPOSSIBLE.search(address):
        raise ImageError("characters that cannot be part of an address")
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme not in ("", "file", "s3", "s3a"):
        raise ImageError(f"{scheme}:// addresses are not fetched, only local ones and s3://")
    if ".." in address.split("/"):
        raise ImageError("'..' cannot be part of an address")
    if scheme or address.startswith("/"):
        try:
            base, address = Folder(posixpath.dirname(address), base.storage), posixpath.basename(address)
        except UsageError as error:
            raise ImageError(str(error)) from None
    return base, address

"""The bytes of images that files of addresses refer to, estimated before they are loaded."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from itertools import islice

import numpy as np
import pyarrow.parquet as pq

from clusterbatch.config import CorpusConfig, StorageConfig
from clusterbatch.corpus.images import stored_bytes
from clusterbatch.corpus.inputs import InputFile, Slice
from clusterbatch.corpus.readers.dispatch import opened, read_slice
from clusterbatch.corpus.rows import BrokenFileError, Chunk
from clusterbatch.store.folder import Folder

# Files that are looked into, and images of each that are.
_FILES, _IMAGES = 8, 32
# An encoded image takes a third more as text.
_BASE64 = 4 / 3


def referenced_bytes(files: Sequence[InputFile], config: CorpusConfig, storage: StorageConfig) -> int:
    """Return about how many bytes the images have, as text, that files refer to by address; 0 if they hold them.

    A few images of a few files are looked at; their sizes are asked for, not their content.
    """
    if not (config.columns.images and files):
        return 0
    places = sorted(set(np.linspace(0, len(files) - 1, min(_FILES, len(files))).astype(int).tolist()))
    looked_at = [files[place] for place in places]
    found = sum(_of_file(file, config, storage) for file in looked_at)
    return round(found * sum(file.size for file in files) / max(1, sum(file.size for file in looked_at)))


def _of_file(file: InputFile, config: CorpusConfig, storage: StorageConfig) -> float:
    try:
        chunks = list(islice(read_slice(Slice(0, file, 0, file.size), config, storage), 2))
        if not chunks or not len(chunks[0].rows):
            return 0.0
        chunk = chunks[0]
        rows = _rows(file, chunk, storage) if len(chunks) > 1 else len(chunk.rows)
        base = Folder(posixpath.dirname(file.uri), storage)
        step = -(-len(chunk.rows) // _IMAGES)
        sizes = [
            sum(stored_bytes(chunk.columns[name][row].as_py() or "", base) for name in config.columns.images)
            for row in range(0, len(chunk.rows), step)
        ]
        return _BASE64 * float(np.mean(sizes)) * rows
    except BrokenFileError:
        # The pass that reads the file says what is wrong with it.
        return 0.0


def _rows(file: InputFile, chunk: Chunk, storage: StorageConfig) -> float:
    """Return about how many rows a file has, of which the chunk is the beginning."""
    with opened(file, storage) as (opening, content):
        if opening.format.kind == "parquet":
            return float(pq.read_metadata(content).num_rows)
    row_bytes = sum(column.nbytes for column in chunk.columns.values()) / len(chunk.rows)
    return max(len(chunk.rows), file.size / max(1.0, row_bytes))

"""Pass 1 of ingest: slices of input files become validated rows, bucketed by document."""

from __future__ import annotations

import posixpath

import numpy as np

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.images import with_images
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers import read_slice
from clusterbatch.corpus.rows import BrokenFileError
from clusterbatch.corpus.sink import PairSink, Sorting
from clusterbatch.corpus.validate import validate
from clusterbatch.errors import DataError
from clusterbatch.runtime import Unit
from clusterbatch.store.artifact import Artifact, Receipt, Stopwatch
from clusterbatch.store.filesystem import Folder


class ReadWorker:
    """Reads one unit, a list of slices. Its receipt tells the rows of each slice, so that positions can be summed, and
    which slices could not be read to their end."""

    def __init__(self, artifact: Artifact, fingerprint: str, config: CorpusConfig, sorting: Sorting) -> None:
        self._artifact = artifact
        self._fingerprint = fingerprint
        self._config = config
        self._sorting = sorting

    def process(self, unit: Unit) -> Receipt:
        stopwatch = Stopwatch()
        broken: list[tuple[int, str, str]] = []
        sink = PairSink(self._artifact, unit.number, self._sorting)
        slices = [(piece.number, piece.file.uri, self._read(piece, sink, broken)) for piece in unit.payload]
        receipt = Receipt(
            unit=unit.number,
            fingerprint=self._fingerprint,
            parts=sink.finish(),
            counts=sink.counts,
            seconds=stopwatch.seconds,
            details={"slices": slices, "cut": sink.cut, "dimensions": sink.dimensions, "broken": broken},
        )
        self._artifact.write_receipt(receipt)
        return receipt

    def _read(self, piece: Slice, sink: PairSink, broken: list[tuple[int, str, str]]) -> int:
        """Puts the slice's rows into the sink, as many as can be read; returns how many there were.

        broken: gains slice, file and reason where not all could be read.
        """
        before = sink.counts.read
        base = Folder(posixpath.dirname(piece.file.uri), self._artifact.folder.storage)
        try:
            for chunk in read_slice(piece, self._config, self._artifact.folder.storage):
                chunk = with_images(chunk, self._config.columns, base)
                valid = validate(chunk, self._config, piece.file.source)
                sink.add(valid, lambda rows: (np.full(len(rows), piece.number), rows))
        except BrokenFileError as error:
            if self._config.on_error == "fail":
                raise DataError(
                    f"{piece.file.uri}: {error} (corpus.on_error: reject goes on without such files)"
                ) from error
            # Whatever was read before the break stays.
            broken.append((piece.number, piece.file.uri, str(error)))
        return sink.counts.read - before

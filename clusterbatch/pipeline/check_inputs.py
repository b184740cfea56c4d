"""Check the inputs of a corpus before anything heavy is imported and before Ray starts."""

from __future__ import annotations

from clusterbatch.config import DOCSTRINGS, RunConfig
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers.dispatch import read_slice
from clusterbatch.corpus.readers.formats import format_of_name
from clusterbatch.corpus.rows import BrokenFileError
from clusterbatch.errors import DataError


def check_inputs(config: RunConfig) -> None:
    """Raise UsageError if `corpus.paths` leads to nothing, DataError if the first rows of a file cannot be read.

    One file of each format is opened, and every empty one; none is if `corpus.on_error` is reject.
    """
    paths = [path for path in config.corpus.paths if path != DOCSTRINGS]
    inputs = find_inputs(config.corpus, paths, config.storage)
    if config.corpus.on_error == "reject":
        return
    opened = set()
    for file in inputs.files:
        kind = format_of_name(file.name)
        if file.size and kind in opened:
            continue
        opened.add(kind)
        try:
            next(read_slice(Slice(0, file, 0, file.size), config.corpus, config.storage), None)
        except BrokenFileError as error:
            raise DataError(f"{file.uri}: {error} (corpus.on_error: reject continues without such files)") from error

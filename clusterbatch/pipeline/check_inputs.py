"""Check the inputs of a corpus before anything heavy is imported and before Ray starts."""

from __future__ import annotations

from clusterbatch.config import DOCSTRINGS, RunConfig
from clusterbatch.config.stages import CHARACTER_NGRAMS
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.corpus.inputs import Slice
from clusterbatch.corpus.readers.dispatch import read_slice
from clusterbatch.corpus.readers.formats import format_of_name
from clusterbatch.corpus.rows import BrokenFileError
from clusterbatch.encoder.check import check_model
from clusterbatch.errors import DataError
from clusterbatch.evaluation.collection import open_collections
from clusterbatch.store import Folder
from clusterbatch.store.workspace import Workspace


def check_named_files(config: RunConfig) -> None:
    """Check the inputs, the collections of `evaluate.path`, and the files of the models as far as that needs no torch.

    Models are passed over if the workspace has a trained one: then each stage has loaded them before. Raises UsageError
    or DataError that names the key and the file.
    """
    check_inputs(config)
    given = [Folder(path, config.storage) for path in config.evaluate.path if path != DOCSTRINGS]
    for collection in open_collections(given, config.evaluate.split):
        collection.check()
    if Workspace(config).train().manifest() is None:
        if config.embed.model != CHARACTER_NGRAMS:
            check_model(config.embed.model, config.storage, key="embed.model", load=False)
        check_model(config.train.model, config.storage, key="train.model", kind=config.train.encoder, load=False)


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
            first = next(read_slice(Slice(0, file, 0, file.size), config.corpus, config.storage), None)
            reasons = [] if first is None or len(first.rows) else [reject.reason for reject in first.rejects]
            if reasons and all(": no column " in reason for reason in reasons):
                raise BrokenFileError(f"{reasons[0]}, in none of the first {len(reasons):,} rows")
        except BrokenFileError as error:
            raise DataError(f"{file.uri}: {error} (corpus.on_error: reject continues without such files)") from error

"""What an evaluation would refuse only when all before it is done: refused before anything begins."""

from __future__ import annotations

from clusterbatch.config import DOCSTRINGS, RunConfig
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.collection import DOCUMENTS, QUERIES, Collection
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.models import AFTER, evaluated_models
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.store.workspace import Workspace


def check_models(config: RunConfig) -> None:
    """Raises UsageError where a measure or a model of `evaluate` is not there; the trained one may not be yet."""
    for name in config.evaluate.metrics:
        parse_metric(name)
    others = [name for name in config.evaluate.models if name != AFTER]
    try:
        evaluated_models(_with(config, models=others), generation=0)
    except UsageError as error:
        raise UsageError(f"evaluate.models: {str(error).removeprefix('evaluate.models: ')}") from None


def check_collections(config: RunConfig, *, ingested: bool = False) -> None:
    """Raises UsageError where a collection that is to be searched is not there, DataError where its judgements are not
    readable.

    ingested: whether the corpus is there, with the sample's collection and what is held out; else these are let pass
    where ingest can make them.
    """
    evaluate, workspace = config.evaluate, Workspace(config)
    if not ingested:
        if not evaluate.path and evaluate.holdout:
            return
        if DOCSTRINGS in evaluate.path and workspace.sample.manifest() is None:
            if DOCSTRINGS not in config.corpus.paths:
                raise UsageError(
                    f"evaluate.path: {DOCSTRINGS} is the built-in sample's own collection, but corpus.paths does not "
                    "name the sample; give collections of your own (BEIR layout), or evaluate.path=[] to hold one out"
                )
            given = [path for path in evaluate.path if path != DOCSTRINGS]
            if not given:
                return
            config = _with(config, path=given)
    for collection in configured_collections(config):
        _check(collection)


def _with(config: RunConfig, **changes: list[str]) -> RunConfig:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})


def _check(collection: Collection) -> None:
    for name in (DOCUMENTS, QUERIES):
        if not collection.folder.exists(name):
            raise UsageError(f"evaluate.path: {collection.folder.uri} is no collection in BEIR layout (no {name})")
    if not collection.folder.exists(collection.judgements_file):
        raise UsageError(
            f"evaluate.split: {collection.folder.uri} has no judgements called {collection.split} "
            f"({collection.judgements_file})"
        )
    collection.read_judgements()

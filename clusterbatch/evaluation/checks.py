"""Checks before any work starts: models and collections that a later stage would refuse."""

from __future__ import annotations

from collections.abc import Iterable

from clusterbatch.config import DOCSTRINGS, RunConfig
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.encoder.check import check_model
from clusterbatch.encoder.limits import (
    TextLimit,
    check_limits,
    embedding_limits,
    evaluation_limits,
    starting_model_limits,
)
from clusterbatch.encoder.model_files import Kind
from clusterbatch.errors import UsageError, about
from clusterbatch.evaluation.collection import DOCUMENTS, QUERIES, open_collections
from clusterbatch.evaluation.metrics import parse_metric
from clusterbatch.evaluation.models import AFTER, BEFORE, BM25, check_room, evaluated_models
from clusterbatch.evaluation.stage import configured_collections
from clusterbatch.store import Folder
from clusterbatch.store.workspace import Workspace


def check_models(config: RunConfig) -> None:
    """Raise the error that a stage would raise on a measure of `evaluate` or a model that is named anywhere.

    Models are loaded once for that, unless the workspace has a trained model: then every stage has loaded them before,
    and only what `evaluate` asks of them is checked.
    """
    for name in config.evaluate.metrics:
        parse_metric(name)
    others = [name for name in config.evaluate.models if name != AFTER]
    try:
        evaluated = evaluated_models(_with(config, models=others), generation=0)
    except UsageError as error:
        raise UsageError(f"evaluate.models: {str(error).removeprefix('evaluate.models: ')}") from None
    if Workspace(config).train().manifest() is not None:
        check_room(evaluated, config)
        return
    if config.embed.model not in SURROGATES:
        check_model(
            config.embed.model,
            config.storage,
            key="embed.model",
            int8=config.embed.dtype == "int8",
            limits=embedding_limits(config),
        )
    limits = starting_model_limits(config)
    check_model(config.train.model, config.storage, key="train.model", kind=config.train.encoder, limits=limits)
    for name in others:
        if name not in (BEFORE, BM25):
            place = evaluated_models(_with(config, models=[name]), generation=0)[0].name
            check_model(place, config.storage, key="evaluate.models", limits=evaluation_limits(config, {}))


def check_text_limits(configs: Iterable[RunConfig]) -> None:
    """Raise UsageError if a prompt or special tokens fill a limit of `embed`, `train` or `evaluate`; load no weights.

    configs: variants of one configuration; what they have in common is looked at once.
    """
    seen: set[str] = set()
    for config in configs:
        train = config.train
        asked: list[tuple[str, str, list[TextLimit], Kind | None]] = [
            ("train.model", train.model, starting_model_limits(config), train.encoder)
        ]
        if config.embed.model not in SURROGATES:
            asked.append(("embed.model", config.embed.model, embedding_limits(config), None))
        for check in asked:
            if repr(check) not in seen:
                seen.add(repr(check))
                key, name, limits, kind = check
                with about(key):
                    check_limits(name, config.storage, limits, kind)


def check_collections(config: RunConfig, *, ingested: bool = False) -> None:
    """Raise UsageError if a collection that is to be searched is missing, DataError if it is damaged.

    ingested: whether the corpus is made, with the sample's collection and what is held out; otherwise these are skipped
    if ingest can make them.
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
        collection.check()


def check_given_collections(config: RunConfig) -> None:
    """Raise DataError if a collection of `evaluate.path` is damaged or has an unusable id.

    Collections that lack a file are passed over, as is the built-in sample's own: commands that need them say so.
    """
    given = [Folder(path, config.storage) for path in config.evaluate.path if path != DOCSTRINGS]
    for collection in open_collections(given, config.evaluate.split):
        if all(collection.folder.exists(name) for name in (DOCUMENTS, QUERIES, collection.judgements_file)):
            collection.check_ids()


def _with(config: RunConfig, **changes: list[str]) -> RunConfig:
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})

"""Recognise a run that has nothing to do, before anything heavy is imported.

Torch, Ray and the libraries for figures take seconds to import. A complete run therefore records what it read and what
it left. While all of that is unchanged, running it again would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import clusterbatch
from clusterbatch.config import DOCSTRINGS, RunConfig, fingerprint
from clusterbatch.config.stages import CHARACTER_NGRAMS
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.encoder.resolve import model_place, resolve_model
from clusterbatch.errors import ClusterbatchError
from clusterbatch.log import say
from clusterbatch.pipeline.rounds import wanted_generation
from clusterbatch.pipeline.summary import SUMMARY
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.artifact import EXCHANGE, MANIFEST, RECEIPTS
from clusterbatch.store.checksum import checksum
from clusterbatch.store.entry import Entry
from clusterbatch.store.workspace import Workspace

# In the workspace: the fingerprint of the state in which the last complete run left it.
RECORD = "_run.json"
_REPORT = "index.html"
# Models of `evaluate.models` that name no files of their own.
_NAMED_MODELS = ("before", "after", "bm25")


def finished_report(config: RunConfig) -> str | None:
    """Return the URI of the report if a run with this configuration would do nothing at all, otherwise None.

    Says of each stage that it is done. Nothing that a run reads or writes may have changed since the last complete one:
    inputs, collections, models, manifests, the live model, the report, this program.
    """
    workspace = Workspace(config)
    try:
        record = workspace.root.read_json(RECORD)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or None in record.values():
        return None
    if record.get("read") != read_state(config) or record.get("left") != _left_state(config):
        return None
    for name, artifact in _stages(workspace, config).items():
        say(f"{name:<9} done already", fingerprint=artifact.require().fingerprint)
    return f"{workspace.report.uri}/{_REPORT}"


def record_finished(config: RunConfig, read: str | None) -> None:
    """Record that a run has completed, for `finished_report`.

    read: `read_state` of when the run began; if it has changed since, nothing is recorded.
    """
    if read is not None and read == read_state(config):
        Workspace(config).root.write_json(RECORD, {"read": read, "left": _left_state(config)})


def read_state(config: RunConfig) -> str | None:
    """Return a fingerprint of all that a run of all stages reads; None if that cannot be told without running it."""
    if not config.corpus.paths or config.corpus.delete or config.evaluate.mteb:
        return None
    try:
        return fingerprint(
            config.model_dump(mode="json"),
            _listed(Folder(str(Path(clusterbatch.__file__).parent)).find("**/*.py")),
            _inputs(config),
            {path: _listed(Folder(path, config.storage).find()) for path in _collections(config)},
            {name: _model(name, config) for name in sorted(_models(config))},
        )
    except (FileNotFoundError, ClusterbatchError):
        # The full run finds out what is wrong, and says so.
        return None


def _left_state(config: RunConfig) -> str | None:
    """Return a fingerprint of all that a run leaves; None if a stage has not finished."""
    workspace = Workspace(config)
    artifacts = _stages(workspace, config)
    if config.mine.is_on:
        artifacts["mine"] = workspace.mined()
    if DOCSTRINGS in config.corpus.paths:
        artifacts["sample"] = workspace.sample
    if any(artifact.folder.list(place) for artifact in artifacts.values() for place in (RECEIPTS, EXCHANGE)):
        return None
    try:
        return fingerprint(
            {name: checksum(artifact.folder.read(MANIFEST)) for name, artifact in artifacts.items()},
            _listed(workspace.model.find()),
            wanted_generation(workspace),
            workspace.generations(),
            _listed(workspace.report.find()),
            checksum(workspace.root.read(SUMMARY)),
        )
    except FileNotFoundError:
        return None


def _stages(workspace: Workspace, config: RunConfig) -> dict[str, Artifact]:
    return {
        "ingest": workspace.corpus,
        "embed": workspace.embeddings(),
        "cluster": workspace.clusters(),
        **({"score": workspace.scores()} if config.score.is_on else {}),
        "train": workspace.train(),
        "evaluate": workspace.evaluation(),
    }


def _inputs(config: RunConfig) -> list[list[Any]]:
    paths = [path for path in config.corpus.paths if path != DOCSTRINGS]
    return [[file.uri, file.size, file.version] for file in find_inputs(config.corpus, paths, config.storage)]


def _collections(config: RunConfig) -> list[str]:
    return [path for path in config.evaluate.path if path != DOCSTRINGS]


def _models(config: RunConfig) -> Iterator[str]:
    yield config.train.model
    if config.embed.model != CHARACTER_NGRAMS:
        yield config.embed.model
    if config.score.teacher is not None:
        yield config.score.teacher
    yield from (name for name in config.evaluate.models if name not in _NAMED_MODELS)


def _model(name: str, config: RunConfig) -> list[Any]:
    """Return the files of a model, or of the live model if `name` is a workspace."""
    folder = model_place(name, config.storage) or Folder(resolve_model(name, config.storage))
    return [folder.uri, *_listed(folder.find(linked_folders=True))]


def _listed(entries: Sequence[Entry]) -> list[list[Any]]:
    return [[entry.name, entry.size, entry.version] for entry in entries]

"""Find work of another configuration before a run begins, and name the keys that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from clusterbatch.clustering.cells import grouping_of
from clusterbatch.config import RunConfig
from clusterbatch.config.base import Section
from clusterbatch.embedding.stage import planned_fingerprint as planned_embeddings
from clusterbatch.errors import ClusterbatchError, OtherWorkError
from clusterbatch.evaluation.stage import planned_fingerprint as planned_evaluation
from clusterbatch.scoring.stage import planned_fingerprint as planned_scores
from clusterbatch.shards.stage import planned_fingerprint as planned_clusters
from clusterbatch.store import Artifact, Manifest
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.stage import planned_fingerprint as planned_training
from clusterbatch.training.worker import checkpoints_of

_NAMED_KEYS = 4
_LONGEST_VALUE = 60


def other_work(config: RunConfig) -> tuple[str, Artifact] | None:
    """Return the first stage, and its artifact, that a run without `--force` would refuse to replace.

    Only what is certain before the run begins is found: a stage whose inputs are not known yet finds out itself, and
    `ingest` begins at once in any case.
    """
    workspace = Workspace(config)
    corpus = workspace.corpus.manifest()
    if corpus is None:
        return None
    embeddings, clusters, trained = workspace.embeddings(), workspace.clusters(), workspace.train()
    try:
        wanted = planned_embeddings(config, corpus)
        if _is_earlier(embeddings, corpus) or _is_earlier(clusters, corpus):
            # The embeddings are continued; of clusters the stage has its own words.
            return None
        if _is_other(embeddings, wanted):
            return "embed", embeddings
        planned = planned_clusters(config, corpus.fingerprint, wanted)
        if planned is None:
            return None
        if _is_other(clusters, planned):
            return "cluster", clusters
        if clusters.manifest() is None:
            found = trained.manifest()
            return ("train", trained) if found is not None and found.inputs.get("clusters") != planned else None
        if config.score.is_on and _is_other(workspace.scores(), planned_scores(config, planned)):
            return "score", workspace.scores()
        wanted = planned_training(config)
        if _is_other(trained, wanted):
            return "train", trained
        latest = checkpoints_of(config, 0).latest()
        if latest is not None and latest.manifest.run_fingerprint != wanted:
            # The stage names these checkpoints, which are in the way before the evaluation is.
            return None
        if _is_other(workspace.evaluation(), planned_evaluation(config, wanted)):
            return "evaluate", workspace.evaluation()
    except ClusterbatchError:
        # Whatever cannot be read is found, and explained, by the stage that needs it.
        return None
    return None


def check_no_other_work(config: RunConfig, stages: list[str]) -> None:
    """Raise the error with which a stage would refuse to start, before earlier stages do any work.

    stages: names of all stages, in order. Raises OtherWorkError if an artifact is the work of another configuration or
    of other inputs, UsageError if that is in another workspace (`reuse`).
    """
    found = other_work(config)
    if found is None:
        return
    name, artifact = found
    try:
        # No stage has an empty fingerprint: this refuses, as the stage itself would.
        artifact.begin("")
    except OtherWorkError as error:
        again = ", ".join(stages[stages.index(name) :])
        raise OtherWorkError(
            f"{with_changed_keys(str(error), name, artifact, config)}; --force redoes {again}"
        ) from None


def with_changed_keys(message: str, stage: str, artifact: Artifact, config: RunConfig) -> str:
    """Return a message with the keys behind it that have another value than the artifact was made with."""
    manifest = artifact.manifest()
    changed = [] if manifest is None else changed_keys(stage, manifest, config)
    if not changed:
        return message
    more = f", and {len(changed) - _NAMED_KEYS} more keys" if len(changed) > _NAMED_KEYS else ""
    return f"{message} ({'; '.join(changed[:_NAMED_KEYS])}{more})"


def changed_keys(stage: str, manifest: Manifest, config: RunConfig) -> list[str]:
    """Return "key was VALUE, is VALUE" for each key of a stage that is not as its artifact was made with."""
    sections: dict[str, dict[str, Section]] = {
        "ingest": {"corpus": config.corpus},
        "embed": {"embed": config.embed},
        "cluster": {"cluster": config.cluster},
        "score": {"score": config.score},
        "train": {"train": config.train, "batches": config.batches},
        "evaluate": {"evaluate": config.evaluate},
    }
    made, found = manifest.config, []
    for name, section in sections[stage].items():
        stored = made.get(name) if stage in ("train", "evaluate") else made
        if stored:
            found += list(_differences(name, section, stored))
    if stage == "cluster" and "stratify" in made and made["stratify"] != grouping_of(config):
        found.append(f"batches.stratify needs {_shown(grouping_of(config))}, has {_shown(made['stratify'])}")
    return found


def _differences(name: str, section: Section, stored: Mapping[str, Any]) -> Iterator[str]:
    identity, values = section.identity(), section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        marks = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        value, full = getattr(section, key), f"{name}.{key}"
        # An unset learning rate stands for that of the model.
        if marks.get("operational") or (full == "train.learning_rate" and value is None):
            continue
        if isinstance(value, Section) and isinstance(stored.get(key), Mapping):
            yield from _differences(full, value, stored[key])
        elif key in stored and json.loads(json.dumps(identity.get(key, values[key]))) != stored[key]:
            yield f"{full} was {_shown(stored[key])}, is {_shown(values[key])}"
        elif key not in stored and key in identity and marks.get("added"):
            yield f"{full} was its default, is {_shown(values[key])}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _is_other(artifact: Artifact, fingerprint: str) -> bool:
    manifest = artifact.manifest()
    return manifest is not None and manifest.fingerprint != fingerprint


def _is_earlier(artifact: Artifact, corpus: Manifest) -> bool:
    """Return whether an artifact was made of an earlier version of the corpus."""
    manifest = artifact.manifest()
    return manifest is not None and manifest.inputs.get("corpus") in corpus.earlier

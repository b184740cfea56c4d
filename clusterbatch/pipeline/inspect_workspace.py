"""Contents of a workspace: each stage's state, rows, bytes and time. Works during a run, from anywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from clusterbatch.config import RunConfig
from clusterbatch.errors import UsageError
from clusterbatch.pipeline.rounds import read_round
from clusterbatch.pipeline.run import stages_of
from clusterbatch.pipeline.summary import SUMMARY, generations
from clusterbatch.shards.statistics import inspect_cluster
from clusterbatch.store import Artifact, Folder, Manifest
from clusterbatch.store.artifact import EXCHANGE, MANIFEST, RECEIPTS
from clusterbatch.store.details import ClustersDetails, CorpusDetails, details_of
from clusterbatch.store.growing import GrowingArtifact
from clusterbatch.store.lease import LEASE
from clusterbatch.store.workspace import Workspace, live_generation
from clusterbatch.training.metrics import SEGMENTS, read_last_line
from clusterbatch.training.worker import CHECKPOINTS

# Names in a workspace that show a run, or an experiment, before any stage has begun.
_TRACES = {LEASE, SUMMARY, "sample", "compare", "tune", "predict"}


def inspect_workspace(config: RunConfig) -> list[dict[str, Any]]:
    """Return one row per stage and generation: {stage, generation, state, read, written, rejected, set_aside, parts,
    bytes, seconds, created}; generation is None for the corpus.

    `state` is 'done', 'not begun', or how far it is and when it last left something; of a generation that trained on
    earlier clusters or was cleaned away it says so. Some rows have more: `sources`, rows by source (ingest) or clusters
    by source (cluster); `live`, whether this generation's model is the live one, and `checkpoint_bytes`, which `bytes`
    includes (train); `versions` of what has grown, {version, created, seconds, written, deleted} of each.

    Only manifests, names of receipts and the newest line of training are read, so this costs a running job nothing.
    """
    workspace = Workspace(config)
    rows = []
    for generation in generations(config) or [0]:
        for stage in stages_of(config):
            of_corpus = stage.name == "ingest"
            if of_corpus and generation > 0:
                continue
            artifact = stage.artifact(workspace, generation)
            row: dict[str, Any] = {"stage": stage.name, "generation": None if of_corpus else generation}
            manifest = artifact.manifest()
            if manifest is None:
                row["state"] = _kept_or_cleaned(workspace, stage.name, generation) or _state(artifact)
            else:
                row |= _finished(artifact, manifest) | _contents(stage.name, manifest)
            if stage.name == "train":
                row |= _training(workspace, generation, row)
            rows.append(row)
    return rows


def require_workspace(config: RunConfig, rows: Sequence[Mapping[str, Any]], *, leased: bool = False) -> None:
    """Raise UsageError if no run has been in the workspace; `rows`: those of `inspect_workspace`.

    leased: whether this process holds the workspace's lease, which is then no trace of a run.
    """
    traces = _TRACES - {LEASE} if leased else _TRACES
    root = Workspace(config).root
    if {row["state"] for row in rows} == {"not begun"} and not traces.intersection(root.list()):
        raise UsageError(f"workspace: no run has been at {root.uri}; check the address")


def inspect_named_cluster(config: RunConfig, name: str) -> dict[str, Any]:
    """Return the statistics of cluster "SOURCE/ID" in the newest generation whose clusters are finished.

    A source may have slashes in its own name. Raises UsageError if there is no such source or cluster, DataError if
    nothing is clustered yet.
    """
    source, _, number = name.rpartition("/")
    if not source or not number.isdecimal():
        raise UsageError(f"--cluster {name}: expected SOURCE/ID, for example wiki/12")
    workspace = Workspace(config)
    finished = [each for each in generations(config) if workspace.clusters(each).manifest() is not None]
    return inspect_cluster(config, source, int(number), generation=max(finished, default=0))


def _finished(artifact: Artifact, manifest: Manifest) -> dict[str, Any]:
    row: dict[str, Any] = {
        "state": "done",
        **manifest.counts.model_dump(),
        "parts": len(manifest.parts),
        "bytes": sum(part.bytes for part in manifest.parts),
        "seconds": manifest.seconds,
        "created": manifest.created,
    }
    if isinstance(artifact, GrowingArtifact) and manifest.version > 1:
        row["versions"] = [_version(each) for each in artifact.versions()]
    return row


def _contents(stage: str, manifest: Manifest) -> dict[str, Any]:
    """Return rows or clusters by source, where the manifest has them."""
    if stage == "ingest":
        return {"sources": details_of(manifest, CorpusDetails).get("sources", {})}
    if stage == "cluster":
        sources = details_of(manifest, ClustersDetails).get("sources", {})
        return {"sources": {name: of_source.get("clusters") for name, of_source in sources.items()}}
    return {}


def _training(workspace: Workspace, generation: int, row: Mapping[str, Any]) -> dict[str, Any]:
    entries = workspace.train(generation).folder.child(CHECKPOINTS).find()
    kept = sum(entry.size for entry in entries)
    return {
        "live": live_generation(workspace) == generation,
        "checkpoint_bytes": kept,
        "bytes": row.get("bytes", 0) + kept,
    }


def _kept_or_cleaned(workspace: Workspace, stage: str, generation: int) -> str | None:
    """Say why a stage of a later generation has nothing of its own; None if it may still come to that."""
    record = read_round(workspace, generation) if generation else None
    if record is None:
        return None
    if record.clusters != generation and stage in ("embed", "cluster"):
        return f"not needed: clusters of generation {record.clusters}"
    gone = record.promoted is not None and not workspace.train(generation).own_files()
    return "cleaned away" if gone else None


def _version(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "created": manifest.created,
        "seconds": manifest.seconds,
        "written": manifest.counts.written,
        "deleted": manifest.counts.set_aside.get("deleted", 0),
    }


def _state(artifact: Artifact) -> str:
    """Return how far an artifact without a manifest is."""
    try:
        return _progress(artifact.folder)
    except FileNotFoundError:
        # Removed between one look and the next: the stage has just continued.
        return "under way"


def _progress(folder: Folder) -> str:
    step = read_last_line(folder)
    if step is not None:
        return f"step {step['step'] + 1:,} done, loss {step['loss']:.4f}{_sign_of_life(folder.child(SEGMENTS))}"
    for name in folder.list(EXCHANGE):
        # Passes are done one after the other: the one without a manifest is the current one.
        receipts = folder.child(EXCHANGE, name, RECEIPTS)
        if not folder.list(f"{EXCHANGE}/{name}"):
            # A file, and none of a pass.
            continue
        if not folder.exists(f"{EXCHANGE}/{name}/{MANIFEST}"):
            return f"{len(receipts.list()):,} units of pass {name} done{_sign_of_life(receipts)}"
    receipts = folder.child(RECEIPTS)
    units = len(receipts.list())
    if units:
        return f"{units:,} units done{_sign_of_life(receipts)}"
    return "begun" if folder.list() else "not begun"


def _sign_of_life(folder: Folder) -> str:
    """Return in words how long ago something was written there."""
    newest = folder.last_write()
    return "" if newest is None else f", last write {max(0.0, time.time() - newest):,.0f} s ago"

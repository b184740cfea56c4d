"""What is in a workspace: each stage's state, rows, bytes and time. Works while a run is under way, from anywhere."""

from __future__ import annotations

import time
from typing import Any

from clusterbatch.config import RunConfig
from clusterbatch.errors import UsageError
from clusterbatch.pipeline.run import STAGES
from clusterbatch.pipeline.summary import generations
from clusterbatch.shards.statistics import inspect_cluster
from clusterbatch.store import Artifact, Folder, Manifest
from clusterbatch.store.artifact import MANIFEST, RECEIPTS
from clusterbatch.store.versions import GrowingArtifact
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.metrics import SEGMENTS, read_last_line

_PASSES = "_exchange"


def inspect_workspace(config: RunConfig) -> list[dict[str, Any]]:
    """One row per stage and generation: {stage, generation, state, read, written, rejected, set_aside, parts, bytes,
    seconds, created}; generation is None for the corpus. Of what has grown also `versions`: {version, created, seconds,
    written, deleted} of each, all rows counted.

    `state` is 'done', 'not begun', or how far it is and when it last left something. Only manifests, names of receipts
    and the newest line of training are read, so this costs a running job nothing.
    """
    workspace = Workspace(config)
    rows = []
    for generation in generations(config) or [0]:
        for stage in STAGES:
            of_corpus = stage.name == "ingest"
            if of_corpus and generation > 0:
                continue
            artifact = stage.artifact(workspace, generation)
            row: dict[str, Any] = {"stage": stage.name, "generation": None if of_corpus else generation}
            manifest = artifact.manifest()
            if manifest is None:
                row["state"] = _state(artifact)
            else:
                row |= {
                    "state": "done",
                    **manifest.counts.model_dump(),
                    "parts": len(manifest.parts),
                    "bytes": sum(part.bytes for part in manifest.parts),
                    "seconds": manifest.seconds,
                    "created": manifest.created,
                }
                if isinstance(artifact, GrowingArtifact) and manifest.version > 1:
                    row["versions"] = [_version(each) for each in artifact.versions()]
            rows.append(row)
    return rows


def inspect_named_cluster(config: RunConfig, name: str) -> dict[str, Any]:
    """clustering.inspect's row of "SOURCE/ID", of the newest generation whose clusters are finished.

    A source may have slashes in its own name. Raises UsageError where there is no such source or cluster, DataError
    where nothing is clustered yet.
    """
    source, _, number = name.rpartition("/")
    if not source or not number.isdecimal():
        raise UsageError(f"--cluster {name}: expected SOURCE/ID, for instance wiki/12")
    workspace = Workspace(config)
    finished = [each for each in generations(config) if workspace.clusters(each).manifest() is not None]
    return inspect_cluster(config, source, int(number), generation=max(finished, default=0))


def _version(manifest: Manifest) -> dict[str, Any]:
    return {
        "version": manifest.version,
        "created": manifest.created,
        "seconds": manifest.seconds,
        "written": manifest.counts.written,
        "deleted": manifest.counts.set_aside.get("deleted", 0),
    }


def _state(artifact: Artifact) -> str:
    """Of an artifact without a manifest."""
    try:
        return _progress(artifact.folder)
    except FileNotFoundError:
        # Removed between one look and the next: the stage has just gone on.
        return "under way"


def _progress(folder: Folder) -> str:
    step = read_last_line(folder)
    if step is not None:
        return f"step {step['step'] + 1:,} done, loss {step['loss']:.4f}{_sign_of_life(folder.child(SEGMENTS))}"
    for name in folder.list(_PASSES):
        # Passes are done one after the other: the one without a manifest is the current one.
        receipts = folder.child(_PASSES, name, RECEIPTS)
        if not folder.exists(f"{_PASSES}/{name}/{MANIFEST}"):
            return f"{len(receipts.list()):,} units of pass {name} done{_sign_of_life(receipts)}"
    receipts = folder.child(RECEIPTS)
    units = len(receipts.list())
    if units:
        return f"{units:,} units done{_sign_of_life(receipts)}"
    return "begun" if folder.list() else "not begun"


def _sign_of_life(folder: Folder) -> str:
    """How long ago something was written there, in words."""
    newest = folder.last_write()
    return "" if newest is None else f", last write {max(0.0, time.time() - newest):,.0f} s ago"

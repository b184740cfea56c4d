"""What is in a workspace: each stage's state, rows, bytes and time."""

from __future__ import annotations

from typing import Any

from clusterbatch.config import RunConfig
from clusterbatch.experiments.run import STAGES
from clusterbatch.store.artifact import MANIFEST, RECEIPTS
from clusterbatch.store.workspace import Workspace


def inspect_workspace(config: RunConfig) -> list[dict[str, Any]]:
    """One row per stage: {stage, state, read, written, rejected, set_aside, parts, bytes, seconds, created}.

    `state` is 'done', 'interrupted after n units' or 'not begun'; only manifests and receipts are read.
    """
    workspace = Workspace(config)
    rows = []
    for stage in STAGES:
        artifact = stage.artifact(workspace, 0)
        manifest = artifact.manifest()
        row: dict[str, Any] = {"stage": stage.name}
        if manifest is None:
            units = len(artifact.folder.list(RECEIPTS))
            begun = units or any(name != MANIFEST for name in artifact.folder.list())
            row["state"] = f"interrupted after {units} units" if begun else "not begun"
        else:
            row |= {
                "state": "done",
                **manifest.counts.model_dump(),
                "parts": len(manifest.parts),
                "bytes": sum(part.bytes for part in manifest.parts),
                "seconds": manifest.seconds,
                "created": manifest.created,
            }
        rows.append(row)
    return rows

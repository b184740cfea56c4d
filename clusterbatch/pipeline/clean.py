"""`clean`: remove what a workspace no longer needs.

These are old generations, old checkpoints, files of interrupted attempts, and uploads in parts that a killed process
left behind: those are no files yet, in no listing, and paid for until aborted. Only files of this product are removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from clusterbatch.config import RunConfig
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.log import say
from clusterbatch.pipeline.rounds import RECORD, discard_generation, needed_generations, refresh_files
from clusterbatch.store.artifact import EXCHANGE, MANIFEST, Artifact
from clusterbatch.store.entry import Entry
from clusterbatch.store.folder import TEMPORARY, Folder
from clusterbatch.store.growing import VERSIONS
from clusterbatch.store.s3 import Upload
from clusterbatch.store.workspace import Workspace

_GENERATION = re.compile(r"generation=(\d+)")
_CHECKPOINTS = "checkpoints"
_CHECKPOINT = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class Removal:
    """A file or folder (relative to the workspace) that goes, the bytes in it, and why.

    upload: set if it is no file yet but an upload in parts that nobody finished; its bytes are not known. checkpoint:
    whether it is a checkpoint's folder, in which files of others stay.
    """

    path: str
    bytes: int
    reason: str
    upload: Upload | None = None
    checkpoint: bool = False


def clean(config: RunConfig, keep: int = 1, dry_run: bool = True) -> list[Removal]:
    """Find, and unless `dry_run` remove, what the last `keep` generations and checkpoints do not need.

    The checkpoint that scored best stays, however old. A generation counts when its model is trained. These stay: one
    that is being made, the live one, that which `refresh --rollback` returns to, the clusters these trained on, and of
    every generation the record of its round. Raises UsageError if `keep` is less than 1.
    """
    if keep < 1:
        raise UsageError(f"clean: keep must be at least 1, not {keep}")
    workspace = Workspace(config)
    removals = list(_removals(workspace, keep))
    if not dry_run:
        for removal in removals:
            assert removal.path, "an empty path would be the whole workspace"
            if removal.upload:
                workspace.root.abort_upload(removal.upload)
            elif generation := _GENERATION.fullmatch(removal.path):
                discard_generation(workspace, int(generation[1]), keep_record=True)
                workspace.root.child(removal.path).remove_files([])
            elif removal.checkpoint:
                Artifact(workspace.root.child(removal.path), "checkpoint").remove()
            else:
                workspace.root.remove_files([removal.path])
    return removals


def _removals(workspace: Workspace, keep: int) -> Iterator[Removal]:
    root = workspace.root
    numbers = workspace.generations()
    finished = [number for number in numbers if workspace.train(number).manifest() is not None]
    oldest = finished[-keep] if len(finished) >= keep else 0
    needed = needed_generations(workspace)
    for number in numbers:
        name = f"generation={number:03d}"
        if number < oldest and number not in needed:
            size = _generation_bytes(workspace, number)
            if size:
                yield Removal(name, size, f"older than the last {keep} finished generations")
            continue
        yield from _unneeded_checkpoints(root, f"{name}/train/{_CHECKPOINTS}", keep)
        for artifact in (workspace.embeddings(number), workspace.clusters(number), workspace.evaluation(number)):
            yield from _orphans(root, artifact)
    yield from _orphans(root, workspace.corpus)
    try:
        for upload in root.unfinished_uploads():
            yield Removal(upload.name, 0, f"upload in parts, begun {upload.begun} and never finished", upload)
    except InfrastructureError as error:
        # Older policies do not allow to list them, and not every server can: all else is cleaned nevertheless.
        say(f"unfinished uploads cannot be listed: {error}", level="warning")


def _generation_bytes(workspace: Workspace, generation: int) -> int:
    refresh = set(refresh_files(workspace, generation)) - {RECORD}
    sizes = [entry.size for entry in workspace.refresh(generation).find() if entry.name in refresh]
    return sum(sizes) + sum(entry.size for each in workspace.artifacts_of(generation) for entry in each.own_files())


def _unneeded_checkpoints(root: Folder, path: str, keep: int) -> Iterator[Removal]:
    """Old checkpoints, and files in others that their manifests do not name: interrupted attempts left them."""
    folder = root.child(path)
    steps = sorted(name for name in folder.list() if _CHECKPOINT.fullmatch(name))
    whole = [name for name in steps if folder.exists(f"{name}/{MANIFEST}")]
    best = _best(folder, whole)
    for name in steps:
        artifact = Artifact(folder.child(name), "checkpoint")
        entries = artifact.own_files()
        size = sum(entry.size for entry in entries)
        if size and whole and name < whole[-keep:][0] and name != best:
            reason = f"older than the last {keep} checkpoints"
            yield Removal(f"{path}/{name}", size, reason, checkpoint=True)
        elif name in whole:
            named = {MANIFEST, *(part.path for part in artifact.parts_listed("") or [])}
            for entry in entries:
                if entry.name not in named:
                    yield Removal(f"{path}/{name}/{entry.name}", entry.size, _why_orphaned(entry))


def _best(folder: Folder, checkpoints: Sequence[str]) -> str | None:
    """The checkpoint that scored highest while training, the first of equals; None if none was measured."""
    scores = {name: folder.read_json(f"{name}/{MANIFEST}").get("score") for name in checkpoints}
    measured = {name: score for name, score in scores.items() if score is not None}
    return max(measured, key=lambda name: measured[name], default=None)


def _orphans(root: Folder, artifact: Artifact) -> Iterator[Removal]:
    """Files of a finished artifact that its manifest does not name: interrupted attempts left them."""
    place = artifact.folder.uri[len(root.uri) + 1 :]
    if not artifact.folder.uri.startswith(f"{root.uri}/"):
        # It belongs to another workspace.
        return
    manifest = artifact.manifest()
    if manifest is None:
        return
    entries = artifact.own_files()
    named = {MANIFEST, *(part.path for part in manifest.parts)}
    # An artifact may lie inside another, as a surrogate does beside the vectors made with it.
    for entry in entries:
        inside, _, name = entry.name.rpartition("/")
        if inside and name == MANIFEST and EXCHANGE not in inside.split("/"):
            parts = artifact.parts_listed(inside) or []
            named |= {entry.name, *(f"{inside}/{part.path}" for part in parts)}
    for entry in entries:
        if entry.name not in named and not _in_work(entry.name, named):
            yield Removal(f"{place}/{entry.name}", entry.size, _why_orphaned(entry))


def _why_orphaned(entry: Entry) -> str:
    return "unfinished write" if entry.name.endswith(TEMPORARY) else "not named in the manifest"


def _in_work(name: str, named: set[str]) -> bool:
    """Return whether a file belongs to a version that is being made; the interrupted call can be continued."""
    place, _, rest = name.partition("/")
    return place == VERSIONS and f"{place}/{rest.partition('/')[0]}/{MANIFEST}" not in named

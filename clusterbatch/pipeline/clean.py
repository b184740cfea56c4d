"""What a workspace no longer needs: old generations, old checkpoints, and files that no manifest names.

Uploads in parts that a killed process left behind: no file yet, seen in no listing, and paid for until aborted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from clusterbatch.config import RunConfig
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.log import say
from clusterbatch.pipeline.rounds import needed_generations
from clusterbatch.store.artifact import MANIFEST, Artifact
from clusterbatch.store.folder import TEMPORARY, Folder
from clusterbatch.store.retries import with_retries
from clusterbatch.store.traffic import count
from clusterbatch.store.versions import VERSIONS
from clusterbatch.store.workspace import Workspace


@dataclass(frozen=True)
class Upload:
    """name: of the object it would have become, relative to the folder; begun: time as the server tells it."""

    name: str
    identifier: str
    begun: str


def unfinished_uploads(folder: Folder) -> Iterator[Upload]:
    """Those below `folder`; none on a local disk. One that is still going on looks the same: hold the lease."""
    if folder.is_local:
        return
    bucket, _, prefix = folder.path().partition("/")
    prefix = f"{prefix}/" if prefix else ""
    marker: dict[str, Any] = {}
    while True:
        page = _request(folder, "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
        for item in page.get("Uploads", []):
            yield Upload(item["Key"].removeprefix(prefix), item["UploadId"], f"{item['Initiated']:%Y-%m-%d %H:%M}")
        if not page.get("IsTruncated"):
            return
        marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def abort_upload(folder: Folder, upload: Upload) -> None:
    """Frees the parts that are stored; nothing happens where they are gone."""
    bucket, _, key = folder.path(upload.name).partition("/")
    with suppress(FileNotFoundError):
        _request(folder, "abort_multipart_upload", writes=1, Bucket=bucket, Key=key, UploadId=upload.identifier)


def _request(folder: Folder, operation: str, writes: int = 0, **arguments: Any) -> dict[str, Any]:
    count(reads=1 - writes, writes=writes)
    answer = with_retries(folder.uri, folder.storage, lambda: folder.filesystem.call_s3(operation, **arguments))
    return dict(answer)


_GENERATION = re.compile(r"generation=(\d+)")
_CHECKPOINTS = "checkpoints"
_CHECKPOINT = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class Removal:
    """A file or folder (relative to the workspace) that goes, the bytes in it, and why.

    upload: set where it is no file yet but an upload in parts that nobody finished; its bytes are not known.
    """

    path: str
    bytes: int
    reason: str
    upload: Upload | None = None


def clean(config: RunConfig, keep: int = 1, dry_run: bool = True) -> list[Removal]:
    """Finds, and unless `dry_run` removes, what the last `keep` generations and checkpoints do not need.

    The checkpoint that scored best stays, however old. A generation counts when its model is trained; one that is being
    made is never touched, nor the live one, that which `refresh --rollback` returns to, and the clusters these trained
    on. Raises UsageError where `keep` is less than 1.
    """
    if keep < 1:
        raise UsageError(f"clean: keep must be at least 1, not {keep}")
    workspace = Workspace(config)
    removals = list(_removals(workspace, keep))
    if not dry_run:
        for removal in removals:
            assert removal.path, "an empty path would be the whole workspace"
            if removal.upload:
                abort_upload(workspace.root, removal.upload)
                continue
            # The manifest goes first: what is half removed must not look whole.
            workspace.root.remove(f"{removal.path}/{MANIFEST}")
            workspace.root.remove(removal.path)
    return removals


def _removals(workspace: Workspace, keep: int) -> Iterator[Removal]:
    root = workspace.root
    names = [name for name in root.list() if _GENERATION.fullmatch(name)]
    numbers = sorted(int(name.partition("=")[2]) for name in names)
    finished = [number for number in numbers if workspace.train(number).manifest() is not None]
    oldest = finished[-keep] if len(finished) >= keep else 0
    needed = needed_generations(workspace)
    for number in numbers:
        name = f"generation={number:03d}"
        if number < oldest and number not in needed:
            yield Removal(name, _bytes(root.child(name)), f"older than the last {keep} finished generations")
            continue
        yield from _old_checkpoints(root, f"{name}/train/{_CHECKPOINTS}", keep)
        for artifact in (workspace.embeddings(number), workspace.clusters(number), workspace.evaluation(number)):
            yield from _orphans(root, artifact)
    yield from _orphans(root, workspace.corpus)
    try:
        for upload in unfinished_uploads(root):
            yield Removal(upload.name, 0, f"upload in parts, begun {upload.begun} and never finished", upload)
    except InfrastructureError as error:
        # Older policies do not allow to list them, and not every server can: all else is cleaned nevertheless.
        say(f"unfinished uploads cannot be listed: {error}", level="warning")


def _old_checkpoints(root: Folder, path: str, keep: int) -> Iterator[Removal]:
    folder = root.child(path)
    steps = sorted(name for name in folder.list() if _CHECKPOINT.fullmatch(name))
    whole = [name for name in steps if folder.exists(f"{name}/{MANIFEST}")]
    best = _best(folder, whole)
    for name in steps:
        if whole and name < whole[-keep:][0] and name != best:
            yield Removal(f"{path}/{name}", _bytes(folder.child(name)), f"older than the last {keep} checkpoints")


def _best(folder: Folder, checkpoints: Sequence[str]) -> str | None:
    """The checkpoint that scored highest while training, the first of equals; None where none was measured."""
    scores = {name: folder.read_json(f"{name}/{MANIFEST}").get("score") for name in checkpoints}
    measured = {name: score for name, score in scores.items() if score is not None}
    return max(measured, key=lambda name: measured[name], default=None)


def _orphans(root: Folder, artifact: Artifact) -> Iterator[Removal]:
    """Files of a finished artifact that its manifest does not name: interrupted attempts left them."""
    place = artifact.folder.uri[len(root.uri) + 1 :]
    if not artifact.folder.uri.startswith(f"{root.uri}/"):
        return  # taken from another workspace, whose own it is
    manifest = artifact.manifest()
    if manifest is None:
        return
    entries = artifact.folder.find()
    named = {MANIFEST, *(part.path for part in manifest.parts)}
    # An artifact may lie inside another, as a surrogate does beside the vectors made with it.
    for entry in entries:
        inside, _, name = entry.name.rpartition("/")
        if inside and name == MANIFEST:
            nested = Artifact(artifact.folder.child(inside), artifact.kind).require()
            named |= {entry.name, *(f"{inside}/{part.path}" for part in nested.parts)}
    for entry in entries:
        if entry.name not in named and not _in_work(entry.name, named):
            reason = "unfinished write" if entry.name.endswith(TEMPORARY) else "not named in the manifest"
            yield Removal(f"{place}/{entry.name}", entry.size, reason)


def _in_work(name: str, named: set[str]) -> bool:
    """Whether a file belongs to a version that is being made, which a call that was cut off goes on with."""
    place, _, rest = name.partition("/")
    return place == VERSIONS and f"{place}/{rest.partition('/')[0]}/{MANIFEST}" not in named


def _bytes(folder: Folder) -> int:
    return sum(entry.size for entry in folder.find())

"""Checkpoints: safetensors and JSON under <train>/checkpoints/step=NNNNNNNN/, whole when their manifest is there.

Nothing in them needs pickle. Randomness needs no state either: everything random is drawn from (seed, step, rank), see
grad_cache.RandomKey, and the batches from (plan fingerprint, step). Data parallel ranks hold equal weights, so rank 0
writes for all; it copies the tensors and continues training while a thread writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

import safetensors
import safetensors.torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from clusterbatch.errors import DataError
from clusterbatch.store import Artifact, Folder, Part
from clusterbatch.store.artifact import MANIFEST

# Files are held in memory whole while they are written, and objects have a largest size.
_FILE_BYTES = 2**30
_CHECKPOINT = re.compile(r"step=\d{8,}")


class CheckpointManifest(BaseModel):
    """Manifest of a checkpoint, written last. `step` is the number of optimizer steps done, so the next one to do."""

    step: int
    run_fingerprint: str
    # Data state: the batch after this checkpoint is plan.batch(step).
    plan_fingerprint: str
    epoch: int
    world_size: int
    # For the user's information; nothing else random is kept.
    seed: int
    parts: list[Part]
    # Score on the collection of train.evaluate_path at this step, if it was measured.
    score: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on storage."""

    folder: Folder
    manifest: CheckpointManifest

    def load(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (parameters, optimizer moments) by name, on the CPU. Raises DataError that names a damaged file."""
        return self.parameters(), self._read("moments")

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters alone, a third of what an optimizer with two moments needs; raises as `load` does."""
        return self._read("parameters")

    def _read(self, content: str) -> dict[str, Tensor]:
        artifact, found = Artifact(self.folder, "checkpoint"), dict[str, Tensor]()
        for part in self.manifest.parts:
            if part.details["holds"] != content:
                continue
            try:
                found |= safetensors.torch.load(artifact.read_part(part))
            except safetensors.SafetensorError as error:
                raise DataError(f"{self.folder.uri}/{part.path}: not a safetensors file ({error})") from None
        return found


class Checkpoints:
    """The checkpoints of one training run. `save` returns at once; call `wait` before the process may end."""

    def __init__(self, folder: Folder, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def whole(self) -> list[Checkpoint]:
        """Return all whole checkpoints, oldest first."""
        found = []
        for name in filter(_CHECKPOINT.fullmatch, self.folder.list()):
            folder = self.folder.child(name)
            try:
                data = folder.read(MANIFEST)
            except FileNotFoundError:
                continue
            try:
                found.append(Checkpoint(folder, CheckpointManifest.model_validate(json.loads(data))))
            except (ValidationError, ValueError):
                raise DataError(f"{folder.uri}/{MANIFEST}: damaged, not a checkpoint's manifest") from None
        return sorted(found, key=lambda checkpoint: checkpoint.manifest.step)

    def latest(self) -> Checkpoint | None:
        whole = self.whole()
        return whole[-1] if whole else None

    def save(
        self, manifest: CheckpointManifest, parameters: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> Future[None]:
        """Copy the tensors now, write them in a thread, then remove superseded checkpoints.

        Waits for the checkpoint before it, and raises what went wrong with that one.
        """
        self.wait()
        copies = {"parameters": _copied(parameters), "moments": _copied(moments)}
        self._pending = self._pool.submit(self._write, manifest, copies)
        return self._pending

    def is_free(self, within: float = 0.0) -> bool:
        """Return whether no checkpoint is being written any more, after at most `within` seconds."""
        return self._pending is None or not wait([self._pending], within).not_done

    def wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, manifest: CheckpointManifest, tensors: dict[str, dict[str, Tensor]]) -> None:
        folder = self.folder.child(_name(manifest.step))
        artifact = Artifact(folder, "checkpoint")
        parts: list[Part] = []
        try:
            for holds, named in tensors.items():
                for piece in _pieces(named):
                    data = safetensors.torch.save(piece)
                    parts.append(artifact.write_part(holds, "safetensors", data, len(piece), holds=holds))
        except Exception:
            # Nobody would ever name them, and on a full disk the next attempt needs their room.
            with suppress(Exception):
                folder.remove_files([part.path for part in parts])
            raise
        whole = manifest.model_copy(update={"parts": parts})
        folder.write(MANIFEST, whole.model_dump_json(indent=1).encode())
        self._remove_superseded()

    def _remove_superseded(self) -> None:
        """Remove older checkpoints, and those before the newest that a crash has left without a manifest."""
        whole = self.whole()
        kept = whole[-self._keep :]
        best = max((c for c in whole if c.manifest.score is not None), key=_score, default=None)
        needed = {_name(each.manifest.step) for each in [*kept, *([best] if best else [])]}
        for name in filter(_CHECKPOINT.fullmatch, self.folder.list()):
            if name not in needed and int(name.removeprefix("step=")) < kept[-1].manifest.step:
                Artifact(self.folder.child(name), "checkpoint").remove()


def _name(step: int) -> str:
    return f"step={step:08d}"


def _score(checkpoint: Checkpoint) -> float:
    assert checkpoint.manifest.score is not None
    return checkpoint.manifest.score


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _pieces(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in groups of about _FILE_BYTES, in order."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if piece and size + tensor.nbytes > _FILE_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = tensor
        size += tensor.nbytes
    if piece:
        yield piece

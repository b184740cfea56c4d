"""Teachers: a cross-encoder, or a second embedding model, that scores (query, document) pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from clusterbatch.config import RunConfig, ScoreConfig, StorageConfig
from clusterbatch.encoder.check import check_model, is_light
from clusterbatch.encoder.cross_encoder import CrossEncoder, is_cross_encoder, read_cross_layout
from clusterbatch.encoder.devices import bound_kernel_caches, inference_dtype, resolve_device
from clusterbatch.encoder.limits import scoring_limits
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.sides import SideTokenizer
from clusterbatch.errors import about

# Pairs of vectors that are multiplied at once.
_PAIRS = 2**16


class Teacher(Protocol):
    """Interface of a teacher; loaded once per process."""

    def scores(
        self, queries: Sequence[str], documents: Sequence[str], query: np.ndarray, document: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Return (P,) float32 scores of the pairs (queries[query[i]], documents[document[i]]), and the number of texts
        or pairs of texts that went through the model.

        queries, documents: distinct texts; query, document: (P,) int64, distinct pairs.
        """
        ...


class EmbeddingTeacher:
    """Cosines of a second embedding model; each text is encoded once."""

    def __init__(self, folder: str, config: ScoreConfig, device: torch.device) -> None:
        limits = {"query": config.max_tokens, "document": config.max_tokens}
        self._sides = SideTokenizer.of_model(folder, limits)  # type: ignore[arg-type]
        dtype = inference_dtype(config.dtype, device)
        self._encoder = load_encoder(folder, dtype=dtype, device=device, packed=True)
        self._batch_tokens = config.batch_tokens

    def scores(
        self, queries: Sequence[str], documents: Sequence[str], query: np.ndarray, document: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Return what `Teacher.scores` returns."""
        query_vectors = self._encoder.encode(self._sides.tokens(queries, "query"), self._batch_tokens)
        document_vectors = self._encoder.encode(self._sides.tokens(documents, "document"), self._batch_tokens)
        found = np.empty(len(query), np.float32)
        for start in range(0, len(query), _PAIRS):
            rows = slice(start, start + _PAIRS)
            found[rows] = np.einsum("pd,pd->p", query_vectors[query[rows]], document_vectors[document[rows]])
        return found, len(queries) + len(documents)


class PairTeacher:
    """Scores of a cross-encoder, which reads each pair."""

    def __init__(self, folder: str, config: ScoreConfig, device: torch.device) -> None:
        dtype = inference_dtype(config.dtype, device)
        self._model = CrossEncoder(folder, config.max_tokens, dtype=dtype, device=device)
        self._batch_tokens = config.batch_tokens

    def scores(
        self, queries: Sequence[str], documents: Sequence[str], query: np.ndarray, document: np.ndarray
    ) -> tuple[np.ndarray, int]:
        """Return what `Teacher.scores` returns."""
        asked, read = [queries[row] for row in query.tolist()], [documents[row] for row in document.tolist()]
        return self._model.scores(asked, read, self._batch_tokens), len(query)


def teacher_folder(config: ScoreConfig, storage: StorageConfig) -> str:
    """Return a local folder with the teacher's files. Raises what `resolve_model` raises, with the key before it."""
    assert config.teacher is not None, "nothing is scored without a teacher"
    with about("score.teacher"):
        return resolve_model(config.teacher, storage)


def teacher_kind(folder: str) -> Literal["cross-encoder", "embedding model"]:
    """Return what kind of teacher a folder holds."""
    return "cross-encoder" if is_cross_encoder(folder) else "embedding model"


def load_teacher(config: ScoreConfig, storage: StorageConfig, device: str) -> Teacher:
    """Load the teacher for the device `cpu` or `cuda`."""
    folder, target = teacher_folder(config, storage), resolve_device(device)
    if target.type == "cpu":
        bound_kernel_caches()
    return (PairTeacher if is_cross_encoder(folder) else EmbeddingTeacher)(folder, config, target)


def check_teacher(config: RunConfig, *, load: bool = True) -> None:
    """Raise the error that a worker would raise on loading `score.teacher`, with that key before the message.

    load: False: look at its settings and the names of its files only. Weights above 2 GiB are never loaded here.
    """
    settings = config.score
    if settings.teacher is None:
        return
    with about("score.teacher"):
        folder = teacher_folder(settings, config.storage)
        if not is_cross_encoder(folder):
            limits = scoring_limits(config)
            check_model(settings.teacher, config.storage, load=load, int8=settings.dtype == "int8", limits=limits)
            return
        read_cross_layout(folder)
        if load and is_light(Path(folder)):
            PairTeacher(folder, settings, torch.device("cpu"))

"""A unit of the corpus to its vectors: what the embedding stage and passes that embed on the fly have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.units import CorpusUnit
from clusterbatch.encoder.hardware import inference_dtype, resolve_device
from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.pixels import Pixels
from clusterbatch.encoder.prepare import SIDES, PreparedUnit, Preparer, Side
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.surrogate import SURROGATES, Surrogate
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError
from clusterbatch.store import Artifact
from clusterbatch.store.workspace import Workspace


@dataclass(frozen=True)
class EmbeddedUnit:
    """rows: pair_id and source; vectors: (n, d) float16 unit vectors of each side, in the same order.

    unknown: for each source, [unknown tokens, tokens]; tokens: how many went through the model.
    """

    rows: pa.Table
    vectors: dict[Side, np.ndarray]
    unknown: dict[str, list[int]]
    tokens: int


class UnitEmbedder:
    """Embeds units of a workspace's corpus with `embed.model`. Made once per process: it loads the weights.

    Holds one unit at a time, whatever the size of the corpus. The same unit gives the same vectors whether they were
    kept by the stage (`embed.persist`) or are computed here again. device: overrides `embed.device`.
    """

    def __init__(self, config: RunConfig, generation: int = 0, device: str | None = None) -> None:
        workspace = Workspace(config)
        self._preparer = Preparer(workspace.corpus, config.embed, config.storage, config.corpus.columns.images)
        if config.embed.model in SURROGATES:
            artifact = surrogate_artifact(workspace.embeddings(generation))
            surrogate = SURROGATES[config.embed.model].from_bytes(artifact.read_part(artifact.require().parts[0]))
            self._model: _FittedModel | _TokenModel = _FittedModel(surrogate, config.embed.max_tokens)
        else:
            self._model = _TokenModel(config, device)

    @property
    def dimensions(self) -> int:
        return self._model.dimensions

    def embed(self, unit: CorpusUnit, *, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> EmbeddedUnit:
        """Reads and embeds a unit, or only some of its `rows` (row numbers inside it) and one of its sides.

        Raises DataError that names the row whose vector is not finite.
        """
        return self.embed_prepared(self.prepare(unit, rows, sides))

    def prepare(self, unit: CorpusUnit, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> PreparedUnit:
        """The part of `embed` that needs no weights: reading, dropping what is there twice, tokenising."""
        return self._preparer.prepare(unit, rows, sides)

    def embed_prepared(self, prepared: PreparedUnit) -> EmbeddedUnit:
        """The vectors of a unit that was read and tokenised elsewhere."""
        vectors: dict[Side, np.ndarray] = {}
        count = 0
        for side, texts in prepared.texts.items():
            distinct, tokens = self._model.encode(texts.inputs)
            vectors[side] = distinct.astype(np.float16)[texts.text_of_row]
            _check_finite(vectors[side], prepared, side)
            count += tokens
        return EmbeddedUnit(prepared.rows, vectors, prepared.unknown, count)


def surrogate_artifact(embeddings: Artifact) -> Artifact:
    """Where the surrogate fitted to a corpus lies: beside the vectors made with it."""
    return Artifact(embeddings.folder.child("surrogate"), "surrogate")


class _TokenModel:
    def __init__(self, config: RunConfig, device: str | None) -> None:
        folder = resolve_model(config.embed.model, config.storage)
        target = resolve_device(device or config.embed.device)
        dtype = inference_dtype(config.embed.dtype, target)
        self._encoder = load_encoder(folder, dtype=dtype, device=target, packed=True)
        self._batch_tokens = config.embed.batch_tokens
        self.dimensions = self._encoder.dimensions

    def encode(self, inputs: pa.ListArray | pa.FixedSizeListArray) -> tuple[np.ndarray, int]:
        """(N, d) float32, and how many tokens that took."""
        if pa.types.is_fixed_size_list(inputs.type):
            assert self._encoder.images is not None
            tokens: Tokens | Pixels = self._encoder.images.from_arrow(inputs)
        else:
            tokens = Tokens.from_arrow(inputs)
        return self._encoder.encode(tokens, self._batch_tokens), int(tokens.lengths.sum())


class _FittedModel:
    def __init__(self, surrogate: Surrogate, max_tokens: int | None) -> None:
        self._surrogate = surrogate
        self._max_tokens = max_tokens
        self.dimensions = surrogate.dimensions

    def encode(self, inputs: pa.StringArray) -> tuple[np.ndarray, int]:
        """(N, d) float32; it takes no tokens."""
        return self._surrogate.encode(inputs.to_pylist(), self._max_tokens), 0


def _check_finite(vectors: np.ndarray, prepared: PreparedUnit, side: Side) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        row = int(broken[0])
        raise DataError(
            f"{prepared.place}, row {row} (pair {prepared.rows['pair_id'][row].as_py()}): the vector of its {side} is "
            f"not finite ({len(broken)} such rows here); the model's weights or embed.dtype are not fit for it"
        )

"""A unit of the corpus to its vectors: what the embedding stage and passes that embed on the fly have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig
from clusterbatch.corpus.units import CorpusUnit, read_unit
from clusterbatch.encoder.hardware import inference_dtype, resolve_device
from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.prepare import COLUMNS, SIDES, PreparedUnit, Preparer, Side
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError
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
    """Embeds units of a workspace's corpus with `embed.model`; made once per process, it loads the weights.

    Holds one unit at a time, whatever the size of the corpus. device: overrides `embed.device`.
    """

    def __init__(self, config: RunConfig, device: str | None = None) -> None:
        self._corpus = Workspace(config).corpus
        self._batch_tokens = config.embed.batch_tokens
        folder = resolve_model(config.embed.model, config.storage)
        target = resolve_device(device or config.embed.device)
        dtype = inference_dtype(config.embed.dtype, target)
        self._encoder = load_encoder(folder, dtype=dtype, device=target)
        self._preparer = Preparer(folder, config.embed)

    @property
    def dimensions(self) -> int:
        return self._encoder.dimensions

    def embed(self, unit: CorpusUnit, *, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> EmbeddedUnit:
        """Reads and embeds a unit, or only some of its `rows` (row numbers inside it) and one of its sides.

        Raises DataError that names the row whose vector is not finite.
        """
        columns = [name for name in COLUMNS if name.split("_")[0] not in SIDES or name.split("_")[0] in sides]
        table = read_unit(self._corpus, unit, columns)
        if rows is not None:
            table = table.take(pa.array(rows))
        return self.embed_prepared(self._preparer.prepare(table, sides), f"{self._corpus.folder.uri}/{unit.path}")

    def embed_prepared(self, prepared: PreparedUnit, place: str) -> EmbeddedUnit:
        """The vectors of rows that are tokenised already; `place` names them in an error."""
        vectors: dict[Side, np.ndarray] = {}
        count = 0
        for side, texts in prepared.texts.items():
            tokens = Tokens.from_arrow(texts.tokens)
            count += len(tokens.values)
            distinct = self._encoder.encode(tokens, self._batch_tokens).astype(np.float16)
            vectors[side] = distinct[texts.text_of_row]
            check_finite(vectors[side], prepared.rows, side, place)
        return EmbeddedUnit(prepared.rows, vectors, prepared.unknown, count)


def check_finite(vectors: np.ndarray, rows: pa.Table, side: Side, place: str) -> None:
    """Raises DataError that names the first row whose vector holds a NaN or an infinity."""
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        row = int(broken[0])
        raise DataError(
            f"{place}: the vector of the {side} of pair {rows['pair_id'][row].as_py()} (row {row} of its unit) is not "
            f"finite, as are {len(broken) - 1} others; the model or its dtype is not fit for this text"
        )


def merge_unknown(counts: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Sums [unknown tokens, tokens] by source over units."""
    total: dict[str, list[int]] = {}
    for unit in counts:
        for source, (unknown, tokens) in unit.items():
            before = total.get(source, [0, 0])
            total[source] = [before[0] + unknown, before[1] + tokens]
    return dict(sorted(total.items()))

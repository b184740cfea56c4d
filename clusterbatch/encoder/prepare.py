"""From a unit of the corpus to token ids: read, drop what is there twice, tokenise. All that needs no model weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.config import EmbedConfig
from clusterbatch.encoder.layout import read_layout
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.schema import token_type

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")
COLUMNS = ["pair_id", "source", "query", "document", "query_hash", "document_hash"]


@dataclass(frozen=True)
class PreparedTexts:
    """Distinct texts of one side of a unit, list<uint16 or uint32>; row i of the unit has text text_of_row[i]."""

    tokens: pa.ListArray
    text_of_row: np.ndarray


@dataclass(frozen=True)
class PreparedUnit:
    """rows: pair_id and source. unknown: for each source, [unknown tokens, tokens], special ones not counted."""

    rows: pa.Table
    texts: dict[Side, PreparedTexts]
    unknown: dict[str, list[int]]


class Preparer:
    """Tokenises rows for one model, with its prompts."""

    def __init__(self, folder: str, config: EmbedConfig) -> None:
        layout = read_layout(folder)
        self._tokenizer = Tokenizer(folder, special_tokens=layout.kind == "backbone")
        limits = [limit for limit in (config.max_tokens, layout.max_tokens) if limit is not None]
        self._max_tokens = min(limits, default=None)
        self._prompts = {
            "query": layout.prompts["query"] if config.query_prompt is None else config.query_prompt,
            "document": layout.prompts["document"] if config.document_prompt is None else config.document_prompt,
        }
        self._token_type = token_type(self._tokenizer.vocabulary)

    def prepare(self, rows: pa.Table, sides: Sequence[Side] = SIDES) -> PreparedUnit:
        """`rows` has the corpus' COLUMNS (those of the other side may be missing)."""
        source = rows["source"].combine_chunks().dictionary_encode()
        names, source_of_row = source.dictionary.to_pylist(), source.indices.to_numpy(zero_copy_only=False)
        counts = np.zeros((len(names), 2), np.int64)
        texts: dict[Side, PreparedTexts] = {}
        for side in sides:
            distinct, text_of_row = first_of_each(rows[f"{side}_hash"].to_numpy())
            tokens = self._tokenizer.encode(
                rows[side].take(pa.array(distinct)).to_pylist(), self._max_tokens, self._prompts[side]
            )
            texts[side] = PreparedTexts(tokens.to_arrow(self._token_type), text_of_row.astype(np.int32))
            of_text = np.stack([self._unknown(tokens), tokens.lengths - self._tokenizer.added], axis=1)
            np.add.at(counts, source_of_row, of_text[text_of_row])
        unknown = {name: row.tolist() for name, row in zip(names, counts, strict=True)}
        return PreparedUnit(rows.select(["pair_id", "source"]), texts, unknown)

    def _unknown(self, tokens: Tokens) -> np.ndarray:
        """(N,) unknown tokens in each text."""
        if self._tokenizer.unknown is None:
            return np.zeros(len(tokens), np.int64)
        running = np.concatenate([[0], np.cumsum(tokens.values == self._tokenizer.unknown)])
        return running[tokens.offsets[1:]] - running[tokens.offsets[:-1]]


def first_of_each(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows where a hash appears first, in row order, and for every row the position of its first in them."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = np.empty(len(first), np.int64)
    position[order] = np.arange(len(first))
    return first[order], position[group]

"""Token ids, as shards keep them, for the model that is to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig, StorageConfig
from clusterbatch.corpus.images import image_bytes
from clusterbatch.encoder.model_files import Layout, read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.sides import SIDES, Side, SideTokenizer
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.schema import token_type


@dataclass(frozen=True)
class Tokenisation:
    """Tokenizer, prompts and lengths of both sides. Picklable: each worker loads the tokenizer for itself.

    prompts: by the names of TrainConfig.named_prompts; the model's own files have the others.
    """

    model: str
    storage: StorageConfig
    special_tokens: bool
    max_query_tokens: int
    max_document_tokens: int
    images: tuple[str, ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, config: RunConfig) -> Tokenisation:
        train = config.train
        special_tokens = train.encoder == "backbone"
        return cls(
            train.model,
            config.storage,
            special_tokens,
            train.max_query_tokens,
            train.max_document_tokens,
            tuple(config.corpus.columns.images),
            tuple(sorted(train.named_prompts.items())),
        )

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @property
    def tokenizer(self) -> Tokenizer:
        return self._sides.tokenizer

    @cached_property
    def _sides(self) -> SideTokenizer:
        limits: dict[Side, int | None] = {"query": self.max_query_tokens, "document": self.max_document_tokens}
        prompts = self._layout.prompts | dict(self.prompts)
        return SideTokenizer.of_model(self._folder, limits, prompts, special_tokens=self.special_tokens)

    @cached_property
    def _folder(self) -> str:
        return resolve_model(self.model, self.storage)

    @cached_property
    def _layout(self) -> Layout:
        return read_layout(self._folder)

    @property
    def identity(self) -> dict[str, Any]:
        """Values that decide the tokens, by the keys of the configuration.

        They are kept with the shards, which are of no use to a model that needs other tokens.
        """
        return {
            "train.model or train.encoder": self.tokenizer.fingerprint,
            "train.max_query_tokens": self._sides.max_tokens["query"],
            "train.max_document_tokens": self._sides.max_tokens["document"],
            "train.prompts": dict(self._sides.prompts),
        }

    @property
    def too_long(self) -> list[str]:
        """A sentence for each limit above the model's own."""
        own = self._layout.max_tokens
        limits = {"query": self.max_query_tokens, "document": self.max_document_tokens}
        return [
            f"train.max_{side}_tokens: {limit}, but {self.model} takes {own} tokens; its texts are cut there"
            for side, limit in limits.items()
            if own is not None and limit > own and side not in self.images
        ]

    @cached_property
    def _kind(self) -> pa.DataType:
        return token_type(self.tokenizer.vocabulary)

    def columns(self, rows: pa.Table) -> dict[str, pa.Array]:
        """Return the training columns of the texts and images of `rows`, and of negatives if the rows have some."""
        found: dict[str, pa.Array] = {}
        sources = rows["source"].to_pylist()
        for side in SIDES:
            found |= self._column(side, side, rows[side].to_pylist(), sources)
        if "negatives" in rows.column_names:
            negatives = rows["negatives"].combine_chunks()
            lengths = negatives.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            of_negative = np.repeat(np.array(sources, object), lengths).tolist()
            texts = negatives.flatten().to_pylist()
            [(name, values)] = self._column("negative", "document", texts, of_negative).items()
            found[name] = pa.ListArray.from_arrays(pa.array(offsets), values)
        return found

    def _column(self, prefix: str, side: Side, texts: list[str], sources: list[str]) -> dict[str, pa.Array]:
        """Return the columns of one side; images stay encoded bytes, for the model that is trained to decode."""
        if side in self.images:
            return {f"{prefix}_image": pa.array([image_bytes(text) for text in texts], pa.binary())}
        return {f"{prefix}_tokens": self._sides.tokens(texts, side, sources).to_arrow(self._kind)}

"""Token ids of the model that is to be trained, as the shards keep them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from clusterbatch.config import RunConfig, StorageConfig
from clusterbatch.encoder.layout import read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.schema import token_type


@dataclass(frozen=True)
class Tokenisation:
    """Picklable: each worker loads the tokenizer for itself."""

    model: str
    storage: StorageConfig
    special_tokens: bool
    max_query_tokens: int
    max_document_tokens: int

    @classmethod
    def of(cls, config: RunConfig) -> Tokenisation:
        train = config.train
        special_tokens = train.encoder == "backbone"
        return cls(train.model, config.storage, special_tokens, train.max_query_tokens, train.max_document_tokens)

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self._folder, special_tokens=self.special_tokens)

    @cached_property
    def _folder(self) -> str:
        return resolve_model(self.model, self.storage)

    @cached_property
    def _prompts(self) -> dict[str, str]:
        return read_layout(self._folder).prompts

    @cached_property
    def _kind(self) -> pa.DataType:
        return token_type(self.tokenizer.vocabulary)

    def columns(self, rows: pa.Table) -> dict[str, pa.Array]:
        """query_tokens, document_tokens, and negative_tokens where the rows have negatives."""
        found = {
            "query_tokens": self._encode(rows["query"].to_pylist(), "query", self.max_query_tokens),
            "document_tokens": self._encode(rows["document"].to_pylist(), "document", self.max_document_tokens),
        }
        if "negatives" in rows.column_names:
            negatives = rows["negatives"].combine_chunks()
            tokens = self._encode(negatives.flatten().to_pylist(), "document", self.max_document_tokens)
            lengths = negatives.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            found["negative_tokens"] = pa.ListArray.from_arrays(pa.array(offsets), tokens)
        return found

    def _encode(self, texts: list[str], side: str, max_tokens: int) -> pa.ListArray:
        return self.tokenizer.encode(texts, max_tokens, self._prompts[side]).to_arrow(self._kind)

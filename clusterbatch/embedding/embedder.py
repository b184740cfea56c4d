"""A unit of the corpus to its vectors: what the embedding stage and passes that embed on the fly have in common.

From a unit of the corpus to what goes into the model: read, drop what is there twice, tokenise. Needs no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from clusterbatch.config import EmbedConfig, RunConfig, StorageConfig
from clusterbatch.corpus.images import image_bytes
from clusterbatch.corpus.row_groups import RowGroup, read_row_group
from clusterbatch.embedding.char_ngrams import SURROGATES, Surrogate
from clusterbatch.encoder.clip import image_processor
from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.encoder.images import Pixels
from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.model_files import read_layout, shorter
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError, UsageError
from clusterbatch.schema import token_type
from clusterbatch.store import Artifact
from clusterbatch.store.workspace import Workspace

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")


@dataclass(frozen=True)
class PreparedTexts:
    """The distinct texts of one side of a unit; row i of the unit has text text_of_row[i].

    inputs: token ids as list<uint16 or uint32>, or strings where the model takes none; of images their pixels.
    """

    inputs: pa.Array
    text_of_row: np.ndarray


@dataclass(frozen=True)
class PreparedUnit:
    """rows: pair_id and source. unknown: for each source, [unknown tokens, tokens], special ones not counted.

    place: where the unit lies, for messages.
    """

    rows: pa.Table
    texts: dict[Side, PreparedTexts]
    unknown: dict[str, list[int]]
    place: str


class Preparer:
    """Reads and tokenises units of a corpus for the model of `embed`, with its prompts; decodes the `images` sides."""

    def __init__(
        self, corpus: Artifact, config: EmbedConfig, storage: StorageConfig, images: Sequence[Side] = ()
    ) -> None:
        self._corpus = corpus
        folder = None if config.model in SURROGATES else resolve_model(config.model, storage)
        self._tokenisation = None if folder is None else _Tokenisation(folder, config)
        if images and folder is None:
            raise UsageError(f"embed.model: {config.model} is for texts alone (corpus.columns.images)")
        self._images = {side: image_processor(str(folder), "embed.model") for side in images}

    def prepare(self, unit: RowGroup, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> PreparedUnit:
        """The unit, or only some of its `rows` (numbers inside it) and one of its sides. Raises DataError."""
        columns = ["pair_id", "source", *sides, *(f"{side}_hash" for side in sides)]
        table = read_row_group(self._corpus, unit, columns)
        if rows is not None:
            table = table.take(pa.array(rows))
        source = table["source"].combine_chunks().dictionary_encode()
        counts = np.zeros((len(source.dictionary), 2), np.int64)
        texts: dict[Side, PreparedTexts] = {}
        for side in sides:
            distinct, text_of_row = first_of_each(table[f"{side}_hash"].to_numpy())
            inputs: pa.Array = table[side].combine_chunks().take(pa.array(distinct))
            if side in self._images:
                inputs = self._images[side].pixels(map(image_bytes, inputs.to_pylist())).to_arrow()
            elif self._tokenisation:
                tokens = self._tokenisation.tokens(inputs.to_pylist(), side)
                inputs = tokens.to_arrow(self._tokenisation.type)
                of_source = self._tokenisation.unknown(tokens)[text_of_row]
                np.add.at(counts, source.indices.to_numpy(zero_copy_only=False), of_source)
            texts[side] = PreparedTexts(inputs, text_of_row.astype(np.int32))
        unknown = dict(zip(source.dictionary.to_pylist(), counts.tolist(), strict=True)) if self._tokenisation else {}
        place = f"{self._corpus.folder.uri}/{unit.path}, row group {unit.index}"
        return PreparedUnit(table.select(["pair_id", "source"]), texts, unknown, place)


class _Tokenisation:
    """How texts become tokens for one model: its tokenizer, the prompt of each side, the length they are cut to."""

    def __init__(self, folder: str, config: EmbedConfig) -> None:
        layout = read_layout(folder)
        self._tokenizer = Tokenizer(folder, special_tokens=layout.kind != "static")
        self._max_tokens = shorter(config.max_tokens, layout.max_tokens)
        self._prompts = embedding_prompts(config, layout.prompts)
        self.type = token_type(self._tokenizer.vocabulary)

    def tokens(self, texts: Sequence[str], side: Side) -> Tokens:
        return self._tokenizer.encode(texts, self._max_tokens, self._prompts[side])

    def unknown(self, tokens: Tokens) -> np.ndarray:
        """(N, 2) int64: unknown tokens and tokens of each text, special ones not counted."""
        lengths = tokens.lengths - self._tokenizer.added
        if self._tokenizer.unknown is None:
            return np.stack([np.zeros_like(lengths), lengths], axis=1)
        running = np.concatenate([[0], np.cumsum(tokens.values == self._tokenizer.unknown)])
        return np.stack([running[tokens.offsets[1:]] - running[tokens.offsets[:-1]], lengths], axis=1)


def embedding_prompts(config: EmbedConfig, of_model: Mapping[str, str]) -> dict[Side, str]:
    """Return the prompt of each side: the configured one, or the model's own where none is configured."""
    return {
        "query": of_model["query"] if config.query_prompt is None else config.query_prompt,
        "document": of_model["document"] if config.document_prompt is None else config.document_prompt,
    }


def first_of_each(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (n,) hashes: rows where one appears first, in order, and for every row the place of its first among them."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    position = np.empty(len(first), np.int64)
    position[order] = np.arange(len(first))
    return first[order], position[group]


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

    def embed(self, unit: RowGroup, *, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> EmbeddedUnit:
        """Reads and embeds a unit, or only some of its `rows` (row numbers inside it) and one of its sides.

        Raises DataError that names the row whose vector is not finite.
        """
        return self.embed_prepared(self.prepare(unit, rows, sides))

    def prepare(self, unit: RowGroup, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> PreparedUnit:
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

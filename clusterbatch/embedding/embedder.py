"""From row groups of the corpus to vectors: read, drop repeated texts, tokenise, encode.

Shared by the stage `embed` and by passes that embed as they go. `Preparer` needs no weights, so that CPUs can prepare
what GPUs encode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clusterbatch.config import EmbedConfig, RunConfig, StorageConfig
from clusterbatch.corpus.images import image_bytes
from clusterbatch.corpus.row_groups import RowGroup, read_row_group
from clusterbatch.embedding.char_ngrams import SURROGATES, Surrogate
from clusterbatch.encoder.clip import image_processor
from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.encoder.images import Pixels
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model_files import read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.sides import SIDES, Side, SideTokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError, UsageError
from clusterbatch.schema import token_type
from clusterbatch.store import Artifact
from clusterbatch.store.workspace import Workspace


@dataclass(frozen=True)
class PreparedTexts:
    """Distinct texts of one side of a row group; row i has text text_of_row[i].

    inputs: token ids as list<uint16 or uint32>; strings if the model takes no tokens; pixels of images.
    """

    inputs: pa.Array
    text_of_row: np.ndarray


@dataclass(frozen=True)
class PreparedUnit:
    """A row group ready for the model.

    rows: pair_id and source. unknown: for each source, [unknown tokens, tokens], special ones not counted. place: file
    and number of the row group, for messages.
    """

    rows: pa.Table
    texts: dict[Side, PreparedTexts]
    unknown: dict[str, list[int]]
    place: str


class Preparer:
    """Read and tokenise row groups for the model of `embed`, with its prompts; decode the `images` sides."""

    def __init__(
        self, corpus: Artifact, config: EmbedConfig, storage: StorageConfig, images: Sequence[Side] = ()
    ) -> None:
        self._corpus = corpus
        folder = None if config.model in SURROGATES else resolve_model(config.model, storage)
        self._tokenizer: SideTokenizer | None = None
        if folder is not None:
            prompts = embedding_prompts(config, read_layout(folder).prompts)
            self._tokenizer = SideTokenizer.of_model(folder, dict.fromkeys(SIDES, config.max_tokens), prompts)
            self._token_type = token_type(self._tokenizer.tokenizer.vocabulary)
        if images and folder is None:
            raise UsageError(f"embed.model: {config.model} is for texts alone (corpus.columns.images)")
        self._images = {side: image_processor(str(folder), "embed.model") for side in images}

    def prepare(self, unit: RowGroup, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> PreparedUnit:
        """Prepare a row group, or only some of its `rows` (numbers inside it) and one of its sides.

        Raises DataError if an image or the row group cannot be read.
        """
        table = read_row_group(self._corpus, unit, ["pair_id", "source", *sides])
        if rows is not None:
            table = table.take(pa.array(rows))
        source = table["source"].combine_chunks().dictionary_encode()
        counts = np.zeros((len(source.dictionary), 2), np.int64)
        texts: dict[Side, PreparedTexts] = {}
        for side in sides:
            # Not by the corpus' hashes: texts that differ in case or white space have the same, but other vectors.
            encoded = table[side].combine_chunks().dictionary_encode()
            inputs: pa.Array = encoded.dictionary
            text_of_row = encoded.indices.to_numpy()
            if side in self._images:
                inputs = self._images[side].pixels(map(image_bytes, inputs.to_pylist())).to_arrow()
            elif self._tokenizer:
                tokens = self._tokenizer.tokens(inputs.to_pylist(), side)
                inputs = tokens.to_arrow(self._token_type)
                of_source = self._tokenizer.unknown(tokens)[text_of_row]
                np.add.at(counts, source.indices.to_numpy(zero_copy_only=False), of_source)
            texts[side] = PreparedTexts(inputs, text_of_row)
        unknown = dict(zip(source.dictionary.to_pylist(), counts.tolist(), strict=True)) if self._tokenizer else {}
        place = f"{self._corpus.folder.uri}/{unit.path}, row group {unit.index}"
        return PreparedUnit(table.select(["pair_id", "source"]), texts, unknown, place)


def embedding_prompts(config: EmbedConfig, of_model: Mapping[str, str]) -> dict[Side, str]:
    """Return the prompt of each side: the configured one, or the model's own if none is configured."""
    return {
        "query": of_model["query"] if config.query_prompt is None else config.query_prompt,
        "document": of_model["document"] if config.document_prompt is None else config.document_prompt,
    }


@dataclass(frozen=True)
class EmbeddedUnit:
    """Vectors of a row group.

    rows: pair_id and source; vectors: (n, d) float16 unit vectors of each side, in the same order. unknown: for each
    source, [unknown tokens, tokens]; tokens: number that went through the model.
    """

    rows: pa.Table
    vectors: dict[Side, np.ndarray]
    unknown: dict[str, list[int]]
    tokens: int


class UnitEmbedder:
    """Embed row groups of a workspace's corpus with `embed.model`. Made once per process: it loads the weights.

    Holds one row group at a time, whatever the size of the corpus. A row group has the same vectors whether the stage
    stored them (`embed.persist`) or they are computed here again. device: overrides `embed.device`.
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
        """Read and embed a row group, or only some of its `rows` (numbers inside it) and one of its sides.

        Raises DataError that names a row whose vector is not finite.
        """
        return self.embed_prepared(self.prepare(unit, rows, sides))

    def prepare(self, unit: RowGroup, rows: np.ndarray | None = None, sides: Sequence[Side] = SIDES) -> PreparedUnit:
        """Do the part of `embed` that needs no weights: read, drop repeated texts, tokenise."""
        return self._preparer.prepare(unit, rows, sides)

    def embed_prepared(self, prepared: PreparedUnit) -> EmbeddedUnit:
        """Return the vectors of a row group that was read and tokenised elsewhere."""
        vectors: dict[Side, np.ndarray] = {}
        count = 0
        for side, texts in prepared.texts.items():
            distinct, tokens = self._model.encode(texts.inputs)
            vectors[side] = distinct.astype(np.float16)[texts.text_of_row]
            _check_finite(vectors[side], prepared, side)
            count += tokens
        return EmbeddedUnit(prepared.rows, vectors, prepared.unknown, count)


def surrogate_artifact(embeddings: Artifact) -> Artifact:
    """Return the artifact of the surrogate fitted to a corpus; it is stored beside the vectors made with it."""
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
        """Return (N, d) float32 and the number of tokens."""
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
        """Return (N, d) float32; the model takes no tokens."""
        return self._surrogate.encode(inputs.to_pylist(), self._max_tokens), 0


def _check_finite(vectors: np.ndarray, prepared: PreparedUnit, side: Side) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        row = int(broken[0])
        raise DataError(
            f"{prepared.place}, row {row} (pair {prepared.rows['pair_id'][row].as_py()}): the vector of its {side} is "
            f"not finite ({len(broken)} such rows here); the model's weights or embed.dtype are not fit for it"
        )

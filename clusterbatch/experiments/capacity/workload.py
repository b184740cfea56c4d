"""Sizes that the scale model needs: of the corpus from its files or manifest, of the models from their files."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from clusterbatch.config import DOCSTRINGS, CorpusConfig, RunConfig
from clusterbatch.config.stages import CHARACTER_NGRAMS
from clusterbatch.corpus.docstrings import COLLECTION
from clusterbatch.corpus.find_inputs import find_inputs
from clusterbatch.corpus.inputs import InputFile, Slice
from clusterbatch.corpus.readers.delimited import read_delimited
from clusterbatch.corpus.readers.dispatch import read_slice
from clusterbatch.corpus.readers.formats import Compression, format_of_name
from clusterbatch.corpus.readers.text import decompressed, detect_encoding
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.corpus.rows import BrokenFileError, Chunk, InputColumns
from clusterbatch.embedding.char_ngrams import COLUMNS, DIMENSIONS
from clusterbatch.encoder.cross_encoder import is_cross_encoder
from clusterbatch.encoder.model_files import read_layout
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.errors import ClusterbatchError, UsageError, first_line
from clusterbatch.experiments.capacity.scale_model import CapacityModel
from clusterbatch.experiments.capacity.sizes import RECORD_CHARACTERS, Shape, TeacherShape, Workload
from clusterbatch.log import say
from clusterbatch.schema import corpus_schema
from clusterbatch.store import Folder, Manifest
from clusterbatch.store.details import CorpusDetails, details_of
from clusterbatch.store.workspace import Workspace

_LOOKED_AT = 8
_HEAD_BYTES = 2**20
# Where nothing can be looked at: a question and a paragraph.
_QUERY_CHARACTERS, _DOCUMENT_CHARACTERS = 50.0, 600.0
# A line of judgements: two ids and a grade.
_JUDGEMENT_BYTES = 24
# Names of weights in layers have a layer's number; heads, poolers and token tables have none.
_IN_A_LAYER = re.compile(r"\.\d+\.")
_OF_IMAGES = re.compile(r"(^|\.)(vision|visual)")
_OF_EXPERTS = re.compile(r"\.experts\.")
# Names that configurations have for how many experts a token passes, and how many there are.
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_ALL_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# Of a collection in BEIR layout.
_DOCUMENTS = "corpus.jsonl"


def model_of(config: RunConfig, **known: Any) -> CapacityModel:
    """Return the scale model of a configuration; known: fields of Workload that the caller gives.

    Raises UsageError where a path of the corpus leads to nothing and `rows` is not among what is known.
    """
    if "rows" in known:
        # With known rows the files need not be read, nor exist yet, nor be reachable from here.
        workload = Workload(0, 1, 0, _QUERY_CHARACTERS, _DOCUMENT_CHARACTERS)
    else:
        manifest = Workspace(config).corpus.manifest()
        workload = _of_files(config) if manifest is None else _of_corpus(config, manifest)
    workload = replace(workload, **known)
    if "evaluation_bytes" not in known:
        searched, queries = _evaluation(config, workload)
        workload = replace(
            workload,
            evaluation_bytes=searched,
            **({} if "evaluation_queries" in known else {"evaluation_queries": queries}),
        )
    if not workload.input_bytes:
        workload = replace(workload, input_bytes=round(workload.rows * workload.characters))
    surrogate, trained = (shape_of(name, config) for name in (config.embed.model, config.train.model))
    return CapacityModel(config, workload, surrogate, trained, _teacher_of(config))


def shape_of(name: str, config: RunConfig) -> Shape:
    """Read the sizes from the model's own files; if they cannot be read, warn and return MiniLM-L6's."""
    if name == CHARACTER_NGRAMS:
        # Sums of a row of a table for each n-gram, too.
        return Shape(hidden=DIMENSIONS, weights=0, vocabulary=COLUMNS, static=True)
    try:
        module = Path(resolve_model(name, config.storage))
        # A cross-encoder has no layout of this kind; its sizes are in the same files.
        with suppress(UsageError):
            layout = read_layout(module)
            module = layout.module
            if layout.kind == "static":
                return _static_shape(module / "model.safetensors")
        return _transformer_shape(module)
    except (ClusterbatchError, OSError, KeyError, ValueError, AttributeError, SafetensorError) as error:
        _say_assumed(name, first_line(error))
        return Shape()


@cache
def _say_assumed(name: str, reason: str) -> None:
    """Warn once a process: a plan asks for the same model several times."""
    say(f"{name}: its sizes cannot be read, so the estimate takes it for all-MiniLM-L6-v2 ({reason})", level="warning")


def _transformer_shape(folder: Path) -> Shape:
    """Return the sizes of a transformer: of its encoder for texts, and of that for images if it has one.

    Weights are counted in the heads of its files, as formulas miss gated layers and shared keys. Raises ValueError,
    AttributeError or SafetensorError if files are not as transformers writes them.
    """
    # Imported here: it takes a second, and needs no other model.
    from transformers import AutoConfig

    # Every architecture has names of its own for its sizes, which transformers maps.
    sizes = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = sizes.get_text_config()
    dense = experts = vision = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - an open file cannot be iterated
                shape = tensors.get_slice(name).get_shape()
                # A model with a decoder is trained without it.
                is_left_out = sizes.is_encoder_decoder and name.startswith("decoder")
                if len(shape) < 2 or is_left_out or not _IN_A_LAYER.search(name):
                    continue
                if _OF_IMAGES.search(name):
                    vision += math.prod(shape)
                elif _OF_EXPERTS.search(name):
                    experts += math.prod(shape)
                else:
                    dense += math.prod(shape)
    if not dense:
        raise ValueError(f"{folder}: no layers in the safetensors format")
    # ALBERT's layers share the weights of few groups.
    groups = getattr(text, "num_hidden_groups", None)
    passed = dense * text.num_hidden_layers // groups if groups else dense
    return Shape(
        hidden=text.hidden_size,
        weights=passed + round(experts * _chosen_experts(text)),
        vocabulary=text.vocab_size,
        held=dense + experts + vision,
        vision=vision,
        patches=_patches(sizes) if vision else 0,
    )


def _chosen_experts(sizes: Any) -> float:
    """Return the share of a layer's experts that a token passes; 1 if the configuration does not say."""
    counts = (
        next((getattr(sizes, name) for name in names if getattr(sizes, name, None)), None)
        for names in (_CHOSEN_EXPERTS, _ALL_EXPERTS)
    )
    chosen, every = counts
    return chosen / every if chosen and every else 1.0


def _patches(sizes: Any) -> int:
    """Return the patches that an image is cut into, and one for all of it; 0 if there is no fixed number."""
    vision: Any = getattr(sizes, "vision_config", None)
    if not (getattr(vision, "image_size", None) and getattr(vision, "patch_size", None)):
        return 0
    return int(vision.image_size // vision.patch_size) ** 2 + 1


def _static_shape(file: Path) -> Shape:
    """Return the sizes of a table of token vectors, from the head of its file."""
    with safe_open(file, "np") as tensors:
        names = set(tensors.keys())
        # Model2vec's tables may have fewer rows than tokens.
        table = "embedding.weight" if "embedding.weight" in names else "embeddings"
        rows, hidden = tensors.get_slice(table).get_shape()
        if "mapping" in names:
            [rows] = tensors.get_slice("mapping").get_shape()
    return Shape(hidden=hidden, weights=0, vocabulary=rows, static=True)


def _teacher_of(config: RunConfig) -> TeacherShape | None:
    """Return the sizes of `score.teacher`, None if there is none; an embedding model if its files are out of reach."""
    name = config.score.teacher
    if name is None:
        return None
    reads_pairs = False
    with suppress(ClusterbatchError, OSError, ValueError):
        reads_pairs = is_cross_encoder(resolve_model(name, config.storage))
    return TeacherShape(shape_of(name, config), reads_pairs)


def _of_corpus(config: RunConfig, manifest: Manifest) -> Workload:
    """Return the workload of an ingested corpus: rows as counted, lengths from a few units spread over it."""
    units = row_groups_of(manifest)
    chosen = [units[number] for number in _spread(len(units))]
    corpus = Workspace(config).corpus
    columns = ["query", "document"]
    empty = corpus_schema().empty_table().select(columns)
    seen = pa.concat_tables([empty, *(read_row_group(corpus, unit, columns) for unit in chosen)])
    return Workload(
        rows=manifest.counts.written,
        sources=len(details_of(manifest, CorpusDetails)["sources"]),
        input_bytes=details_of(manifest, CorpusDetails)["input_bytes"],
        query_characters=_mean_characters(seen["query"]),
        document_characters=_mean_characters(seen["document"]),
    )


def _of_files(config: RunConfig) -> Workload:
    """Return the workload of the files of corpus.paths, a few of which are read in part."""
    paths = [path for path in config.corpus.paths if path != DOCSTRINGS]
    files = list(find_inputs(config.corpus, paths, config.storage)) if paths else []
    chosen = [files[number] for number in _spread(len(files))]
    looked = [_look_into(file, config) for file in chosen]
    size, seen = sum(file.size for file in files), sum(file.size for file in chosen)
    found = sum(rows for rows, _, _ in looked)
    query, document = _QUERY_CHARACTERS, _DOCUMENT_CHARACTERS
    if found:
        query = sum(rows * characters for rows, characters, _ in looked) / found
        document = sum(rows * characters for rows, _, characters in looked) / found
    rows = round(found * size / max(1, seen))
    if DOCSTRINGS in config.corpus.paths:
        rows += config.corpus.sample_pairs
    sources = 1 if config.corpus.source else max(1, len({file.source for file in files}))
    return Workload(rows, sources, size, query, document)


def _look_into(file: InputFile, config: RunConfig) -> tuple[float, float, float]:
    """Return (rows, mean characters of a query, of a document) of one file, by its beginning."""
    folder, name = file.place(config.storage)
    form = format_of_name(file.name)
    if form.kind in ("parquet", "arrow"):
        query, document, head = _QUERY_CHARACTERS, _DOCUMENT_CHARACTERS, None
        # Without its columns, or broken: ingest will say.
        with suppress(BrokenFileError), closing(_chunks(file, config)) as chunks:
            head = next(chunks, None)
        if head is not None and len(head.rows):
            query, document = (_mean_characters(head.columns[name]) for name in ("query", "document"))
        if form.kind == "parquet":
            with suppress(pa.ArrowException), folder.open(name) as handle, pq.ParquetFile(handle) as parquet:
                return parquet.metadata.num_rows, query, document
        return file.size / max(1.0, query + document), query, document
    head_bytes = folder.read(name, 0, min(_HEAD_BYTES, file.size))
    # Of a compressed file the beginning shows how much it holds.
    opened = _decompressed(head_bytes, form.compression) if form.compression else head_bytes
    size = file.size * len(opened) / max(1, len(head_bytes))
    # A tenth of a record is names and punctuation.
    record = len(opened) / max(1, _records(opened, form.kind, config.corpus))
    return size / max(1.0, record), _QUERY_CHARACTERS, max(1.0, 0.9 * record - _QUERY_CHARACTERS)


def _chunks(file: InputFile, config: RunConfig) -> Generator[Chunk]:
    yield from read_slice(Slice(0, file, 0, file.size), config.corpus, config.storage)


def _decompressed(head: bytes, compression: Compression) -> bytes:
    """Return the beginning of a file, decompressed; the last block may be cut."""
    pieces = []
    try:
        stream = decompressed(io.BytesIO(head), compression)
        # Small pieces: what is read of one that is cut is lost.
        while piece := stream.read(2**12):
            pieces.append(piece)
            if sum(map(len, pieces)) > 16 * _HEAD_BYTES:
                # No text is as uniform as this.
                break
    except (OSError, EOFError, ValueError):
        pass
    return b"".join(pieces)


def _records(text: bytes, kind: str | None, corpus: CorpusConfig) -> int:
    """Return the records in a piece of a file: its lines, or rows of CSV, whose cells may hold line breaks."""
    if kind in ("csv", "tsv"):
        tabs = kind == "tsv"
        quotes = corpus.tsv_quotes or not tabs
        encoding = corpus.encoding or detect_encoding(text)
        try:
            rows = read_delimited(io.BytesIO(text), InputColumns.of(corpus), encoding, tabs=tabs, quotes=quotes)
            return sum(chunk.input_rows for chunk in rows)
        except BrokenFileError:
            # Without its columns, which ingest will say.
            pass
    return text.count(b"\n")


def _evaluation(config: RunConfig, workload: Workload) -> tuple[int, int]:
    """Return the size of the documents of all collections that can be reached, and about how many judged queries.

    Without a collection ingest holds pairs out: the corpus' documents are then what is searched.
    """
    if not config.evaluate.path:
        searched = round(workload.rows * (workload.document_characters + RECORD_CHARACTERS))
        return searched, min(workload.rows, config.evaluate.holdout)
    total = judged = 0
    for path in config.evaluate.path:
        sample = Workspace(config).sample.folder.child(COLLECTION)
        try:
            folder = sample if path == DOCSTRINGS else Folder(path, config.storage)
            total += folder.size(_DOCUMENTS)
            judged += folder.size(f"qrels/{config.evaluate.split}.tsv") // _JUDGEMENT_BYTES
        except (FileNotFoundError, ClusterbatchError):
            continue
    return total, judged


def _spread(count: int) -> list[int]:
    """Return at most a few of `count` places, from the first to the last."""
    return sorted(set(np.linspace(0, count - 1, min(_LOOKED_AT, count)).astype(int).tolist()))


def _mean_characters(column: pa.Array | pa.ChunkedArray) -> float:
    return float(pc.mean(pc.utf8_length(column.drop_null())).as_py() or 0.0)

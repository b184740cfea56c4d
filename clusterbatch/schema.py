"""The Arrow schema of every artifact, in one place.

corpus          one row per pair; optional columns only where the input has them
embeddings      one row per corpus row, in the same order, file by file
training        what a training step reads of a row: token ids (or encoded images), hashes, weight, reduced vectors
scores          a teacher's scores of a row, for the same rows in the same order
cluster index   one row per piece of a cluster, in packing order inside each source
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

CORPUS_REQUIRED = [
    pa.field("pair_id", pa.string(), nullable=False),
    pa.field("query", pa.string(), nullable=False),
    pa.field("document", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    # XXH3-64 of the normalised text (corpus.normalise), for duplicate masks.
    pa.field("query_hash", pa.uint64(), nullable=False),
    pa.field("document_hash", pa.uint64(), nullable=False),
]
CORPUS_OPTIONAL = {
    "negatives": pa.field("negatives", pa.list_(pa.string())),
    "weight": pa.field("weight", pa.float32()),
    # The user's own segment of the row, for batches.stratify: group.
    "group": pa.field("group", pa.string()),
    # The document that the row's text is a part of, inside its source.
    "document_id": pa.field("document_id", pa.string()),
    # By a judge of the user's; of the pair, and of each of its negatives. Null where nothing was judged.
    "score": pa.field("score", pa.float32()),
    "negative_scores": pa.field("negative_scores", pa.list_(pa.float32())),
}
# Unit vectors that the user brought; the same names as in the embeddings.
VECTORS = ("query_vector", "document_vector")
REJECTS = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        # Zero-based position in the file; null where the whole file is meant.
        pa.field("row", pa.int64()),
        pa.field("reason", pa.string(), nullable=False),
        # The row as far as it could be read, as JSON.
        pa.field("content", pa.string()),
    ]
)


def corpus_schema(optional: Sequence[str] = (), dimensions: int | None = None) -> pa.Schema:
    """Schema of the corpus. dimensions: of the vectors that the user brought, if there are some."""
    fields = [*CORPUS_REQUIRED, *(CORPUS_OPTIONAL[name] for name in CORPUS_OPTIONAL if name in optional)]
    if dimensions is not None:
        fields += [pa.field(name, vectors_type(dimensions), nullable=False) for name in VECTORS]
    return pa.schema(fields)


def vectors_type(dimensions: int, value: pa.DataType | None = None) -> pa.DataType:
    return pa.list_(value or pa.float16(), dimensions)


def embeddings_schema(dimensions: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("pair_id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("query_vector", vectors_type(dimensions), nullable=False),
            pa.field("document_vector", vectors_type(dimensions), nullable=False),
        ]
    )


def token_type(vocabulary: int) -> pa.DataType:
    """The smallest unsigned integer type that holds every token id of a vocabulary of that size."""
    return pa.uint16() if vocabulary <= 2**16 else pa.uint32()


def training_schema(
    vocabulary: int,
    *,
    surrogate_dimensions: int | None = None,
    negatives: bool = False,
    weight: bool = False,
    images: Sequence[str] = (),
    margins: bool = False,
    document_id: bool = False,
    score: bool = False,
    negative_scores: bool = False,
    duplicates: bool = False,
) -> pa.Schema:
    """Schema of the training columns. vocabulary: of the model to be trained, which decides the type of token ids.

    images: the sides (query, document) that are images: encoded ones, in place of tokens.
    """
    tokens = pa.list_(token_type(vocabulary))

    def content(prefix: str, side: str) -> tuple[str, pa.DataType]:
        return (f"{prefix}_image", pa.binary()) if side in images else (f"{prefix}_tokens", tokens)

    fields = [
        pa.field(*content("query", "query"), nullable=False),
        pa.field(*content("document", "document"), nullable=False),
        pa.field("query_hash", pa.uint64(), nullable=False),
        pa.field("document_hash", pa.uint64(), nullable=False),
    ]
    if negatives:
        name, kind = content("negative", "document")
        fields.append(pa.field(name, pa.list_(kind)))
    if margins:
        # How far the surrogate scores each negative below the positive; NaN for those it did not find.
        fields.append(pa.field("negative_margins", pa.list_(pa.float32())))
    if weight:
        fields.append(pa.field("weight", pa.float32(), nullable=False))
    if document_id:
        # XXH3-64 of source and document_id.
        fields.append(pa.field("document_id_hash", pa.uint64(), nullable=False))
    if duplicates:
        # Equal in rows that are semantic duplicates: the hash of the first of them.
        fields.append(pa.field("duplicate_group", pa.uint64(), nullable=False))
    if score:
        # NaN for a pair without one.
        fields.append(pa.field("score", pa.float32(), nullable=False))
    if negative_scores:
        # One for each negative, mined ones included; NaN for those without one.
        fields.append(pa.field("negative_scores", pa.list_(pa.float32()), nullable=False))
    if surrogate_dimensions:
        fields.append(pa.field("query_vector", vectors_type(surrogate_dimensions), nullable=False))
        fields.append(pa.field("document_vector", vectors_type(surrogate_dimensions), nullable=False))
    return pa.schema(fields)


def scores_schema(negatives: bool = False) -> pa.Schema:
    """Schema of a teacher's scores. negatives: whether rows have hard negatives.

    A document is known by the hash of its normalised text, so that a score holds for every row with that text.
    """
    fields = [
        # Of the row's own document.
        pa.field("teacher_positive", pa.float32(), nullable=False),
        # Other documents that were scored for the row's query, hard negatives among them, the best first.
        pa.field("teacher_document", pa.list_(pa.uint64()), nullable=False),
        pa.field("teacher_score", pa.list_(pa.float32()), nullable=False),
    ]
    if negatives:
        # XXH3-64 of the normalised text of each hard negative.
        fields.append(pa.field("negative_text_hash", pa.list_(pa.uint64()), nullable=False))
    return pa.schema(fields)


CLUSTER_INDEX = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        # Number inside the source.
        pa.field("cluster", pa.int32(), nullable=False),
        # A cluster larger than a shard is in several pieces; 0 for all others.
        pa.field("piece", pa.int32(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        # Rows and runs (of run_rows rows; only the last run of a piece may be shorter) inside the shard.
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("first_run", pa.int64(), nullable=False),
        # Bytes of the runs in the shard's training file.
        pa.field("first_byte", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        # Mean cosine of the rows to their centroid; NaN where rows were not clustered.
        pa.field("mean_cosine", pa.float32(), nullable=False),
    ]
)

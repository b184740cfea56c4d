"""Validation of rows, and the canonical columns of those that are valid pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clusterbatch.config import CorpusConfig
from clusterbatch.corpus.normalise import pair_ids, text_hashes
from clusterbatch.corpus.rows import TEXT_COLUMNS, Chunk, Reject, optional_columns, shown
from clusterbatch.schema import VECTORS, corpus_schema


@dataclass
class Validated:
    """Valid rows as a table of the corpus schema, their positions (n,) int64, the others, and how many were cut."""

    table: pa.Table
    rows: np.ndarray
    rejects: list[Reject] = field(default_factory=list)
    cut: int = 0

    @staticmethod
    def nothing_but(rejects: list[Reject], config: CorpusConfig) -> Validated:
        """Return no valid rows."""
        schema = corpus_schema(optional_columns(config.columns))
        return Validated(schema.empty_table(), np.empty(0, np.int64), rejects)


def validate(chunk: Chunk, config: CorpusConfig, default_source: str) -> Validated:
    """Reject rows whose query or document is null, blank or (if so configured) too long, or whose weight or id is bad.

    default_source: the source of rows that do not name one.
    """
    columns = dict(chunk.columns)
    count = len(chunk.rows)
    if not count:
        return Validated.nothing_but(chunk.rejects, config)
    # 0: valid; otherwise the number of the first reason that applies.
    verdict = np.zeros(count, np.int8)
    reasons = ["valid"]
    cut = np.zeros(count, bool)

    def refuse(condition: pa.Array | np.ndarray, reason: str) -> None:
        reasons.append(reason)
        verdict[(verdict == 0) & np.asarray(condition)] = len(reasons) - 1

    for name in TEXT_COLUMNS:
        text = columns[name]
        refuse(text.is_null().to_numpy(False), f"{name}: null")
        text = columns[name] = text.fill_null("")
        refuse(pc.equal(pc.utf8_trim_whitespace(text), "").to_numpy(False), f"{name}: empty or whitespace")
        if name in config.columns.images:
            continue
        too_long = pc.greater(pc.utf8_length(text), config.max_characters).to_numpy(False)
        if config.too_long == "reject":
            refuse(too_long, f"{name}: more than {config.max_characters} characters")
        elif too_long.any():
            columns[name] = pc.utf8_slice_codeunits(text, 0, config.max_characters)
            cut |= too_long
            # What is left of a long text may be blank.
            blank = pc.equal(pc.utf8_trim_whitespace(columns[name]), "").to_numpy(False)
            refuse(blank, f"{name}: empty or whitespace within {config.max_characters} characters")
    if "weight" in columns:
        weight = columns["weight"].fill_null(1.0).to_numpy(False)
        refuse(~(np.isfinite(weight) & (weight >= 0)), "weight: not a finite number of at least 0")
        columns["weight"] = pa.array(weight)
    if "score" in columns:
        refuse(~np.isfinite(columns["score"].fill_null(0.0).to_numpy(False)), "score: not a finite number")
    if config.columns.document_id is not None:
        ids = columns.get("document_id", pa.nulls(count, pa.string()))
        refuse(pc.equal(ids.fill_null(""), "").to_numpy(False), "document_id: null or empty")
    for name in VECTORS:
        if name in columns:
            columns[name], problems = unit_vectors(columns[name])
            for reason, positions in problems.items():
                refuse(positions, f"vector: {reason}")

    rejects = [
        Reject(int(chunk.rows[position]), reasons[verdict[position]], _row_as_json(columns, int(position)))
        for position in np.flatnonzero(verdict)
    ]
    valid = verdict == 0
    kept = _without_repeats({name: array.filter(pa.array(valid)) for name, array in columns.items()})
    table = _canonical(kept, int(valid.sum()), config, default_source)
    return Validated(table, chunk.rows[valid], [*chunk.rejects, *rejects], int((cut & valid).sum()))


def _without_repeats(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """Return the columns with every text once in a row's negatives, the first with its score."""
    negatives = columns.get("negatives")
    if negatives is None or not len(negatives):
        return columns
    counts = negatives.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(counts)), counts)
    # A text that is alone needs no hash.
    compared = np.flatnonzero(np.repeat(counts > 1, counts))
    texts = negatives.flatten().take(pa.array(compared)).to_pylist()
    hashes = text_hashes(texts, len(texts))
    order = np.lexsort((hashes, row[compared]))
    repeats = (np.diff(hashes[order]) == 0) & (np.diff(row[compared][order]) == 0)
    if not repeats.any():
        return columns
    first = np.ones(len(row), bool)
    first[compared[order[1:][repeats]]] = False
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.bincount(row, first, len(counts)))]).astype(np.int32))
    lists = {name: columns[name] for name in ("negatives", "negative_scores") if name in columns}
    return columns | {
        name: pa.ListArray.from_arrays(offsets, array.flatten().filter(pa.array(first)))
        for name, array in lists.items()
    }


def _canonical(columns: dict[str, pa.Array], count: int, config: CorpusConfig, default_source: str) -> pa.Table:
    schema = corpus_schema(optional_columns(config.columns))
    columns["source"] = _sources(columns, count, config, default_source)
    texts = {name: columns[name].to_pylist() for name in ("query", "document", "source")}
    computed = pa.array(pair_ids(texts["source"], texts["query"], texts["document"]), pa.string())
    columns["pair_id"] = pc.coalesce(columns["pair_id"], computed) if "pair_id" in columns else computed
    for name in TEXT_COLUMNS:
        columns[f"{name}_hash"] = pa.array(text_hashes(texts[name], count))
    arrays = [columns.get(field.name, pa.nulls(count, field.type)) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    for name in VECTORS:
        if name in columns:
            table = table.append_column(name, columns[name])
    return table


def _sources(columns: dict[str, pa.Array], count: int, config: CorpusConfig, default_source: str) -> pa.Array:
    if config.source is not None or "source" not in columns:
        return pa.repeat(pa.scalar(config.source or default_source, pa.string()), count)
    source = columns["source"]
    blank = pc.equal(pc.utf8_trim_whitespace(source), "")
    return pc.if_else(pc.fill_null(blank, True), pa.scalar(default_source), source)


def unit_vectors(vectors: pa.ListArray) -> tuple[pa.ListArray, dict[str, np.ndarray]]:
    """Return the vectors scaled to norm 1 as list<float16>, and by reason which cannot be, (n,) bool."""
    lengths = vectors.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    values = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    row_of_value = np.repeat(np.arange(len(lengths)), lengths)
    finite = np.bincount(row_of_value, ~np.isfinite(values), len(lengths)) == 0
    squares = np.where(finite[row_of_value], values.astype(np.float64) ** 2, 0.0)
    norms = np.sqrt(np.bincount(row_of_value, squares, len(lengths)))
    problems = {
        "null or empty": lengths == 0,
        "not finite": ~finite,
        "zero, it has no direction": (lengths > 0) & finite & (norms == 0),
    }
    scaled = np.where(finite[row_of_value], values, 0.0) / np.maximum(norms, 1e-30)[row_of_value]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(scaled.astype(np.float16))), problems


def _row_as_json(columns: dict[str, pa.Array], position: int) -> str:
    return shown({name: array[position].as_py() for name, array in columns.items() if name not in VECTORS})

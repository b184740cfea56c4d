"""A smaller corpus for a quick comparison, drawn so that neighbourhoods stay as dense as they are in the whole.

Thinning a corpus uniformly takes a row's nearest neighbours away, makes clustered batches easier, and the result no
longer carries over. So whole coarse neighbourhoods are drawn instead: random rows of every source are pivots, every row
belongs to the nearest pivot of its source, and all rows of some pivots are kept. Two passes over the corpus: one embeds
the pivots, one assigns and draws. Both are linear in rows, for the number of pivots is bounded; what is kept depends on
neither work items nor workers.

Neighbours are found by cheap vectors of the documents (of the queries if documents are images): the user's own, the
embedding model's static ones, or hashed character n-grams for the model-free surrogate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from sklearn.feature_extraction.text import HashingVectorizer

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.corpus.row_groups import PAIRS, RowGroup, read_row_group, row_groups_of, take_live
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.vectors import Side, vector_column, vector_values
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import model_fingerprint, resolve_model
from clusterbatch.errors import UsageError
from clusterbatch.hashing import row_hashes
from clusterbatch.log import say
from clusterbatch.runtime import Pass, Pool, Result, WorkItem, ray_session
from clusterbatch.schema import VECTORS
from clusterbatch.store import Artifact, Counts, Manifest, Part, Stopwatch
from clusterbatch.store.details import CorpusDetails, EmbeddingsDetails, details_of, given_dimensions, has_vectors
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace

Way = Literal["neighbourhoods", "uniform"]

# Mean rows of a neighbourhood; more if that would take more pivots than a worker should hold.
_NEIGHBOURHOOD, _MOST_PIVOTS = 256, 2**16
# Above so many pivots of one source rows look among the pivots near a coarse one only.
_FLAT_PIVOTS = 4096
_TOKENS = 64
_HASHES = 2.0**64
_GRAMS, _DIMENSIONS = 2**15, 128


def sample_home(config: RunConfig, share: float, way: Way) -> str:
    """Return the workspace (URI) whose corpus the sample is."""
    # Of a small share four decimals would be few digits, or none.
    name = f"{share:.4f}" if share >= 1e-3 else f"{share:.4g}"
    return f"{config.workspace}/compare/samples/{way}-{name}"


def sample_corpus(config: RunConfig, share: float, way: Way, *, force: bool = False) -> Manifest:
    """Write about `share` of the corpus' rows, of every source, as the corpus of `sample_home`; at once when done.

    If embeddings of the whole corpus are reused, rows keep their vectors, and nothing is embedded again.

    Raises DataError if there is no corpus.
    """
    watch = Stopwatch()
    source = Workspace(config).corpus
    corpus = source.require()
    embedded = Workspace(config).embeddings() if config.reuse.embeddings else None
    vectors = embedded.require() if embedded else None
    home = config.model_copy(update={"workspace": sample_home(config, share, way), "reuse": type(config.reuse)()})
    cheap = _cheap_vectors(config, corpus) if way == "neighbourhoods" else None
    identity = fingerprint(
        "sample",
        corpus.fingerprint,
        share,
        way,
        cheap.identity if cheap else "",
        _NEIGHBOURHOOD,
        vectors.fingerprint if vectors else None,
    )
    artifact = Workspace(home).corpus
    if artifact.is_done(identity) and not force:
        return artifact.require()
    source.check_parts(corpus)
    if embedded and vectors:
        embedded.check_parts(vectors)
    done = artifact.begin(identity, force)
    groups = row_groups_of(corpus)
    parts = _vector_parts(vectors, len(groups))
    items = [WorkItem(group.number, group.rows, (group, parts[group.number])) for group in groups]
    pool = Pool(config.corpus.workers)
    embedding = Artifact(Workspace(home).root.child("pivots"), "pivots of a sample")
    with ray_session(config.ray):
        pivots = None
        if cheap is not None:
            wanted = wanted_pivots(details_of(corpus, CorpusDetails)["sources"], share)
            arguments: dict[str, Any] = {
                "source": source,
                "cheap": cheap,
                "shares": _hash_shares(wanted, details_of(corpus, CorpusDetails)["sources"]),
            }
            found = Pass(
                "compare: neighbourhoods", embedding, identity, PivotWorker, arguments, pool, temporary=True
            ).run(items, force=force)
            pivots = _choose(embedding, [part for receipt in found for part in receipt.parts], wanted, share)
        arguments = {"source": source, "embedded": embedded, "share": share, "pivots": pivots, "cheap": cheap}
        receipts = Pass("compare: sample", artifact, identity, SampleWorker, arguments, pool).run(items, done=done)
    sources: dict[str, int] = {}
    for receipt in receipts:
        for name, rows in receipt.details["sources"].items():
            sources[name] = sources.get(name, 0) + rows
    manifest = artifact.commit(
        identity,
        receipts,
        config={"share": share, "way": way},
        inputs={"corpus": corpus.fingerprint},
        seconds=watch.seconds,
        details=CorpusDetails(
            sources=dict(sorted(sources.items())),
            rejects={},
            dimensions=details_of(vectors, EmbeddingsDetails)["dimensions"] if vectors else given_dimensions(corpus),
        ),
    )
    embedding.remove()
    return manifest


def _vector_parts(embeddings: Manifest | None, groups: int) -> list[Part | None]:
    """Return the part with the vectors of each row group. Raises UsageError if they were not kept."""
    if embeddings is None:
        return [None] * groups
    if not has_vectors(embeddings):
        raise UsageError("reuse.embeddings: these were not kept (embed.persist: false), a sample cannot take them over")
    if len(embeddings.parts) < groups:
        raise UsageError(
            "reuse.embeddings: these are of an earlier version of the corpus; `clusterbatch embed` it there"
        )
    return list(embeddings.parts)


class CheapVectors(Protocol):
    """Vectors that cost little, to find rows that are near each other."""

    @property
    def identity(self) -> str:
        """Fingerprint of what the vectors follow from, beside the row."""
        ...

    @property
    def columns(self) -> list[str]:
        """Columns of the corpus that `of` reads."""
        ...

    def of(self, rows: pa.Table) -> np.ndarray:
        """Return (rows, d) float32 unit vectors."""
        ...


def _cheap_vectors(config: RunConfig, corpus: Manifest) -> CheapVectors | None:
    """Return the way to find neighbours in this corpus; None if all is images: then rows are drawn uniformly."""
    if given_dimensions(corpus) is not None:
        return OwnVectors()
    side: Side = "document" if "document" not in config.corpus.columns.images else "query"
    if side in config.corpus.columns.images:
        say("compare.sample: images have no cheap vectors, rows are drawn uniformly", level="warning")
        return None
    if config.embed.model in SURROGATES:
        return HashedNgrams(side)
    if config.corpus.columns.images:
        # The text tower's token table is no encoder by itself.
        return HashedNgrams(side)
    return StaticVectors(side, resolve_model(config.embed.model, config.storage))


@dataclass(frozen=True)
class OwnVectors:
    """The document vectors that the user brought."""

    identity: str = "own vectors"

    @property
    def columns(self) -> list[str]:
        return ["document_vector"]

    def of(self, rows: pa.Table) -> np.ndarray:
        return unit_length(vector_values(rows["document_vector"]).astype(np.float32))


@dataclass(frozen=True)
class StaticVectors:
    """Means of the embedding model's token embeddings; model: its folder."""

    side: Side
    model: str

    @property
    def identity(self) -> str:
        return model_fingerprint(self.model)

    @property
    def columns(self) -> list[str]:
        return [self.side]

    def of(self, rows: pa.Table) -> np.ndarray:
        encoder = _static_encoder(self.model)
        return encoder.encode(encoder.tokenizer.encode(rows[self.side].to_pylist(), _TOKENS), 65_536)


@dataclass(frozen=True)
class HashedNgrams:
    """Counts of hashed character n-grams, projected at random; needs neither a model nor a fit."""

    side: Side

    @property
    def identity(self) -> str:
        return f"hashed n-grams of {self.side}"

    @property
    def columns(self) -> list[str]:
        return [self.side]

    def of(self, rows: pa.Table) -> np.ndarray:
        hashed = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), n_features=_GRAMS, norm="l2")
        counts = hashed.transform([text[: 8 * _TOKENS] for text in rows[self.side].to_pylist()])
        return unit_length(np.asarray(counts.astype(np.float32) @ _directions()))


@lru_cache(maxsize=1)
def _static_encoder(folder: str) -> Encoder:
    return load_encoder(folder, "static")


@lru_cache(maxsize=1)
def _directions() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((_GRAMS, _DIMENSIONS), np.float32)


def wanted_pivots(sources: Mapping[str, int], share: float) -> dict[str, int]:
    """Return how many pivots each source has; at most 2^16 in all, beside two drawn ones of every source.

    Sources too small for two drawn neighbourhoods have none: their rows are drawn one by one.
    """
    total = sum(sources.values())
    size = max(_NEIGHBOURHOOD, math.ceil(total / _MOST_PIVOTS))
    least = math.ceil(2 / share)
    # Below that even the least pivots of all sources would be too many to hold.
    smallest = max(least, math.ceil(total * least / _MOST_PIVOTS / 8))
    return {name: max(least, round(rows / size)) for name, rows in sources.items() if rows > smallest}


def _hash_shares(wanted: Mapping[str, int], sources: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each source's hashes among which its pivots are, all but certainly."""
    return {name: min(1.0, (count + 6 * math.sqrt(count) + 10) / sources[name]) for name, count in wanted.items()}


class PivotWorker:
    """Embeds the rows of a row group that may be pivots: those with a small hash; shares: by source."""

    def __init__(self, source: Artifact, cheap: CheapVectors, shares: Mapping[str, float]) -> None:
        self._source, self._cheap, self._shares = source, cheap, shares

    def process(self, item: WorkItem, output: Artifact) -> Result:
        group: RowGroup = item.payload[0]
        table = read_row_group(self._source, group, ["pair_id", "source", *self._cheap.columns])
        hashes = row_hashes(table["pair_id"], 0)
        encoded = table["source"].combine_chunks().dictionary_encode()
        limits = np.array([self._shares.get(name, 0.0) for name in encoded.dictionary.to_pylist()])
        limit = limits[encoded.indices.to_numpy(zero_copy_only=False)]
        rows = np.flatnonzero(hashes / _HASHES < limit)
        parts = []
        if len(rows):
            chosen = table.take(pa.array(rows))
            columns = [chosen["source"], pa.array(hashes[rows], pa.uint64()), pa.array(rows), chosen["pair_id"]]
            names = ["source", "hash", "row", "pair_id"]
            found = pa.table([*columns, vector_column(self._cheap.of(chosen))], names=[*names, "vector"])
            parts.append(write_parquet(output, f"pivots-{item.number:06d}", found))
        counts = Counts(read=len(hashes), written=len(rows), set_aside={"no pivot": len(hashes) - len(rows)})
        return Result(parts, counts)


@dataclass(frozen=True)
class Pivots:
    """Pivots of one source. vectors: (m, d) float32; drawn: (m,) bool; coarse: (m,) the nearest of the first pivots.

    coarse is None if rows are compared with all pivots.
    """

    vectors: np.ndarray
    drawn: np.ndarray
    coarse: np.ndarray | None

    @staticmethod
    def of(vectors: np.ndarray, drawn: np.ndarray) -> Pivots:
        if len(vectors) <= _FLAT_PIVOTS:
            return Pivots(vectors, drawn, None)
        first = vectors[: math.ceil(math.sqrt(len(vectors)))]
        return Pivots(vectors, drawn, _nearest(vectors, first))

    def draws(self, rows: np.ndarray) -> np.ndarray:
        """Return whether each row's pivot is drawn, (n,) bool, for (n, d) vectors."""
        if self.coarse is None:
            return self.drawn[_nearest(rows, self.vectors)]
        found = np.zeros(len(rows), bool)
        near = _nearest(rows, self.vectors[: self.coarse.max() + 1])
        for number in np.unique(near).tolist():
            members = np.flatnonzero(self.coarse == number)
            chosen = np.flatnonzero(near == number)
            found[chosen] = self.drawn[members[_nearest(rows[chosen], self.vectors[members])]]
        return found


def _nearest(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the place of the nearest of `others` for each row, in blocks that bound the score matrix."""
    block = max(1, 2**24 // len(others))
    found = [np.argmax(rows[start : start + block] @ others.T, axis=1) for start in range(0, len(rows), block)]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _choose(embedding: Artifact, parts: list[Part], wanted: Mapping[str, int], share: float) -> dict[str, Pivots]:
    """Return the pivots of every source: the rows with the smallest hashes; the first of them are drawn."""
    if not parts:
        return {}
    table = pa.concat_tables([read_parquet(embedding.folder, part) for part in parts])
    # pair_id, for hashes may collide.
    table = table.sort_by([("source", "ascending"), ("hash", "ascending"), ("pair_id", "ascending")])
    names, starts = np.unique(np.array(table["source"].to_pylist()), return_index=True)
    ends = [*starts[1:].tolist(), table.num_rows]
    found = {}
    for name, start, end in zip(names.tolist(), starts.tolist(), ends, strict=True):
        rows = table.slice(start, min(end - start, wanted[name]))
        drawn = np.arange(rows.num_rows) < max(1, round(share * rows.num_rows))
        found[name] = Pivots.of(vector_values(rows["vector"]).astype(np.float32), drawn)
    return found


class SampleWorker:
    """Keeps the drawn rows of one row group; pivots: by source; None: rows are drawn one by one everywhere."""

    def __init__(
        self,
        source: Artifact,
        embedded: Artifact | None,
        share: float,
        pivots: Mapping[str, Pivots] | None,
        cheap: CheapVectors | None,
    ) -> None:
        self._source, self._embedded = source, embedded
        self._share, self._pivots, self._cheap = share, pivots or {}, cheap

    def process(self, item: WorkItem, output: Artifact) -> Result:
        group, part = item.payload
        table = read_row_group(self._source, group)
        if self._embedded is not None:
            folder = self._embedded.folder
            vectors = read_parquet(folder, part, VECTORS)
            place = f"{folder.uri}/{part.path}"
            vectors = take_live(self._source, group, vectors, part.details.get("deleted"), place)
            for name in VECTORS:
                if name not in table.column_names:
                    table = table.append_column(name, vectors[name])
        kept = table.filter(pa.array(self._drawn(table)))
        parts = []
        if kept.num_rows:
            parts.append(write_parquet(output, f"part-{item.number:06d}", kept, role=PAIRS))
        counted = kept["source"].value_counts().to_pylist()
        return Result(
            parts,
            Counts(
                read=table.num_rows,
                written=kept.num_rows,
                set_aside={"not in the sample": table.num_rows - kept.num_rows},
            ),
            {"sources": {entry["values"]: entry["counts"] for entry in counted}},
        )

    def _drawn(self, table: pa.Table) -> np.ndarray:
        """Return which rows are kept, (rows,) bool."""
        drawn = row_hashes(table["pair_id"], 0) < self._share * _HASHES
        if not self._pivots or self._cheap is None:
            return drawn
        encoded = table["source"].combine_chunks().dictionary_encode()
        numbers = encoded.indices.to_numpy(zero_copy_only=False)
        vectors = self._cheap.of(table)
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(len(encoded.dictionary) + 1))
        for number, name in enumerate(encoded.dictionary.to_pylist()):
            rows = order[bounds[number] : bounds[number + 1]]
            if name in self._pivots:
                drawn[rows] = self._pivots[name].draws(vectors[rows])
        return drawn

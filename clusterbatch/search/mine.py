"""The stage `mine`: search every query in its source and keep its hard negatives and its rank, for `cluster` to use."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.config import MineConfig, RunConfig, fingerprint
from clusterbatch.corpus.partitions import source_partitions
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.stage import embedding_pool
from clusterbatch.embedding.vectors import tasks
from clusterbatch.errors import InfrastructureError, UsageError
from clusterbatch.hashing import mix
from clusterbatch.runtime import Pass, Pool, Result, WorkItem, ray_session
from clusterbatch.search.gather import TEXTS, VECTORS, Block, Gathered, GatherWorker, blocks
from clusterbatch.search.negatives import choose_negatives
from clusterbatch.search.neighbours import Approximation
from clusterbatch.store import Artifact, Counts, Manifest, Part, Stopwatch
from clusterbatch.store.artifact import EXCHANGE
from clusterbatch.store.details import MinedDetails, details_of, has_vectors
from clusterbatch.store.shuffle import iterate_bucket, read_buckets, write_buckets
from clusterbatch.store.tables import parquet_columns
from clusterbatch.store.workspace import Workspace


def mine(config: RunConfig, *, generation: int = 0, force: bool = False, embedded: int | None = None) -> Manifest:
    """Search every query of the embedded corpus among the documents of its source; return at once if that is done.

    embedded: the generation whose embeddings are searched; None: this one.

    Details: negatives (how many), inconsistent (pairs beyond `mine.consistency`), first (pairs whose document is the
    nearest of its source). Raises UsageError if nothing is asked for.
    """
    if not config.mine.is_on:
        raise UsageError("mine: set mine.negatives or mine.consistency")
    workspace, embedded = Workspace(config), generation if embedded is None else embedded
    corpus, embeddings = workspace.corpus.require(), workspace.embeddings(embedded).require()
    groups = row_groups_of(corpus)
    columns = parquet_columns(workspace.corpus.folder, groups[0].path) if groups else []
    document_ids = "document_id" in columns
    # Corpora with ids were once mined without a look at them.
    more = ["document ids"] if document_ids else []
    # Negatives that rows have were once mined again.
    negatives = config.mine.negatives > 0 and "negatives" in columns
    more += ["given negatives"] if negatives else []
    identity = fingerprint("mined", config.mine, corpus.fingerprint, embeddings.fingerprint, *more)
    artifact = workspace.mined(generation)
    if artifact.is_done(identity) and not force:
        artifact.remove(EXCHANGE)
        return artifact.require()
    workspace.corpus.check_parts(corpus)
    workspace.embeddings(embedded).check_parts(embeddings)
    watch = Stopwatch()
    done = artifact.begin(identity, force)
    partitions, items = source_partitions(corpus), tasks(corpus, embeddings)
    pool = Pool(config.mine.workers, config.mine.cpus_per_worker)
    exchange = Artifact(artifact.folder.child(EXCHANGE), "rows by source")
    with ray_session(config.ray):
        gather = Pass(
            "mine: gather",
            exchange,
            identity,
            GatherWorker,
            {
                "config": config,
                "generation": embedded,
                "partitions": partitions,
                "document_ids": document_ids,
                "negatives": negatives,
            },
            pool if has_vectors(embeddings) else embedding_pool(config.embed),
            temporary=True,
        )
        gathered = gather.run(items, force=force)
        vectors, texts = (
            [part for receipt in gathered for part in receipt.parts if part.details["holds"] == content]
            for content in (VECTORS, TEXTS)
        )
        arguments = {
            "config": config.mine,
            "gathered": exchange,
            "vectors": vectors,
            "texts": texts,
            "tasks": len(items),
        }
        search = Pass("mine: search", artifact, identity, MineWorker, arguments, pool)
        receipts = search.run(blocks(vectors + texts, partitions), done=done)
    found = [details_of(receipt, MinedDetails) for receipt in receipts]
    totals = MinedDetails(
        negatives=sum(of_block["negatives"] for of_block in found),
        inconsistent=sum(of_block["inconsistent"] for of_block in found),
        first=sum(of_block["first"] for of_block in found),
    )
    manifest = artifact.commit(
        identity,
        receipts,
        config=config.mine.identity(),
        inputs={"corpus": corpus.fingerprint, "embeddings": embeddings.fingerprint},
        seconds=watch.seconds,
        passes_seconds=sum(receipt.seconds for receipt in gathered),
        details=totals,
    )
    artifact.remove(EXCHANGE)
    return manifest


class MineWorker:
    """Search a block of queries; write what it finds for each row, bucketed by the task of the row."""

    def __init__(
        self, config: MineConfig, gathered: Artifact, vectors: Sequence[Part], texts: Sequence[Part], tasks: int
    ) -> None:
        torch.set_num_threads(1)
        self._config, self._artifact = config, gathered
        self._gathered = Gathered(gathered, vectors, Approximation.of(config))
        self._texts, self._tasks = texts, tasks
        self._held: dict[int, pa.ChunkedArray] = {}
        self._local: tuple[int, LocalTexts] | None = None

    def process(self, item: WorkItem, output: Artifact) -> Result:
        block: Block = item.payload
        held = read_buckets(self._artifact, self._texts, block.partitions) if block.together else []
        self._held = {
            n: table["document"] for n, table in zip(block.partitions, held, strict=bool(held)) if table is not None
        }
        mined = [self._mine(partition, rows) for partition, rows in self._gathered.queries(block)]
        task, tables, totals = zip(*mined, strict=True)
        part = write_buckets(output, item.number, pa.concat_tables(tables), np.concatenate(task), self._tasks)
        details = {name: sum(of_partition[name] for of_partition in totals) for name in totals[0]}
        return Result([part], Counts(read=part.rows, written=part.rows), details)

    def _mine(self, partition: int, rows: pa.Table) -> tuple[np.ndarray, pa.Table, MinedDetails]:
        """Return of `rows`, which are in the partition: the task of each, what is kept of it, and totals."""
        # Deep enough that the filters leave something to choose from.
        depth = self._config.last if self._config.negatives else 1
        found = self._gathered.search(partition, rows, depth, self._config.consistency or 0)
        columns = {"unit": rows["unit"], "row": rows["row"], "rank": found.rank.astype(np.int32)}
        negatives = 0
        if self._config.negatives:
            draws = _draws(rows["draw"].to_numpy(), depth)
            chosen = choose_negatives(found.ranking.scores, found.positive, draws, self._config)
            documents = np.where(chosen < 0, -1, np.take_along_axis(found.ranking.documents, np.maximum(chosen, 0), 1))
            negatives = int((documents >= 0).sum())
            columns["negatives"] = self._texts_of(partition, documents)
            if self._config.margins:
                margins = found.positive[:, None] - np.take_along_axis(found.ranking.scores, np.maximum(chosen, 0), 1)
                columns["margins"] = _lists(documents >= 0, pa.array(margins[documents >= 0], pa.float32()))
        consistency = self._config.consistency
        totals = MinedDetails(
            negatives=negatives,
            inconsistent=0 if consistency is None else int((found.rank >= consistency).sum()),
            first=int((found.rank == 0).sum()),
        )
        return rows["task"].to_numpy(), pa.table(columns), totals

    def _texts_of(self, partition: int, documents: np.ndarray) -> pa.ListArray:
        """Return the texts of (Q, n) rows of a partition as (Q,) lists; -1 stands for no document."""
        wanted = np.unique(documents[documents >= 0])
        texts: list[pa.ChunkedArray] = []
        start = 0
        for piece in self._text_pieces(partition):
            first, stop = np.searchsorted(wanted, [start, start + len(piece)])
            texts.append(piece.take(pa.array(wanted[first:stop] - start)))
            start += len(piece)
        column = pa.chunked_array([chunk for each in texts for chunk in each.chunks], pa.string())
        present = documents >= 0
        place = np.searchsorted(wanted, documents[present])
        return _lists(present, column.take(pa.array(place)).combine_chunks())

    def _text_pieces(self, partition: int) -> Iterator[pa.ChunkedArray]:
        """Yield the texts of all rows of a partition, piece by piece."""
        if partition in self._held:
            yield self._held[partition]
            return
        if not self._gathered.is_approximate(partition):
            # The search has read as much for this block.
            yield from (piece["document"] for piece in iterate_bucket(self._artifact, self._texts, partition))
            return
        if self._local is None or self._local[0] != partition:
            # Dropped first: the disk need not hold two of them.
            self._local = None
            self._local = partition, LocalTexts(iterate_bucket(self._artifact, self._texts, partition))
        yield from self._local[1].pieces


class LocalTexts:
    """Texts of a source's documents in a temporary file of this machine, mapped into memory.

    If the search is approximate, each block needs only some of them: reading all of them from storage for every block
    would take longer than the search. Raises InfrastructureError if the file cannot be written.
    """

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        try:
            # Its name is removed at once; the file goes with the last process that has it mapped.
            with tempfile.NamedTemporaryFile(prefix="clusterbatch-", suffix=".arrow") as file:
                schema = pa.schema({"document": pa.string()})
                with pa.OSFile(file.name, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                    for table in tables:
                        writer.write_table(table.select(["document"]).cast(schema))
                stored = pa.ipc.open_file(pa.memory_map(file.name))
        except OSError as error:
            raise InfrastructureError(
                f"mine: cannot keep the texts of a source in {tempfile.gettempdir()} ({error.strerror or error}); "
                "TMPDIR names another folder"
            ) from error
        self.pieces = [
            pa.chunked_array([stored.get_batch(number)["document"]]) for number in range(stored.num_record_batches)
        ]


def _lists(present: np.ndarray, values: pa.Array) -> pa.ListArray:
    """Return (Q,) lists of `values`, which belong to the true entries of `present` (Q, n), row by row."""
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _draws(keys: np.ndarray, count: int) -> np.ndarray:
    """Return (Q, count) uniform numbers in [0, 1) from (Q,) uint64 hashes of the rows, not from their order."""
    with np.errstate(over="ignore"):
        spread = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (mix(spread) >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class Mined:
    """Results of a committed `mine` stage, by task. Picklable. tasks: of the corpus that was mined."""

    artifact: Artifact
    parts: Sequence[Part]
    config: MineConfig
    fingerprint: str
    inconsistent_share: float
    tasks: int

    @staticmethod
    def of(config: RunConfig, generation: int) -> Mined:
        """Open the results of `generation`. Raises DataError if the stage is not finished."""
        workspace = Workspace(config)
        artifact = workspace.mined(generation)
        manifest = artifact.require()
        share = details_of(manifest, MinedDetails)["inconsistent"] / max(1, manifest.counts.written)
        count = len(tasks(workspace.corpus.require(), None))
        return Mined(artifact, manifest.parts, config.mine, manifest.fingerprint, share, count)

    def rows_of(self, task: WorkItem) -> pa.Table:
        """Return unit, row, rank and, if they were asked for, negatives and margins of all rows of a task, in order."""
        found: list[pa.Table] = []
        by_task = [part for part in self.parts if part.details["buckets"] == self.tasks]
        # An earlier version had a task for each row group.
        by_row_group = [part for part in self.parts if part.details["buckets"] != self.tasks]
        numbers = range(task.number, task.number + 1)
        for parts, buckets in ((by_task, numbers), (by_row_group, range(*task.covers) if task.covers else numbers)):
            found += [table for table in read_buckets(self.artifact, parts, buckets) if table is not None]
        # A task has no rows if all of them were deleted from the corpus.
        table = pa.concat_tables(found) if found else self._schema.empty_table()
        return table.sort_by([("unit", "ascending"), ("row", "ascending")])

    @property
    def _schema(self) -> pa.Schema:
        columns = {"unit": pa.int64(), "row": pa.int64(), "rank": pa.int32()}
        if self.config.negatives:
            columns["negatives"] = pa.list_(pa.string())
        if self.config.margins:
            columns["margins"] = pa.list_(pa.float32())
        return pa.schema(columns)

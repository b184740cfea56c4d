"""Map side of the shuffle by cluster: each row gets its cluster, its token ids and its bucket, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.embedded_corpus import EmbeddedRows
from clusterbatch.clustering.model import Assigned, FittedClusters, UnitRows
from clusterbatch.clustering.user_groups import LABEL
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import Side, TaskUnit
from clusterbatch.errors import DataError
from clusterbatch.hashing import document_id_hashes, row_hashes
from clusterbatch.runtime import Result, WorkItem
from clusterbatch.search.mine import Mined
from clusterbatch.search.negatives import with_margins, with_negatives, with_scores, without_given
from clusterbatch.shards.bucket_plan import BucketPlan
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Counts
from clusterbatch.store.shuffle import write_buckets

_DOCUMENT_ID = "document_id"


class AssignWorker:
    """Read corpus and vectors of a task; write its rows bucketed by the range of clusters they belong to.

    columns: of the corpus, to be read; sides: those whose surrogate's vectors are needed; mined: results of mining,
    whose negatives are taken and whose inconsistent pairs are marked (column `inconsistent`). Columns of the exchange:
    cluster (numbered through all partitions), hash, cosine (NaN if not clustered), those of the corpus except the
    user's groups and document ids, hashes of the latter, token ids, and the vectors of `sides`.
    """

    def __init__(
        self,
        rows: EmbeddedRows,
        columns: Sequence[str],
        clusters: FittedClusters,
        plan: BucketPlan,
        sides: Sequence[Side],
        mined: Mined | None = None,
    ) -> None:
        torch.set_num_threads(1)
        self._corpus, self._partitions = rows.corpus, rows.partitions
        self._vectors, self._sides = rows.vectors() if sides else None, sides
        self._columns, self._clusters, self._plan, self._mined = columns, clusters, plan, mined
        self._tokenisation = Tokenisation.of(rows.config)
        self._seed = rows.config.cluster.seed

    def process(self, item: WorkItem, output: Artifact) -> Result:
        mined = self._mined.rows_of(item) if self._mined else None
        parts, first = [], 0
        for unit in item.payload:
            of_unit = None if mined is None else mined.slice(first, unit.unit.rows)
            parts.append(self._rows(item.number, unit, of_unit))
            first += unit.unit.rows
        table = pa.concat_tables([rows for rows, _ in parts]).combine_chunks()
        aside = np.concatenate([aside for _, aside in parts])
        # A task may be a good part of the worker's memory.
        del parts
        buckets = self._plan.of_rows(table["cluster"].to_numpy(), table["hash"].to_numpy(), aside)
        part = write_buckets(output, item.number, table, buckets, self._plan.buckets)
        return Result([part], Counts(read=item.rows, written=table.num_rows))

    def _rows(self, task: int, unit: TaskUnit, mined: pa.Table | None) -> tuple[pa.Table, np.ndarray]:
        """Return the exchange's columns of a unit's rows, and (rows,) bool: which of them are set aside."""
        rows = read_row_group(self._corpus, unit.unit, self._columns)
        if mined is not None and self._mined and self._mined.config.negatives:
            mined = without_given(mined, rows)
            if self._mined.config.margins:
                rows = with_margins(rows, mined["margins"])
            rows = with_negatives(rows, mined["negatives"])
        rows = with_scores(rows)
        vectors = self._vectors.read(unit, self._sides) if self._vectors else None
        if vectors is not None and not vectors["pair_id"].equals(rows["pair_id"]):
            part = unit.embeddings.path if unit.embeddings else "(computed)"
            raise DataError(f"embeddings: the rows of {part} are not those of unit {unit.unit.number} of the corpus")
        partition = self._partitions.of_rows(rows["source"])
        found: Assigned = self._clusters.assign(UnitRows(task, unit, rows, partition), vectors)
        columns = {
            "cluster": self._plan.first_cluster[partition] + found.cluster,
            "hash": row_hashes(rows["pair_id"], self._seed),
            "cosine": found.cosine,
            **{name: rows[name] for name in rows.column_names if name not in (LABEL, _DOCUMENT_ID)},
            **self._tokenisation.columns(rows),
        }
        if _DOCUMENT_ID in rows.column_names:
            columns["document_id_hash"] = document_id_hashes(rows["source"], rows[_DOCUMENT_ID])
        if vectors is not None:
            columns |= {f"{side}_vector": vectors[f"{side}_vector"] for side in self._sides}
        aside = found.outlier
        if mined is not None and self._mined and self._mined.config.consistency is not None:
            columns["inconsistent"] = mined["rank"].to_numpy() >= self._mined.config.consistency
            aside = aside | columns["inconsistent"]
        return pa.table(columns), aside

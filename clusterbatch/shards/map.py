"""The one pass over everything: each row gets its cluster, its token ids, and its place in the shuffle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from clusterbatch.clustering.features import Features, feature_vectors
from clusterbatch.clustering.model import GroupAssigner, StoredModels, cosine_to
from clusterbatch.clustering.user_groups import LABEL
from clusterbatch.clustering.warm_start import KeptRows, Previous
from clusterbatch.config import RunConfig
from clusterbatch.corpus.groups import Groups
from clusterbatch.corpus.row_groups import read_row_group
from clusterbatch.embedding.vectors import SIDES, TaskUnit, VectorSource
from clusterbatch.errors import DataError
from clusterbatch.hashing import row_hashes
from clusterbatch.runtime import Unit
from clusterbatch.search.mine import Mined
from clusterbatch.search.negatives import with_margins, with_negatives
from clusterbatch.shards.bucket_plan import BucketPlan
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Counts, Receipt, Stopwatch
from clusterbatch.store.shuffle import write_buckets
from clusterbatch.store.workspace import Workspace


class AssignWorker:
    """Reads corpus and vectors of a task, writes its rows bucketed by the range of clusters they belong to.

    columns: of the corpus, to be read. Columns of the exchange: cluster (numbered through all groups), hash, cosine
    (NaN where not clustered), those of the corpus but for the user's segment, token ids, and the surrogate's vectors
    unless nothing needs them. previous: the generation before, with whose clusters a share of the rows stays; mined:
    what was mined, whose negatives are taken and whose inconsistent pairs are marked (column `inconsistent`).
    """

    def __init__(
        self,
        config: RunConfig,
        generation: int,
        output: Artifact,
        fingerprint: str,
        groups: Groups,
        columns: Sequence[str],
        fits: StoredModels,
        plan: BucketPlan,
        with_vectors: bool,
        device: str,
        previous: Previous | None = None,
        mined: Mined | None = None,
    ) -> None:
        torch.set_num_threads(1)
        self._corpus = Workspace(config).corpus
        self._vectors = VectorSource(config, generation) if with_vectors else None
        self._output, self._fingerprint = output, fingerprint
        self._columns = columns
        self._groups, self._plan, self._models = groups, plan, fits.load()
        self._placed = fits.placed
        nearest = {} if fits.placed else self._models
        self._assigners = {group: GroupAssigner(model, device) for group, model in nearest.items()}
        self._tokenisation = Tokenisation.of(config)
        self._features: Features = config.cluster.features
        self._seed = config.cluster.seed
        self._mined = mined
        self._kept = KeptRows(previous, groups, self._seed) if previous and previous.keep else None

    def process(self, unit: Unit) -> Receipt:
        watch = Stopwatch()
        mined = self._mined.rows_of(unit.number) if self._mined else None
        placed = self._placed.of_task(unit.number) if self._placed else {}
        parts, first = [], 0
        for item in unit.payload:
            of_item = None if mined is None else mined.slice(first, item.unit.rows)
            parts.append(self._rows(item, of_item, placed.get(item.unit.number)))
            first += item.unit.rows
        table = pa.concat_tables([rows for rows, _ in parts]).combine_chunks()
        outlier = np.concatenate([far for _, far in parts])
        # A task may be a good part of the worker's memory.
        del parts
        buckets = self._plan.of_rows(table["cluster"].to_numpy(), table["hash"].to_numpy(), outlier)
        part = write_buckets(self._output, unit.number, table, buckets, self._plan.buckets)
        counts = Counts(read=unit.rows, written=table.num_rows)
        receipt = Receipt(
            unit=unit.number, fingerprint=self._fingerprint, parts=[part], counts=counts, seconds=watch.seconds
        )
        self._output.write_receipt(receipt)
        return receipt

    def _rows(self, item: TaskUnit, mined: pa.Table | None, placed: np.ndarray | None) -> tuple[pa.Table, np.ndarray]:
        """The exchange's columns of a unit's rows, and (rows,) bool: which of them are set aside."""
        rows = read_row_group(self._corpus, item.unit, self._columns)
        if mined is not None and self._mined and self._mined.config.negatives:
            if self._mined.config.margins:
                rows = with_margins(rows, mined["margins"])
            rows = with_negatives(rows, mined["negatives"])
        vectors = self._vectors.read(item, SIDES) if self._vectors else None
        if vectors is not None and not vectors["pair_id"].equals(rows["pair_id"]):
            part = item.embeddings.path if item.embeddings else "(computed)"
            raise DataError(f"embeddings: the rows of {part} are not those of unit {item.unit.number} of the corpus")
        cluster, cosine, outlier = self._assign(item, rows, vectors, placed)
        columns = {
            "cluster": cluster,
            "hash": row_hashes(rows["pair_id"], self._seed),
            "cosine": cosine,
            **{name: rows[name] for name in rows.column_names if name != LABEL},
            **self._tokenisation.columns(rows),
        }
        if vectors is not None:
            columns |= {f"{side}_vector": vectors[f"{side}_vector"] for side in SIDES}
        if mined is not None and self._mined and self._mined.config.consistency is not None:
            columns["inconsistent"] = mined["rank"].to_numpy() >= self._mined.config.consistency
            outlier |= columns["inconsistent"]
        return pa.table(columns), outlier

    def _assign(
        self, item: TaskUnit, rows: pa.Table, vectors: pa.Table | None, placed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows,) int64 cluster, numbered through all groups, float32 cosine, bool outlier."""
        groups = self._groups.of_rows(rows["source"])
        cluster = self._plan.first_cluster[groups]
        cosine = np.full(len(groups), np.nan, np.float32)
        outlier = np.zeros(len(groups), bool)
        given = self._kept(item, rows["pair_id"], groups) if self._kept else np.full(len(groups), -1)
        if placed is not None:
            given[placed[:, 0]] = placed[:, 1]
        for group in np.unique(groups).tolist():
            if group not in self._models:
                continue
            assert vectors is not None, "clusters need vectors"
            of_group = np.flatnonzero(groups == group)
            labels = rows[LABEL].take(pa.array(of_group)) if LABEL in rows.column_names else None
            values = feature_vectors(vectors.take(pa.array(of_group)), self._features)
            number = given[of_group]
            stays = np.flatnonzero(number >= 0)
            if len(stays) < len(number):
                nearest, cosine[of_group] = self._assigners[group](values, labels)
                number = np.where(number < 0, nearest, number)
            if len(stays):
                cosine[of_group[stays]] = cosine_to(self._models[group], values[stays], number[stays])
            cluster[of_group] += number
            outlier[of_group] = cosine[of_group] < self._models[group].outlier_below
        return cluster, cosine, outlier

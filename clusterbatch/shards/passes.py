"""The passes of the stage `cluster` after the fit: plan of the buckets, map and reduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clusterbatch.clustering.embedded_corpus import EmbeddedCorpus, PassFactory
from clusterbatch.clustering.features import feature_sides
from clusterbatch.clustering.model import FittedClusters, StoredParts
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.vectors import SIDES, Side
from clusterbatch.runtime import Pass, WorkItem
from clusterbatch.schema import VECTORS
from clusterbatch.search.mine import Mined
from clusterbatch.shards.bucket_plan import BucketPlan, plan_buckets
from clusterbatch.shards.layout import ShardSchema
from clusterbatch.shards.shuffle_map import AssignWorker
from clusterbatch.shards.shuffle_reduce import ReduceWorker
from clusterbatch.shards.tokenise import Tokenisation
from clusterbatch.store import Artifact, Receipt
from clusterbatch.store.details import EmbeddingsDetails, details_of, given_dimensions
from clusterbatch.store.shuffle import bucket_rows

# Text that a bucket has at most, about: sorting holds it twice.
_BUCKET_TEXT = 2**30
# Of text to its compressed bytes, at most; usually it is three. Images as text have a third more bytes than as files.
_EXPANSION, _IMAGE_EXPANSION = 4.0, 4 / 3


@dataclass(frozen=True)
class ShardPasses:
    """Plan, map and reduce of one call of `cluster`. mined: results of mining that the shards take in, if any."""

    corpus: EmbeddedCorpus
    passes: PassFactory
    mined: Mined | None = None

    @cached_property
    def schema(self) -> ShardSchema:
        config, columns = self.corpus.config, self.corpus.columns
        dimensions: int | None = None
        if config.cluster.surrogate != "none":
            full = details_of(self.corpus.embeddings, EmbeddingsDetails)["dimensions"]
            assert full is not None, "clusters need vectors"
            dimensions = min(full, config.cluster.surrogate_dimensions or full)
        return ShardSchema(
            vocabulary=Tokenisation.of(config).tokenizer.vocabulary,
            run_rows=config.cluster.run_rows,
            surrogate_dimensions=dimensions,
            surrogate="int8" if config.cluster.surrogate == "int8" else "float16",
            negatives="negatives" in columns or config.mine.negatives > 0,
            margins=config.mine.margins,
            weight="weight" in columns,
            document_id="document_id" in columns,
            score="score" in columns,
            negative_scores="negative_scores" in columns,
            duplicates=config.cluster.duplicates.threshold is not None and config.cluster.duplicates.action != "drop",
            images=config.corpus.columns.images,
        )

    def plan(self, shares: Mapping[int, np.ndarray]) -> BucketPlan:
        """Plan the buckets from the sample's shares, by partition, and the corpus' bytes on storage."""
        config, corpus, partitions = self.corpus.config, self.corpus.corpus, self.corpus.partitions
        # Compressed text has about a third of its characters' bytes; a token is about four characters and two bytes.
        pairs = {unit.path for unit in row_groups_of(corpus)}
        stored = sum(part.bytes for part in corpus.parts if part.path in pairs)
        rows = max(1, corpus.counts.written)
        tokens = 1.5 * stored / rows
        longest = 2 * (config.train.max_query_tokens + config.train.max_document_tokens)
        # Images are what they were; written as text they had a third more bytes, which compression takes back.
        content = stored / rows if self.schema.images else min(tokens, longest)
        each = content + 4 * (self.schema.surrogate_dimensions or 0)
        # Tokens are cut, but all of the text comes along. A bucket has at most one and a quarter shards' bytes; if so
        # many rows had too much text, each row counts for more.
        each = max(each, 1.25 * config.cluster.shard_bytes * self._text_bytes(stored / rows) / _BUCKET_TEXT)
        sizes = [
            each * rows * shares.get(partition, np.ones(1)) for partition, rows in enumerate(partitions.rows.tolist())
        ]
        aside = (config.cluster.drop_outliers or 0.0) + (self.mined.inconsistent_share if self.mined else 0.0)
        return plan_buckets(sizes, config.cluster.shard_bytes, aside)

    def _text_bytes(self, stored: float) -> float:
        """Return the most bytes of a row's text if its pair takes `stored` bytes; a mined negative is as long."""
        vectors = 2 * len(VECTORS) * (given_dimensions(self.corpus.corpus) or 0)
        expansion = _IMAGE_EXPANSION if self.schema.images else _EXPANSION
        return expansion * max(0.0, stored - vectors) * (1 + self.corpus.config.mine.negatives)

    def map(self, clusters: FittedClusters, plan: BucketPlan) -> StoredParts:
        """Assign all rows and shuffle them by bucket."""
        arguments = {
            "rows": self.corpus.rows,
            "columns": [name for name in self.corpus.columns if name not in VECTORS],
            "clusters": clusters,
            "plan": plan,
            "sides": self._sides(clusters),
            "mined": self.mined,
        }
        return self.passes.run("assign", self.corpus.items, AssignWorker, arguments, self.corpus.assigning_pool)

    def _sides(self, clusters: FittedClusters) -> list[Side]:
        """Return the sides whose vectors are needed: of all for masks and duplicates, otherwise what is clustered."""
        config = self.corpus.config.cluster
        if self.schema.vectors is not None or config.duplicates.threshold is not None:
            return [*SIDES]
        return feature_sides(config.features) if clusters.stored else []

    def reduce(
        self, plan: BucketPlan, exchange: StoredParts, output: Artifact, done: Mapping[int, Receipt]
    ) -> list[Receipt]:
        """Write the shards of all buckets to `output`; return its receipts."""
        rows = bucket_rows(exchange.artifact, exchange.parts)
        items = [WorkItem(bucket, int(rows[bucket]), None) for bucket in np.flatnonzero(rows).tolist()]
        arguments = {
            "exchange": exchange,
            "facts": self.facts,
            "partitions": self.corpus.partitions,
            "plan": plan,
            "schema": self.schema,
            "config": self.corpus.config.cluster,
        }
        shards = Pass("shards", output, self.passes.identity, ReduceWorker, arguments, self.corpus.pool)
        return shards.run(items, done=done)

    @property
    def facts(self) -> Artifact:
        """Facts of each bucket about its clusters, for the statistics over all of them."""
        return self.passes.artifact("facts")

"""Which cluster a test query is nearest to: winners and losers among clusters, also where ids name no source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.vectors import vector_values
from clusterbatch.config import RunConfig
from clusterbatch.encoder.hardware import visible_device
from clusterbatch.encoder.model import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.surrogate import SURROGATES
from clusterbatch.evaluation.collection import Collection
from clusterbatch.store import Artifact
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace

# What the part of a comparison is called that holds them.
SEGMENTS = "segments"
_SCHEMA = pa.schema(
    [
        pa.field("collection", pa.string(), nullable=False),
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        # Number of the centroid inside the source, in the fit's order.
        pa.field("centroid", pa.int32(), nullable=False),
    ]
)


def query_segments(config: RunConfig, clusters: Artifact, collections: Sequence[Collection]) -> pa.Table:
    """Of every judged query the centroid, of any source, that its surrogate's vector is nearest to.

    Columns collection, query_id, source, centroid. No rows where queries have no vectors comparable with the centroids:
    the user's own vectors, character n-grams, features of both sides, a projection.
    """
    empty = _SCHEMA.empty_table()
    names, centroids = _centroids(clusters)
    own_vectors = Workspace(config).corpus.require().details.get("dimensions") is not None
    if not names or own_vectors or config.embed.model in SURROGATES:
        return empty
    folder = resolve_model(config.embed.model, config.storage)
    encoder = load_encoder(folder, device=visible_device(config.embed.device), packed=True)
    if encoder.dimensions != centroids.shape[1]:
        return empty
    found = [empty]
    for collection in collections:
        texts = collection.read_queries(collection.read_judgements())
        tokens = encoder.prepare(
            list(texts.values()), config.evaluate.max_query_tokens, config.embed.query_prompt or ""
        )
        nearest = np.argmax(encoder.encode(tokens, config.embed.batch_tokens) @ centroids.T, axis=1)
        columns = [
            [collection.name] * len(texts),
            list(texts),
            [names[row][0] for row in nearest],
            [names[row][1] for row in nearest],
        ]
        found.append(pa.table(columns, schema=_SCHEMA))
    return pa.concat_tables(found)


def _centroids(clusters: Artifact) -> tuple[list[tuple[str, int]], np.ndarray]:
    """(source, number) of all centroids of the finest level, and their vectors (k, d) float32."""
    parts = [part for part in clusters.require().parts if part.details.get("content") == "centroids"]
    finest: dict[str, int] = {}
    for part in parts:
        source = part.details["group"]
        finest[source] = max(finest.get(source, 1), part.details.get("level", 1))
    names: list[tuple[str, int]] = []
    vectors = []
    counts: dict[str, int] = {}
    for part in parts:
        source = part.details["group"]
        if part.details.get("level", 1) < finest[source]:
            continue
        values = vector_values(read_parquet(clusters.folder, part.path, ["centroid"])["centroid"])
        first = counts.get(source, 0)
        names += [(source, first + row) for row in range(len(values))]
        counts[source] = first + len(values)
        vectors.append(values.astype(np.float32))
    return names, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

"""The clusters of a round of refresh: of new vectors, or those before with the rows that the corpus has got since."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from clusterbatch.clustering.previous import Previous
from clusterbatch.clustering.stage import cluster
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.encoder.stage import embed, is_embedded
from clusterbatch.errors import DataError, UsageError
from clusterbatch.experiments.run import Stage, run_stage
from clusterbatch.store import Manifest
from clusterbatch.store.workspace import Workspace


def new_clusters(
    changed: RunConfig, workspace: Workspace, clusters: int, generation: int, force: bool, frozen: bool
) -> dict[str, Manifest]:
    """Embeds and clusters anew, on from the clusters of generation `clusters`.

    frozen: centroids stay as they are; what has come to the corpus since is embedded as the rest was, and assigned.
    """
    whole = workspace.clusters(generation).manifest()
    if whole is not None and whole.inputs.get("corpus") in workspace.corpus.require().earlier:
        # The corpus has got another version between two calls: that is for the next round.
        return {"cluster": whole}
    keep = 0.0 if frozen else changed.refresh.keep_fraction
    previous = Previous.of(changed, clusters, keep, frozen)
    if frozen:
        then = previous.config.embed.identity()
        changed = with_changes(changed, {f"embed.{key}": value for key, value in then.items()})
    # Vectors of the same model are there already, but for those of new rows.
    vectors = previous.vectors if frozen or is_embedded(changed, previous.vectors) else generation
    clustering = partial(cluster, previous=previous, vectors=vectors)
    return {
        "embed": run_stage(
            Stage("embed", embed, Workspace.embeddings),
            changed,
            generation=vectors,
            force=force and vectors == generation,
        ),
        "cluster": run_stage(
            Stage("cluster", clustering, Workspace.clusters), changed, generation=generation, force=force
        ),
    }


def wanted(config: RunConfig, workspace: Workspace, clusters: int, figures: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a round clusters anew, by these figures; and if not, whether it takes the clusters of generation
    `clusters` with the rows of a newer version of the corpus.

    Where the model that embedded the other rows has been cleaned away, it clusters anew.
    """
    grown = workspace.clusters(clusters).require().inputs.get("corpus") in workspace.corpus.require().earlier
    if config.refresh.wants_clusters(figures) or not grown:
        return config.refresh.wants_clusters(figures), False
    previous = Previous.of(config, clusters)
    # Vectors may have come with the rows, new ones too.
    there = previous.vectors == 0 and workspace.corpus.require().details.get("dimensions") is not None
    with suppress(UsageError, DataError):
        there = there or is_embedded(previous.config, previous.vectors)
    return not there, there

"""Clusters of a round of refresh, made while training continues: rounds of training never wait for them.

They are made of new vectors, or are the existing ones with the rows that have come to the corpus since. A thread
measures drift, embeds and clusters, from the model that a round begins with, while that round trains on the existing
clusters. The first round that begins after they are whole trains on them; that may be one of the next call. The choice
is written down before the round starts, so that a resumed run makes the same one. A build that fails costs nothing but
itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from clusterbatch.clustering.warm_start import Previous
from clusterbatch.config import RunConfig, with_changes
from clusterbatch.embedding.stage import embed, is_embedded
from clusterbatch.errors import DataError, UsageError
from clusterbatch.log import say
from clusterbatch.pipeline.rounds import BUILD
from clusterbatch.pipeline.run import SCORE, Stage, run_stage
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Manifest
from clusterbatch.store.details import given_dimensions
from clusterbatch.store.workspace import Workspace


def new_clusters(
    changed: RunConfig, workspace: Workspace, clusters: int, generation: int, force: bool, frozen: bool
) -> dict[str, Manifest]:
    """Embed and cluster again, starting from the clusters of generation `clusters`; score if a teacher is named.

    frozen: keep the centroids; rows that have come to the corpus since are embedded as the others were, and assigned.
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
    made = {
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
    if changed.score.is_on:
        made["score"] = run_stage(SCORE, changed, generation=generation, force=force)
    return made


def wanted(config: RunConfig, workspace: Workspace, clusters: int, figures: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether a round clusters again, by these figures; and if not, whether it takes the clusters of generation
    `clusters` with the rows of a newer version of the corpus.

    If the model that embedded the other rows has been cleaned away, the round clusters again.
    """
    grown = workspace.clusters(clusters).require().inputs.get("corpus") in workspace.corpus.require().earlier
    if config.refresh.wants_clusters(figures) or not grown:
        return config.refresh.wants_clusters(figures), False
    previous = Previous.of(config, clusters)
    # Vectors may have come with the rows, new ones too.
    corpus = workspace.corpus.require()
    there = previous.vectors == 0 and given_dimensions(corpus) is not None
    with suppress(UsageError, DataError):
        there = there or is_embedded(previous.config, previous.vectors)
    return not there, there


class Builder:
    """Make clusters in a thread, one build at a time.

    `build(generation, base)` makes the clusters of a generation from the model of `base`, and returns the figures of
    drift that it went by.
    """

    def __init__(self, workspace: Workspace, build: Callable[[int, int], dict[str, Any]]) -> None:
        self._workspace, self._build = workspace, build
        self._thread: threading.Thread | None = None

    def begin(self, generation: int, base: int) -> None:
        """Start a build unless one is under way or this one is over; resume one that an earlier call did not finish."""
        if self._thread is not None and self._thread.is_alive():
            return
        journal = self._journal(generation)
        if journal is None or not journal["done"]:
            self._start(*(self._unfinished(generation) or (generation, base)))

    def newest(self, before: int) -> tuple[int, dict[str, Any]] | None:
        """Return the latest generation below `before` whose clusters are whole, and the drift measured for them."""
        for generation in range(before - 1, 0, -1):
            if self._workspace.clusters(generation).manifest() is not None:
                journal = self._journal(generation)
                return generation, (journal or {}).get("drift", {})
        return None

    def finish(self, before: int) -> None:
        """Wait until no build is under way; `before`: the generation that follows the last one."""
        unfinished = self._unfinished(before)
        if self._thread is None and unfinished is not None:
            # The call that continues here had made all its rounds when it was cut off.
            self._start(*unfinished)
        if self._thread is not None:
            self._thread.join()

    def _start(self, generation: int, base: int) -> None:
        self._thread = threading.Thread(target=self._run, args=(generation, base), name="refresh-build", daemon=True)
        self._thread.start()

    def _run(self, generation: int, base: int) -> None:
        folder = self._workspace.refresh(generation)
        try:
            folder.write_json(BUILD, {"base": base, "done": False})
            folder.write_json(BUILD, {"base": base, "done": True, "drift": self._build(generation, base)})
        except Exception as error:
            # A killed build is resumed; a failed one is not tried again.
            folder.remove(BUILD)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            say(
                f"refresh   building generation {generation} failed ({lines[-1]}); training continues with the "
                "existing clusters",
                level="warning",
            )

    def _unfinished(self, before: int) -> tuple[int, int] | None:
        for generation in range(before - 1, 0, -1):
            journal = self._journal(generation)
            if journal is not None:
                return None if journal["done"] else (generation, int(journal["base"]))
        return None

    def _journal(self, generation: int) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self._workspace.refresh(generation).read_json(BUILD)
        except FileNotFoundError:
            return None
        return found

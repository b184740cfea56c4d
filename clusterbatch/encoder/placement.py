"""What workers that run the embedding model ask of the cluster."""

from __future__ import annotations

from clusterbatch.config import EmbedConfig
from clusterbatch.runtime import Pool
from clusterbatch.runtime.resources import gpus_for


def embedding_pool(settings: EmbedConfig) -> Pool:
    """Of the stage `embed`, and of every pass that embeds rows itself: a sample, or where vectors are not kept.

    Ray shows a worker the GPUs that it asked for and no others: one that asked for none could not embed on one.
    """
    gpus = gpus_for(settings.device, settings.workers, settings.gpus_per_worker)
    return Pool(settings.workers, settings.cpus_per_worker, gpus)

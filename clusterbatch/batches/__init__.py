"""Which rows stand together in a step: the batch plan (a pure function) and the loader that follows it."""

from clusterbatch.batches.loader import Composition, SliceBatch, SliceLoader
from clusterbatch.batches.plan import BatchPlan, GlobalBatch

__all__ = ["BatchPlan", "Composition", "GlobalBatch", "SliceBatch", "SliceLoader"]

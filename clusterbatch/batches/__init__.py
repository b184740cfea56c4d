"""Batch plan, a pure function from a step to its rows, and the loader that follows it."""

from clusterbatch.batches.loader import Composition, SliceBatch, SliceLoader
from clusterbatch.batches.plan import BatchPlan, GlobalBatch

__all__ = ["BatchPlan", "Composition", "GlobalBatch", "SliceBatch", "SliceLoader"]

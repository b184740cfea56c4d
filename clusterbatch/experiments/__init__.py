"""Experiments beside the pipeline: compare, predict, tune, capacity."""

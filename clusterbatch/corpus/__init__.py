"""Corpora in: readers, validation, the built-in sample, and the fixed units in which later stages read."""

"""Corpora in: readers, validation, deduplication, the held-out collection and the built-in sample."""

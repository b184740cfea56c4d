"""Retrieval quality: collections in BEIR layout, exact search, metrics."""

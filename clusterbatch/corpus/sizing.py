"""How an ingest is cut: decided by its input and configuration alone, never by the cluster it runs on."""

from __future__ import annotations

from clusterbatch.config import RunConfig

# About how many bytes of text a byte of input becomes.
_EXPANSION = 3
_MOST_BUCKETS = 8192
# Entries for near duplicates are a few kilobytes a pair.
_NEAR_BUCKETS = 4


def held_out_documents(config: RunConfig) -> int:
    """How many documents ingest holds out: none where the user has a test collection."""
    return 0 if config.evaluate.path else config.evaluate.holdout


def bucket_count(input_bytes: int, part_bytes: int) -> int:
    """Buckets of about one part each; decided by the input alone."""
    return min(_MOST_BUCKETS, max(1, -(-_EXPANSION * input_bytes // part_bytes)))


def near_bucket_count(buckets: int) -> int:
    """Buckets for the entries of near duplicates, of pairs that fill `buckets`."""
    return min(_MOST_BUCKETS, _NEAR_BUCKETS * buckets)

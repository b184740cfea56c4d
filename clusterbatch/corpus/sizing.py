"""How an ingest is cut: decided by its input and configuration alone, never by the cluster it runs on."""

from __future__ import annotations

from clusterbatch.config import RunConfig
from clusterbatch.corpus.sink import Sorting

# About how many bytes of text a byte of input becomes.
_EXPANSION = 3
_MOST_BUCKETS = 8192
# Entries for near duplicates are a few kilobytes a pair.
_NEAR_BUCKETS = 4
# Of pass 1. Each bucket is read from every part, so a large input is read in larger units, and written in larger parts.
_MOST_PARTS = 4096
# Bytes of rows that wait to be written. A worker holds them two to three times while it writes them: as they came, one
# after the other, and compressed. So at most it takes about 700 MiB, and of inputs beyond 340 GiB there are more parts.
_LEAST_WAITING, _MOST_WAITING = 32 * 2**20, 256 * 2**20


def held_out_documents(config: RunConfig) -> int:
    """How many documents ingest holds out: none where the user has a test collection."""
    return 0 if config.evaluate.path else config.evaluate.holdout


def bucket_count(input_bytes: int, part_bytes: int) -> int:
    """Buckets of about one part each; decided by the input alone."""
    return min(_MOST_BUCKETS, max(1, -(-_EXPANSION * input_bytes // part_bytes)))


def read_bytes(input_bytes: int, unit_bytes: int) -> int:
    """Bytes of input that a unit of pass 1 reads: `unit_bytes`, or more of a large input."""
    return max(unit_bytes, -(-input_bytes // _MOST_PARTS))


def flush_bytes(input_bytes: int) -> int:
    """Bytes of rows that a unit of pass 1 writes as one part: those of a large input's whole unit, as memory allows."""
    return min(_MOST_WAITING, max(_LEAST_WAITING, _EXPANSION * input_bytes // _MOST_PARTS))


def sorting(config: RunConfig, input_bytes: int, known_bytes: int | None) -> Sorting:
    """How pass 1 sorts its rows. known_bytes: of the input that a growing corpus was made of, None for a new one."""
    corpus = config.corpus
    buckets = bucket_count(input_bytes, corpus.part_bytes)
    # Pairs that are there already are compared as well.
    compared = buckets if known_bytes is None else buckets + bucket_count(known_bytes, corpus.part_bytes)
    return Sorting(
        buckets=buckets,
        # A growing corpus goes on holding out what it does.
        held_out=held_out_documents(config) if known_bytes is None else 0,
        near_threshold=corpus.near_threshold if corpus.near_duplicates == "set_aside" else None,
        near_buckets=min(_MOST_BUCKETS, _NEAR_BUCKETS * compared),
        hashes=known_bytes is not None,
        flush_bytes=flush_bytes(input_bytes),
        dropped=tuple(corpus.drop_sources),
    )

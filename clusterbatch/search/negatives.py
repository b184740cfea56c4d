"""Choice of a query's hard negatives among its nearest documents, added to those that the corpus has. Pure functions.

Legend: Q queries, K candidates each, best first.
"""

from __future__ import annotations

import math
from itertools import compress

import numpy as np
import pyarrow as pa

from clusterbatch.config.stages import MineConfig

MARGINS = "negative_margins"


def without_given(mined: pa.Table, rows: pa.Table) -> pa.Table:
    """`mined` without the negatives, and their margins, that its row of `rows` has already; both in one order.

    Mining leaves them out by the hashes of the corpus; those of an earlier version may follow other rules.
    """
    if "negatives" not in rows.column_names:
        return mined
    given, texts = rows["negatives"].to_pylist(), mined["negatives"].to_pylist()
    if not any(own and not set(own).isdisjoint(more) for own, more in zip(given, texts, strict=True)):
        return mined
    new = [[text not in (own or ()) for text in more] for own, more in zip(given, texts, strict=True)]
    for name in {"negatives", "margins"} & {*mined.column_names}:
        column, place = mined[name], mined.schema.get_field_index(name)
        kept = [list(compress(values, flags)) for values, flags in zip(column.to_pylist(), new, strict=True)]
        mined = mined.set_column(place, name, pa.array(kept, column.type))
    return mined


def with_negatives(rows: pa.Table, mined: pa.ChunkedArray) -> pa.Table:
    """`rows` with the lists of `mined` in column `negatives`, after the existing ones; lists and rows in one order."""
    if "negatives" not in rows.column_names:
        return rows.append_column("negatives", mined.cast(pa.list_(pa.string())))
    given = rows["negatives"].to_pylist()
    both = [(own or []) + (more or []) for own, more in zip(given, mined.to_pylist(), strict=True)]
    place = rows.schema.get_field_index("negatives")
    return rows.set_column(place, "negatives", pa.array(both, pa.list_(pa.string())))


def with_scores(rows: pa.Table) -> pa.Table:
    """`rows` with NaN for each missing score, of a pair or of one of its negatives, mined ones included."""
    if "score" in rows.column_names:
        place = rows.schema.get_field_index("score")
        rows = rows.set_column(place, "score", rows["score"].fill_null(math.nan))
    if "negative_scores" in rows.column_names:
        place = rows.schema.get_field_index("negative_scores")
        counts = rows["negatives"].combine_chunks().value_lengths().fill_null(0).to_pylist()
        scores = []
        for count, given in zip(counts, rows["negative_scores"].to_pylist(), strict=True):
            known = [math.nan if score is None else score for score in given or []]
            scores.append(known + [math.nan] * (count - len(known)))
        rows = rows.set_column(place, "negative_scores", pa.array(scores, pa.list_(pa.float32())))
    return rows


def with_margins(rows: pa.Table, mined: pa.ChunkedArray) -> pa.Table:
    """`rows`, before they got their mined negatives, with a column of margins for all that they will have then; NaN for
    those of the corpus, which nobody scored."""
    margins = mined.cast(pa.list_(pa.float32()))
    if "negatives" in rows.column_names:
        given = rows["negatives"].to_pylist()
        both = [[math.nan] * len(own or []) + more for own, more in zip(given, mined.to_pylist(), strict=True)]
        margins = pa.array(both, pa.list_(pa.float32()))
    return rows.append_column(MARGINS, margins)


# Pairs of a query's candidates that are compared at once, in a few arrays of a byte each.
_BLOCK_PAIRS = 2**24


def choose_negatives(scores: np.ndarray, positive: np.ndarray, draws: np.ndarray, config: MineConfig) -> np.ndarray:
    """(Q, config.negatives) int64 positions among the candidates, -1 if there are fewer.

    scores: (Q, K) float32, -inf where there is no candidate; positive: (Q,) score of the query's own document; draws:
    (Q, K) uniform in [0, 1), the random part of the choice.
    """
    rank = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    allowed = (rank >= config.first) & (rank < config.last) & np.isfinite(scores) & (scores <= _limit(positive, config))
    if config.pick == "hardest":
        key = rank.astype(float)
    elif config.pick == "random":
        key = draws
    else:
        key = _turn_in_bin(positive[:, None] - scores, draws, allowed, config.negatives) + draws
    key = np.where(allowed, key, np.inf)
    order = np.argsort(key, axis=1, kind="stable")[:, : config.negatives]
    chosen = np.where(np.isfinite(np.take_along_axis(key, order, 1)), order, -1)
    short = config.negatives - chosen.shape[1]
    return np.pad(chosen, ((0, 0), (0, short)), constant_values=-1) if short > 0 else chosen


def _limit(positive: np.ndarray, config: MineConfig) -> np.ndarray:
    """(Q, 1) the highest score that a negative may have."""
    limit = np.full(len(positive), np.inf)
    if config.most_of_positive is not None:
        # Of a positive below zero a share would be above it.
        limit = np.minimum(limit, np.where(positive > 0, config.most_of_positive * positive, positive))
    if config.margin is not None:
        limit = np.minimum(limit, positive - config.margin)
    return limit[:, None]


def _turn_in_bin(margins: np.ndarray, draws: np.ndarray, allowed: np.ndarray, bins: int) -> np.ndarray:
    """(Q, K) how many allowed candidates of the same bin have a smaller draw: one of each bin is then taken first.

    A query's margins are cut into bins of equal width between its smallest and its largest.
    """
    low = np.where(allowed, margins, np.inf).min(axis=1, keepdims=True)
    high = np.where(allowed, margins, -np.inf).max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        place = np.nan_to_num((margins - low) / np.maximum(high - low, 1e-9) * bins, posinf=0, neginf=0)
    bin_of = np.clip(place.astype(np.int64), 0, bins - 1)
    turn = np.empty(margins.shape, np.int64)
    queries = max(1, _BLOCK_PAIRS // margins.shape[1] ** 2)
    for start in range(0, len(margins), queries):
        block = slice(start, start + queries)
        bins_QK, draws_QK = bin_of[block], draws[block]
        earlier = (bins_QK[:, :, None] == bins_QK[:, None, :]) & allowed[block, None, :]
        earlier &= draws_QK[:, None, :] < draws_QK[:, :, None]
        turn[block] = earlier.sum(axis=2)
    return turn

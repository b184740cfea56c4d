"""A fast trainer of mean-pooled token embeddings on one core, for studies of hundreds of small runs.

The same loss, duplicate mask, clipping, AdamW and learning rates as clusterbatch.training; its other masks are given
(grid_masks.py). A step of 32 pairs takes a millisecond or two, for it is one compiled function without graph, loader or
log. The moves of a row between two batches that need it are made up for at once, as in training.lazy_rows, with one
denominator for all of them (test_static_trainer.py compares the weights with those of clusterbatch.training).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from clusterbatch.encoder.tokens import Tokens
from clusterbatch.training.lazy_rows import BETA1, BETA2, EPSILON
from clusterbatch.training.optimizer import learning_rate_factor

# A tenth of the momentum goes with every step: later ones move nothing that a float32 would show.
_TERMS = 100


@dataclass(frozen=True)
class Pairs:
    """N training pairs. Hashes: (N,) uint64 of the texts; vectors: (N, M) float32 unit vectors of the surrogate."""

    query: Tokens
    document: Tokens
    query_hash: np.ndarray
    document_hash: np.ndarray
    query_vector: np.ndarray
    document_vector: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A corpus of the study: N pairs to train on, and a search collection of Q held-out queries.

    source: (N,) names; documents: tokens of the P documents to search; relevant: (Q,) arrays of their numbers.
    """

    name: str
    pairs: Pairs
    source: np.ndarray
    queries: Tokens
    documents: Tokens
    relevant: list[np.ndarray]


@dataclass(frozen=True)
class Mask:
    """Documents that a query's loss leaves out, by the surrogate's cosines, in ways that the package does not know.

    copies: those whose cosine with the query's own document is at least this; nearest: how many of the highest scored
    ones of the batch, beside its own.
    """

    copies: float = 2.0
    nearest: int = 0


def rates_of(peak: float, steps: int, warmup: float = 0.1) -> np.ndarray:
    """Return the learning rate of each step: risen over a tenth of the steps, then falling to zero."""
    factors = [learning_rate_factor("linear", step, steps, warmup, 0.2) for step in range(steps)]
    return peak * np.array(factors)


def train(
    table: np.ndarray,
    pairs: Pairs,
    batches: np.ndarray,
    rates: np.ndarray,
    *,
    temperature: float = 0.05,
    mask: Mask | None = None,
    kept: np.ndarray | None = None,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (V, D) trained token embeddings and (steps,) losses; table: those to begin with, which stay.

    batches: (steps, B) rows of `pairs`; rates: (steps,) learning rates; kept: (steps, B, B) bool, the documents that
    are negatives of each query (grid_masks), None: all but those of rows with the same query or document.
    """
    mask = mask or Mask()
    table = np.array(table, np.float32)
    uses_vectors = mask != Mask()
    vectors = (pairs.query_vector, pairs.document_vector) if uses_vectors else (np.zeros((1, 1), np.float32),) * 2
    losses = _train(
        table,
        pairs.query.values.astype(np.int32),
        pairs.query.offsets,
        pairs.document.values.astype(np.int32),
        pairs.document.offsets,
        pairs.query_hash,
        pairs.document_hash,
        *vectors,
        np.ascontiguousarray(batches, np.int64),
        rates,
        temperature,
        kept is not None,
        np.zeros((1, 1, 1), np.bool_) if kept is None else kept,
        uses_vectors,
        mask.copies,
        mask.nearest,
        weight_decay,
        clip_norm,
    )
    return table, losses


def encode(table: np.ndarray, tokens: Tokens) -> np.ndarray:
    """Return (N, D) float32 unit vectors: means of token embeddings."""
    return _encode(table, tokens.values.astype(np.int32), tokens.offsets)


@njit(fastmath=True, cache=True)
def _encode(table, values, offsets):
    count, size = len(offsets) - 1, table.shape[1]
    found = np.zeros((count, size), np.float32)
    for row in range(count):
        for place in range(offsets[row], offsets[row + 1]):
            token = values[place]
            for k in range(size):
                found[row, k] += table[token, k]
        norm = np.float32(0.0)
        for k in range(size):
            norm += found[row, k] * found[row, k]
        norm = np.sqrt(norm)
        if norm > 0:
            for k in range(size):
                found[row, k] /= norm
    return found


@njit(fastmath=True, cache=True)
def _pool(table, values, offsets, rows, found, norms):
    """Write unit vectors of `rows` to found (B, D), and norms of the means to norms (B,)."""
    size = table.shape[1]
    for number in range(len(rows)):
        first, last = offsets[rows[number]], offsets[rows[number] + 1]
        for k in range(size):
            found[number, k] = 0
        for place in range(first, last):
            token = values[place]
            for k in range(size):
                found[number, k] += table[token, k]
        norm = np.float32(0.0)
        share = np.float32(1.0) / np.float32(max(1, last - first))
        for k in range(size):
            found[number, k] *= share
            norm += found[number, k] * found[number, k]
        norm = np.sqrt(norm)
        norms[number] = norm
        if norm > 0:
            for k in range(size):
                found[number, k] /= norm


@njit(fastmath=True, cache=True)
def _scatter(gradient, values, offsets, rows, found, norms, pull):
    """Add to gradient (V, D) what pull (B, D), the gradient of the unit vectors, means for the tokens."""
    size = gradient.shape[1]
    own = np.empty(size, np.float32)
    for number in range(len(rows)):
        first, last = offsets[rows[number]], offsets[rows[number] + 1]
        if norms[number] <= 0:
            continue
        along = np.float32(0.0)
        for k in range(size):
            along += pull[number, k] * found[number, k]
        share = np.float32(1.0) / (norms[number] * np.float32(last - first))
        for k in range(size):
            own[k] = (pull[number, k] - along * found[number, k]) * share
        for place in range(first, last):
            token = values[place]
            for k in range(size):
                gradient[token, k] += own[k]


@njit(fastmath=True, cache=True)
def _catch_up(table, first, second, token, updated, step, rates, log_decay, weight_decay):
    """Bring a row that has seen `updated` steps to the state after `step` steps."""
    gap = step - updated
    if gap <= 0:
        return
    moved = 0.0
    fading = 1.0
    for ahead in range(1, min(gap, _TERMS) + 1):
        # The step's number from 1, as Adam's correction counts it.
        number = updated + ahead
        fading *= BETA1 / np.sqrt(BETA2)
        corrected = np.sqrt(1 - BETA2**number) / (1 - BETA1**number)
        decay = np.exp(log_decay[step] - log_decay[number])
        moved += decay * rates[number - 1] * corrected * fading
    decay = np.float32(np.exp(log_decay[step] - log_decay[updated]))
    move = np.float32(moved)
    fade1, fade2 = np.float32(BETA1**gap), np.float32(BETA2**gap)
    small = np.float32(EPSILON)
    for k in range(table.shape[1]):
        table[token, k] = decay * table[token, k] - move * first[token, k] / (np.sqrt(second[token, k]) + small)
        first[token, k] *= fade1
        second[token, k] *= fade2


@njit(fastmath=True, cache=True)
def _train(
    table,
    query_values,
    query_offsets,
    document_values,
    document_offsets,
    query_hash,
    document_hash,
    query_vector,
    document_vector,
    batches,
    rates,
    temperature,
    uses_kept,
    kept_of_step,
    uses_vectors,
    copies,
    nearest,
    weight_decay,
    clip_norm,
):
    steps, batch = batches.shape
    tokens, size = table.shape
    first, second = np.zeros_like(table), np.zeros_like(table)
    gradient = np.zeros_like(table)
    updated = np.zeros(tokens, np.int64)
    seen_in = np.full(tokens, -1, np.int64)
    touched = np.empty(tokens, np.int64)
    log_decay = np.zeros(steps + 1)
    for step in range(steps):
        log_decay[step + 1] = log_decay[step] + np.log1p(-rates[step] * weight_decay)
    query, document = np.empty((batch, size), np.float32), np.empty((batch, size), np.float32)
    query_norm, document_norm = np.empty(batch, np.float32), np.empty(batch, np.float32)
    losses = np.zeros(steps)
    kept = np.empty((batch, batch), np.bool_)
    scale = np.float32(1.0 / temperature)
    for step in range(steps):
        rows = batches[step]
        count = 0
        for side in range(2):
            values, offsets = (query_values, query_offsets) if side == 0 else (document_values, document_offsets)
            for row in rows:
                for place in range(offsets[row], offsets[row + 1]):
                    token = values[place]
                    if seen_in[token] != step:
                        seen_in[token] = step
                        touched[count] = token
                        count += 1
        for number in range(count):
            token = touched[number]
            _catch_up(table, first, second, token, updated[token], step, rates, log_decay, weight_decay)
            updated[token] = step
        _pool(table, query_values, query_offsets, rows, query, query_norm)
        _pool(table, document_values, document_offsets, rows, document, document_norm)
        scores = np.dot(query, document.T) * scale
        if uses_vectors:
            own_query, own_document = query_vector[rows], document_vector[rows]
            cosine = np.dot(own_query, own_document.T)
            alike = np.dot(own_document, own_document.T)
        for i in range(batch):
            for j in range(batch):
                same = document_hash[rows[i]] == document_hash[rows[j]] or query_hash[rows[i]] == query_hash[rows[j]]
                kept[i, j] = kept_of_step[step, i, j] if uses_kept else i != j and not same
                if uses_vectors and alike[i, j] >= copies:
                    kept[i, j] = False
            # A text that another row gives as an answer to the query is none of its negatives, whichever row has it.
            for k in range(batch):
                if not uses_kept and k != i and query_hash[rows[k]] == query_hash[rows[i]]:
                    for j in range(batch):
                        if document_hash[rows[j]] == document_hash[rows[k]]:
                            kept[i, j] = False
            if uses_vectors and nearest > 0:
                for _ in range(nearest):
                    best = -1
                    for j in range(batch):
                        if kept[i, j] and (best < 0 or cosine[i, j] > cosine[i, best]):
                            best = j
                    if best >= 0:
                        kept[i, best] = False
        loss = 0.0
        pull = np.zeros((batch, batch), np.float32)
        for i in range(batch):
            highest = scores[i, i]
            for j in range(batch):
                if kept[i, j] and scores[i, j] > highest:
                    highest = scores[i, j]
            total = np.exp(scores[i, i] - highest)
            negatives = np.float32(0.0)
            for j in range(batch):
                if kept[i, j]:
                    pull[i, j] = np.exp(scores[i, j] - highest)
                    negatives += pull[i, j]
            total += negatives
            loss += np.log(total) + highest - scores[i, i]
            part = scale / (total * np.float32(batch))
            for j in range(batch):
                pull[i, j] *= part
            pull[i, i] = -negatives * part
        losses[step] = loss / batch
        query_pull = np.dot(pull, document)
        document_pull = np.dot(pull.T, query)
        _scatter(gradient, query_values, query_offsets, rows, query, query_norm, query_pull)
        _scatter(gradient, document_values, document_offsets, rows, document, document_norm, document_pull)
        square = 0.0
        for number in range(count):
            token = touched[number]
            part_square = np.float32(0.0)
            for k in range(size):
                part_square += gradient[token, k] * gradient[token, k]
            square += part_square
        norm = np.sqrt(square)
        clip = np.float32(min(1.0, clip_norm / (norm + 1e-6)))
        rate = rates[step]
        corrected = np.float32(rate * np.sqrt(1 - BETA2 ** (step + 1)) / (1 - BETA1 ** (step + 1)))
        small = np.float32(EPSILON * np.sqrt(1 - BETA2 ** (step + 1)))
        decay = np.float32(1 - rate * weight_decay)
        b1, b2 = np.float32(BETA1), np.float32(BETA2)
        rest1, rest2 = np.float32(1 - BETA1), np.float32(1 - BETA2)
        for number in range(count):
            token = touched[number]
            for k in range(size):
                slope = gradient[token, k] * clip
                one = b1 * first[token, k] + rest1 * slope
                two = b2 * second[token, k] + rest2 * slope * slope
                first[token, k] = one
                second[token, k] = two
                table[token, k] = decay * table[token, k] - corrected * one / (np.sqrt(two) + small)
                gradient[token, k] = 0
            updated[token] = step + 1
    for token in range(tokens):
        _catch_up(table, first, second, token, updated[token], steps, rates, log_decay, weight_decay)
    return losses

"""The relation of a batch: for each (query, document), positive, negative or ignored.

Batches of similar rows put likely false negatives side by side: the same document under two queries, a second good
answer. Ignored pairs take no part in the loss, in either direction. Rules, each on its own switch (MaskConfig):

duplicates   same normalised query text or same normalised document text, by hash (never by equal vectors: dropout makes
             those differ); and texts that another row of the batch gives as the answer to the same query
same document
             rows that are parts of one document, if the corpus says so; and texts that another row of the batch gives
             as a part of it
semantic duplicates
             rows that the surrogate scores nearly equal, if they were looked for when the data was clustered
surrogate    pairs that the embedding model that clustered the data scores above the pair's own positive, plus a margin
             (absolute) or times one (relative); NV-Retriever's "positive-aware" mining as a mask
teacher      the same with the scores of a teacher (teacher.py), of the documents that it has scored for the query; or
             the best ranks of these
own score    the same with the scores of the model in training (Qwen3-Embedding: margin 0.1)

The first two and the last two of these apply to hard negatives. Their vectors by the surrogate are not kept; likely
answers are left out when they are mined (mine.most_of_positive, mine.margin).

Legend: Q rows of queries in hand, D document columns in hand, B pairs of the global batch, N hard negatives of the
global batch, M dimensions of the surrogate's stored vectors. Documents are the B pairs' documents in global order, then
the N hard negatives in global order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clusterbatch.batches.negatives import HARD, IN_BATCH
from clusterbatch.config import MaskConfig

# ABSENT: no candidate of this row at all, by `train.negatives`.
NEGATIVE, POSITIVE, IGNORED, ABSENT = 0, 1, 2, 3


@dataclass(frozen=True)
class BatchFacts:
    """Facts about every row of the global batch that decide the relation; the same on all ranks.

    Hashes are int64 (the bits of unsigned hashes). Vectors are unit-norm, any floating dtype.
    """

    query_hash: Tensor  # (B,)
    document_hash: Tensor  # (B,)
    negative_hash: Tensor | None = None  # (N,), comparable with `document_token_hash`
    document_token_hash: Tensor | None = None  # (B,), present if negatives are
    query_vector: Tensor | None = None  # (B, M)
    document_vector: Tensor | None = None  # (B, M)
    document_id: Tensor | None = None  # (B,), of the documents that the rows are parts of
    # Two (S,): rows and columns within [0, B + N) of the pairs that the teacher takes for answers.
    answers: tuple[Tensor, Tensor] | None = None
    duplicate_group: Tensor | None = None  # (B,), equal in semantic duplicates
    mode: Tensor | None = None  # (B,), batches.negatives.BOTH, IN_BATCH or HARD; None: all rows have both
    negative_row: Tensor | None = None  # (N,), the row that each hard negative belongs to, present if `mode` is

    @property
    def pairs(self) -> int:
        return len(self.query_hash)


class Relation:
    """Relation of any block of queries and documents of one batch.

    Blocks are asked for one at a time, so nothing of size B x B is ever held. `own_scores` (B,) are the model's own
    cosines of each query with its own document, for the mask by the model's own score.
    """

    def __init__(self, config: MaskConfig, facts: BatchFacts, own_scores: Tensor | None = None) -> None:
        self._config = config
        self._facts = facts
        self._own_scores = own_scores
        self._surrogate_limit: Tensor | None = None
        if config.surrogate_margin is not None:
            assert facts.query_vector is not None
            assert facts.document_vector is not None
            self._query_vector = facts.query_vector.float()
            self._document_vector = facts.document_vector.float()
            positive = (self._query_vector * self._document_vector).sum(1)
            self._surrogate_limit = limit(positive, config.surrogate_margin, config.surrogate_relative)

    def block(self, queries: slice, documents: slice, scores_QD: Tensor) -> Tensor:
        """Return (Q, D) int8 of NEGATIVE, POSITIVE, IGNORED.

        queries: rows within [0, B); documents: columns, either within the pairs [0, B) or within the hard negatives
        [B, B + N). scores_QD: the model's own cosines of the block, without gradient.
        """
        facts, pairs = self._facts, self._facts.pairs
        device = scores_QD.device
        query_hash = facts.query_hash[queries]
        if documents.start >= pairs:
            return self._negatives_block(queries, slice(documents.start - pairs, documents.stop - pairs), scores_QD)
        same_query = query_hash[:, None] == facts.query_hash[documents][None, :]
        row = torch.arange(queries.start, queries.stop, device=device)
        column = torch.arange(documents.start, documents.stop, device=device)
        own = row[:, None] == column[None, :]
        positive = own | same_query if self._config.same_query_is_positive else own
        ignored = self._above_own_score(queries, scores_QD)
        if self._config.duplicates:
            ignored |= same_query
            ignored |= facts.document_hash[queries][:, None] == facts.document_hash[documents][None, :]
        ignored |= self._of_one_key(queries, documents)
        for texts in self._texts_of_pairs:
            texts.add_(ignored, queries, documents)
        if self._surrogate_limit is not None:
            surrogate_QD = self._query_vector[queries] @ self._document_vector[documents].T
            ignored |= surrogate_QD > self._surrogate_limit[queries][:, None]
        self._add_answers(ignored, queries, documents)
        return ignored.to(torch.int8).mul_(IGNORED).masked_fill_(positive, POSITIVE)

    def queries_block(self, queries: slice, others: slice, scores_QQ: Tensor) -> Tensor:
        """Return (Q, Q') int8: other queries as negatives of a query, except itself and its duplicates."""
        facts, device = self._facts, scores_QQ.device
        row = torch.arange(queries.start, queries.stop, device=device)
        column = torch.arange(others.start, others.stop, device=device)
        ignored = self._above_own_score(queries, scores_QQ)
        ignored |= row[:, None] == column[None, :]
        if self._config.duplicates:
            ignored |= facts.query_hash[queries][:, None] == facts.query_hash[others][None, :]
            ignored |= facts.document_hash[queries][:, None] == facts.document_hash[others][None, :]
        ignored |= self._of_one_key(queries, others)
        for texts in self._texts_of_queries:
            texts.add_(ignored, queries, others)
        if self._surrogate_limit is not None:
            surrogate_QQ = self._query_vector[queries] @ self._query_vector[others].T
            ignored |= surrogate_QQ > self._surrogate_limit[queries][:, None]
        return ignored.to(torch.int8).mul_(IGNORED)

    def restrict_(self, rows: slice, block_QD: Tensor, hard: slice) -> Tensor:
        """Mark what `train.negatives` leaves out for these rows as ABSENT, in place, and return the block.

        block_QD: (Q, D) int8, the relation of loss rows (queries, or documents if the roles are exchanged) with their
        candidates; hard: the columns among them that are hard negatives, all N of the batch or none.
        """
        facts = self._facts
        if facts.mode is None:
            return block_QD
        mode_Q = facts.mode[rows, None]
        absent_QD = (mode_Q == HARD).expand(block_QD.shape).clone()
        if hard.start < hard.stop:
            assert facts.negative_row is not None
            row = torch.arange(rows.start, rows.stop, device=block_QD.device)
            others_QN = row[:, None] != facts.negative_row[None, :]
            absent_QD[:, hard] = (mode_Q == IN_BATCH) | ((mode_Q == HARD) & others_QN)
        return block_QD.masked_fill_(absent_QD & (block_QD != POSITIVE), ABSENT)

    def _negatives_block(self, queries: slice, negatives: slice, scores_QD: Tensor) -> Tensor:
        facts = self._facts
        ignored = self._above_own_score(queries, scores_QD)
        if self._config.duplicates:
            assert facts.negative_hash is not None
            assert facts.document_token_hash is not None
            # A negative of one row may be the very document of another; its text is known by its token ids only.
            ignored |= facts.document_token_hash[queries][:, None] == facts.negative_hash[negatives][None, :]
        for texts in self._texts_of_negatives:
            texts.add_(ignored, queries, negatives)
        self._add_answers(ignored, queries, slice(negatives.start + facts.pairs, negatives.stop + facts.pairs))
        return ignored.to(torch.int8).mul_(IGNORED)

    def _of_one_key(self, queries: slice, others: slice) -> Tensor | bool:
        """Return (Q, D) bool: rows of one document, or semantic duplicates; False if neither is known or masked."""
        config, facts = self._config, self._facts
        found: Tensor | bool = False
        for is_on, key in (
            (config.same_document, facts.document_id),
            (config.semantic_duplicates, facts.duplicate_group),
        ):
            if is_on and key is not None:
                found = found | (key[queries][:, None] == key[others][None, :])
        return found

    @property
    def _keys(self) -> list[Tensor]:
        """Hashes that rows may share, so that the text of one is no negative of another: (B,) each."""
        keys = [self._facts.query_hash] if self._config.duplicates else []
        if self._config.same_document and self._facts.document_id is not None:
            keys.append(self._facts.document_id)
        return keys

    @cached_property
    def _texts_of_pairs(self) -> list[_TextsOfKey]:
        document = self._facts.document_hash
        return [_TextsOfKey(key, document, document) for key in self._keys]

    @cached_property
    def _texts_of_queries(self) -> list[_TextsOfKey]:
        facts = self._facts
        # Queries ask the same if they have an answer in common, whichever of their rows are compared.
        more = [_TextsOfKey(facts.document_hash, facts.query_hash, facts.query_hash)] if self._config.duplicates else []
        return self._texts_of_pairs + more

    @cached_property
    def _texts_of_negatives(self) -> list[_TextsOfKey]:
        facts = self._facts
        assert facts.negative_hash is not None
        assert facts.document_token_hash is not None
        return [_TextsOfKey(key, facts.document_token_hash, facts.negative_hash) for key in self._keys]

    def _add_answers(self, ignored_QD: Tensor, queries: slice, columns: slice) -> None:
        """Set what the teacher takes for an answer in a block of all columns."""
        if self._facts.answers is None:
            return
        facts, (row, column) = self._facts, self._facts.answers
        negatives = 0 if facts.negative_hash is None else len(facts.negative_hash)
        if ignored_QD.shape != (facts.pairs, facts.pairs + negatives):
            here = (row >= queries.start) & (row < queries.stop) & (column >= columns.start) & (column < columns.stop)
            row, column = row[here] - queries.start, column[here] - columns.start
        ignored_QD[row, column] = True

    def _above_own_score(self, queries: slice, scores: Tensor) -> Tensor:
        if self._config.own_score_margin is None:
            return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        assert self._own_scores is not None
        return scores > self._own_scores[queries][:, None] + self._config.own_score_margin


class _TextsOfKey:
    """Texts that rows with the same key have in the batch, found again in columns that do not have the key.

    key: (B,) of the rows; text: (B,) hashes of the rows' texts; columns: (D,) hashes of the columns' texts, comparable.
    """

    def __init__(self, key: Tensor, text: Tensor, columns: Tensor) -> None:
        self._key = key
        self._rows = _telling_rows(key, text, columns)
        texts, self._text = text[self._rows].unique(return_inverse=True)
        self._texts = len(texts)
        if self._texts:
            place = torch.searchsorted(texts, columns).clamp_(max=self._texts - 1)
            # One more column than there are texts, for those that have none of them.
            self._column = place.masked_fill_(texts[place] != columns, self._texts)

    def add_(self, ignored_QD: Tensor, queries: slice, columns: slice) -> None:
        """Set, in a block, the columns with a text that a row with the query's key has."""
        if not self._texts:
            return
        same_QR = (self._key[queries][:, None] == self._key[self._rows][None, :]).to(torch.uint8)
        has_QT = same_QR.new_zeros(len(same_QR), self._texts + 1)
        has_QT.scatter_reduce_(1, self._text.expand_as(same_QR), same_QR, "amax")
        ignored_QD |= has_QT[:, self._column[columns]].bool()


def _telling_rows(key: Tensor, text: Tensor, columns: Tensor) -> Tensor:
    """Return the rows whose key other rows have, and whose text other columns, (n,) int64; of `_TextsOfKey`."""
    texts, place = text.unique(return_inverse=True)
    among_themselves = columns is text
    if among_themselves and len(texts) == len(text):
        return place[:0]
    _, number, count = key.unique(return_inverse=True, return_counts=True)
    if among_themselves:
        # Where a text always comes with one key, comparing keys is enough.
        least, most = (
            number.new_zeros(len(texts)).scatter_reduce_(0, place, number, way, include_self=False)
            for way in ("amin", "amax")
        )
        is_told = least != most
    else:
        is_told = torch.isin(texts, columns)
    return ((count[number] > 1) & is_told[place]).nonzero().squeeze(1)


def limit(positive: Tensor, margin: float, relative: bool) -> Tensor:
    """Return the score above which a document is a likely false negative, from the positives' scores (B,).

    Absolute: positive + margin. Relative: positive * (1 + margin), written with |positive| so that a positive margin
    raises the limit for negative cosines too.
    """
    return positive + margin * positive.abs() if relative else positive + margin

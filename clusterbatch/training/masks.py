"""The relation of a batch: for each (query, document), positive, negative or ignored.

Batches of similar rows put likely false negatives side by side: the same document under two queries, a second good
answer. Ignored pairs take no part in the loss, in either direction. Rules, each on its own switch (MaskConfig):

duplicates   same normalised query text or same normalised document text, by hash (never by equal vectors: dropout makes
             those differ)
same document
             rows that are parts of one document, if the corpus says so
semantic duplicates
             rows that the surrogate scores nearly equal, if they were looked for when the data was clustered
surrogate    pairs that the embedding model that clustered the data scores above the pair's own positive, plus a margin
             (absolute) or times one (relative); NV-Retriever's "positive-aware" mining as a mask
teacher      the same with the scores of a teacher (teacher.py), of the documents that it has scored for the query; or
             the best ranks of these
own score    the same with the scores of the model in training (Qwen3-Embedding: margin 0.1)

The first and the last two of these apply to hard negatives. Their vectors by the surrogate are not kept; likely answers
are left out when they are mined (mine.most_of_positive, mine.margin).

Legend: Q rows of queries in hand, D document columns in hand, B pairs of the global batch, N hard negatives of the
global batch, M dimensions of the surrogate's stored vectors. Documents are the B pairs' documents in global order, then
the N hard negatives in global order.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        if facts.negative_hash is not None:
            # Rows whose query is in the batch more than once.
            _, number, count = facts.query_hash.unique(return_inverse=True, return_counts=True)
            self._repeated = (count[number] > 1).nonzero().squeeze(1)
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
            negative_hash = facts.negative_hash[negatives]
            ignored |= facts.document_token_hash[queries][:, None] == negative_hash[None, :]
            # Or the document of another row that asks the same: few rows do, so the product is small.
            asking = self._repeated[(self._repeated >= queries.start) & (self._repeated < queries.stop)]
            if len(asking):
                same_query = facts.query_hash[asking][:, None] == facts.query_hash[self._repeated][None, :]
                is_answer = facts.document_token_hash[self._repeated][:, None] == negative_hash[None, :]
                ignored[asking - queries.start] |= (same_query.float() @ is_answer.float()) > 0
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


def limit(positive: Tensor, margin: float, relative: bool) -> Tensor:
    """Return the score above which a document is a likely false negative, from the positives' scores (B,).

    Absolute: positive + margin. Relative: positive * (1 + margin), written with |positive| so that a positive margin
    raises the limit for negative cosines too.
    """
    return positive + margin * positive.abs() if relative else positive + margin

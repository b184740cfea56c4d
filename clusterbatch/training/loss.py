"""InfoNCE over a relation mask, in row chunks: the scores of a batch of 32,768 never exist at once.

For a query i with positives P_i and kept negatives N_i, scale 1 / temperature and cosines s:

    l_i = mean over p in P_i of  -log( exp(scale s_ip) / (exp(scale s_ip) + sum over n in N_i of exp(scale s_in)) )

Each positive competes with the negatives only, not with other positives; with one positive this is plain InfoNCE (van
den Oord 2018). The batch's loss is sum_i w_i l_i / sum_i w_i over the GLOBAL batch; each rank computes the part of its
own rows, so the ranks' losses and gradients add up to the whole.

Directions: `query_to_document` always; `document_to_query` adds the same loss with the roles exchanged (the mean of the
two is taken); `query_to_query` lets the other queries of the batch stand among the negatives of a query (GTE, Li 2023).

With `train.margin_mse` the Margin-MSE of the mined negatives is added, times that weight (margin_mse.py); or, if a
teacher has scored the data, of all documents of the batch that it has scored for the query. `train.teacher_kl` adds the
distillation from these scores (teacher.py).

Legend: Q this rank's rows of a chunk, D columns of all ranks, E embedding dimensions, B pairs of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from clusterbatch.config import TrainConfig
from clusterbatch.config.training import LEAST_LEARNED_TEMPERATURE
from clusterbatch.training.collectives import GatheredBatch
from clusterbatch.training.margin_mse import margin_mse
from clusterbatch.training.masks import IGNORED, NEGATIVE, POSITIVE, Relation
from clusterbatch.training.teacher import distillation

# Elements of the score block that is in memory at a time: 32 MiB in float32, a few times that with its gradient.
_BLOCK_ELEMENTS = 2**23
_LARGEST_LOG_SCALE = math.log(1 / LEAST_LEARNED_TEMPERATURE)
# Torch takes softplus(x) = x from 20 on, which costs digits; e^50 is far from float32's limit.
_SOFTPLUS_LINEAR = 50.0

# (first row, end row, cosines (Q, D)) -> relation (Q, D); rows count from 0 in this rank's slice.
RelationOfRows = Callable[[int, int, Tensor], Tensor]


@dataclass(frozen=True)
class LossStatistics:
    """Sums over this rank's rows, query to document, full dimensions: add them over ranks, then divide."""

    rows: Tensor
    correct: Tensor  # rows whose positive scores above every kept negative
    hardest: Tensor  # sum of the cosines of the hardest kept negative
    ignored: Tensor  # (query, document) pairs left out
    considered: Tensor  # candidates that are not positive

    def stack(self) -> Tensor:
        return torch.stack([self.rows, self.correct, self.hardest, self.ignored, self.considered])


class _Vectors(NamedTuple):
    """Unit vectors of this rank's rows (Q, E), and the gathered ones of all ranks (B, E) and (D, E)."""

    query_QE: Tensor
    document_QE: Tensor
    query_BE: Tensor | None
    document_DE: Tensor

    def truncated(self, size: int) -> _Vectors:
        query_BE = None if self.query_BE is None else _truncated(self.query_BE, size)
        return _Vectors(
            _truncated(self.query_QE, size),
            _truncated(self.document_QE, size),
            query_BE,
            _truncated(self.document_DE, size),
        )


class ContrastiveLoss(nn.Module):
    """The loss of a global batch, seen from one rank. Holds the temperature, which may be learned."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self._config = config
        log_scale = torch.tensor(1.0 / config.temperature).log()
        self.log_scale = nn.Parameter(log_scale, requires_grad=config.learn_temperature)

    @property
    def temperature(self) -> float:
        return 1.0 / float(self._scale().detach())

    def _scale(self) -> Tensor:
        return self.log_scale.exp()

    def limit_temperature_(self) -> None:
        """Keep a learned temperature within its limit; call after every optimizer step.

        A limit inside the loss would have no gradient beyond it, so a temperature that once was there could not return.
        """
        if self.log_scale.requires_grad:
            self.log_scale.data.clamp_(max=_LARGEST_LOG_SCALE)

    def forward(
        self, query_QE: Tensor, document_QE: Tensor, negative_NE: Tensor | None, batch: GatheredBatch
    ) -> tuple[Tensor, LossStatistics]:
        """Return this rank's part of the loss (a scalar; the sum over ranks is the global loss) and its statistics.

        query_QE, document_QE: this rank's rows, unit-norm, (rows_of_rank[rank], E); negative_NE: this rank's hard
        negatives, (negatives_of_rank[rank], E), or None if the data has none.
        """
        # One gather for all: documents, hard negatives, and queries if some direction needs them.
        gather = batch.world.gather_differentiable
        query_BE = gather(query_QE, batch.rows_of_rank) if self._needs_all_queries else None
        document_DE = gather(document_QE, batch.rows_of_rank)
        if negative_NE is not None:
            document_DE = torch.cat([document_DE, gather(negative_NE, batch.negatives_of_rank)])
        vectors = _Vectors(query_QE, document_QE, query_BE, document_DE)
        weight_B = _normalised_weights(batch.weight_B, batch.facts.pairs, query_QE)
        weight_Q = weight_B.narrow(0, batch.own.start, len(query_QE))

        loss = query_QE.new_zeros(())
        statistics: LossStatistics | None = None
        dimensions = self._config.matryoshka or [query_QE.shape[1]]
        for size in sorted(dimensions, reverse=True):
            part, found = self._one_size(vectors.truncated(size), batch, weight_Q)
            loss = loss + part / len(dimensions)
            statistics = statistics or found
        assert statistics is not None
        if batch.margins is not None:
            assert negative_NE is not None
            temperature = self._config.temperature
            distilled = margin_mse(query_QE, document_QE, negative_NE, batch.margins, weight_Q, temperature)
            loss = loss + self._config.margin_mse * distilled
        return loss + self._distilled(vectors, batch, weight_Q), statistics

    def _distilled(self, vectors: _Vectors, batch: GatheredBatch, weight_Q: Tensor) -> Tensor | float:
        """Return the losses against the teacher's scores, times their weights."""
        config, teacher = self._config, batch.scored
        if teacher is None:
            return 0.0
        query_QE, document_QE, _, column_DE = vectors
        loss: Tensor | float = 0.0
        if config.margin_mse:
            margins, column = teacher.margins(config.teacher_scale)
            found = margin_mse(query_QE, document_QE, column_DE[column], margins, weight_Q, config.temperature)
            loss = loss + config.margin_mse * found
        if config.teacher_kl:
            scale = config.teacher_scale
            found = distillation(query_QE, document_QE, column_DE, teacher, weight_Q, config.temperature, scale)
            loss = loss + config.teacher_kl * found
        return loss

    @property
    def _needs_all_queries(self) -> bool:
        return len(self._config.directions) > 1

    def _one_size(self, vectors: _Vectors, batch: GatheredBatch, weight_Q: Tensor) -> tuple[Tensor, LossStatistics]:
        query_QE, document_QE, query_BE, document_DE = vectors
        directions, facts, own = self._config.directions, batch.facts, batch.own
        pairs = facts.pairs
        own_scores = None
        if self._config.mask.own_score_margin is not None:
            own_scores = batch.world.gather((query_QE * document_QE).sum(1).detach(), batch.rows_of_rank)
        relation = Relation(self._config.mask, facts, own_scores)
        scale, columns = self._scale(), document_DE
        with_queries = "query_to_query" in directions
        if with_queries:
            assert query_BE is not None
            columns = torch.cat([document_DE, query_BE])
        documents = len(document_DE)

        def of_queries(start: int, end: int, scores: Tensor) -> Tensor:
            rows = slice(own.start + start, own.start + end)
            blocks = [relation.block(rows, slice(0, pairs), scores[:, :pairs])]
            if documents > pairs:
                blocks.append(relation.block(rows, slice(pairs, documents), scores[:, pairs:documents]))
            if with_queries:
                blocks.append(relation.queries_block(rows, slice(0, pairs), scores[:, documents:]))
            whole = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
            return relation.restrict_(rows, whole, slice(pairs, documents))

        loss, statistics = info_nce(query_QE, columns, scale, weight_Q, of_queries)
        if "document_to_query" in directions:
            assert query_BE is not None

            def of_documents(start: int, end: int, scores: Tensor) -> Tensor:
                rows = slice(own.start + start, own.start + end)
                block = relation.block(slice(0, pairs), rows, scores.T).T
                return relation.restrict_(rows, block, slice(0, 0))

            backward, _ = info_nce(document_QE, query_BE, scale, weight_Q, of_documents)
            loss = (loss + backward) / 2
        return loss, statistics


def info_nce(
    row_QE: Tensor, column_DE: Tensor, scale: Tensor, weight_Q: Tensor, relation: RelationOfRows
) -> tuple[Tensor, LossStatistics]:
    """Return sum_i weight_i l_i over the rows (see the module's text) and its statistics.

    The gradient is computed chunk by chunk together with the loss, so that neither scores nor their gradient are kept:
    memory is one block of scores plus the gradients of rows and columns. Differentiable once.
    """
    loss, statistics = _InfoNCE.apply(row_QE, column_DE, scale, weight_Q, relation)
    return loss, LossStatistics(*statistics.unbind())


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, row_QE: Tensor, column_DE: Tensor, scale: Tensor, weight_Q: Tensor, relation: RelationOfRows
    ) -> tuple[Tensor, Tensor]:
        want_gradient = any(context.needs_input_grad[:3])
        row_gradient = torch.zeros_like(row_QE) if want_gradient else None
        column_gradient = torch.zeros_like(column_DE) if want_gradient else None
        scale_gradient = torch.zeros_like(scale)
        loss = row_QE.new_zeros(())
        statistics = torch.zeros(5, dtype=torch.float64, device=row_QE.device)
        chunk = max(1, _BLOCK_ELEMENTS // max(1, len(column_DE)))
        for start in range(0, len(row_QE), chunk):
            end = min(start + chunk, len(row_QE))
            row, weight = row_QE[start:end], weight_Q[start:end]
            score_QD = row @ column_DE.T
            relation_QD = relation(start, end, score_QD)
            positive_QD = relation_QD == POSITIVE
            negative_QD = relation_QD == NEGATIVE
            statistics += _statistics(score_QD, positive_QD, negative_QD, relation_QD == IGNORED)
            logit_QD = score_QD * scale
            # -inf for a row that has no negative left: its loss and gradient are then zero.
            rest_Q = logit_QD.masked_fill(~negative_QD, -torch.inf).logsumexp(1, keepdim=True)
            # -log(e^p / (e^p + e^rest)) = softplus(rest - p), and its derivative by (rest - p) is the sigmoid.
            difference_QD = torch.where(positive_QD, rest_Q - logit_QD, -torch.inf)
            share_Q = weight / positive_QD.sum(1)
            loss += (softplus(difference_QD, threshold=_SOFTPLUS_LINEAR).sum(1) * share_Q).sum()
            if row_gradient is None or column_gradient is None:
                continue
            pull_QD = torch.sigmoid(difference_QD)
            probability_QD = torch.where(negative_QD, (logit_QD - rest_Q).exp(), 0.0)
            logit_gradient_QD = (probability_QD * pull_QD.sum(1, keepdim=True) - pull_QD) * share_Q[:, None]
            scale_gradient += (logit_gradient_QD * score_QD).sum()
            logit_gradient_QD *= scale
            torch.mm(logit_gradient_QD, column_DE, out=row_gradient[start:end])
            column_gradient.addmm_(logit_gradient_QD.T, row)
        context.save_for_backward(row_gradient, column_gradient, scale_gradient)
        context.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        row_gradient, column_gradient, scale_gradient = context.saved_tensors
        upstream = gradients[0]
        return row_gradient * upstream, column_gradient * upstream, scale_gradient * upstream, None, None


def _statistics(score_QD: Tensor, positive_QD: Tensor, negative_QD: Tensor, ignored_QD: Tensor) -> Tensor:
    hardest_Q = score_QD.masked_fill(~negative_QD, -1.0).amax(1)
    best_positive_Q = score_QD.masked_fill(~positive_QD, -torch.inf).amax(1)
    ignored = ignored_QD.sum()
    return torch.stack(
        [
            torch.tensor(float(len(score_QD)), device=score_QD.device),
            (best_positive_Q > hardest_Q).sum(),
            hardest_Q.sum(),
            ignored,
            ignored + negative_QD.sum(),
        ]
    ).double()


def _normalised_weights(weight_B: Tensor | None, pairs: int, like: Tensor) -> Tensor:
    """Return (B,) weights that sum to one over the global batch; a batch of zero weights counts nothing."""
    if weight_B is None:
        return like.new_full((pairs,), 1.0 / pairs)
    weight = weight_B.to(like.dtype)
    total = weight.sum()
    return weight / torch.where(total > 0, total, torch.ones_like(total))


def _truncated(vector: Tensor, size: int) -> Tensor:
    """Return the first `size` dimensions, unit-norm again (Matryoshka representation learning, Kusupati 2022)."""
    return vector if size == vector.shape[1] else normalize(vector[:, :size], dim=1)

"""A teacher's scores in a batch: which documents it takes for answers, and distillation from it.

The shards keep, for each row, the teacher's score of its own document and of others that may share a batch with it, by
the hash of the document's text. A batch takes those that are among its columns: the sparse relation below. It is exact,
whatever the strategy and the number of ranks: what the teacher has not scored is not judged.

Distillation, with cosines s of the model, scores t of the teacher times `train.teacher_scale`, temperature T as
configured, and C_i the row's own document with those of the batch that were scored for it:

    KL_i = sum over j in C_i of  p_j log(p_j / q_j),   p = softmax(t_i / T),  q = softmax(s_i / T)

A batch's loss is sum_i w_i KL_i with weights w that sum to one over the GLOBAL batch. Each rank computes the part of
its own rows, so the ranks' losses and gradients add up to the whole. A document that the batch has twice counts once.

Legend: Q this rank's rows, B pairs and N hard negatives of the global batch, S scored entries, E dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clusterbatch.batches.loader import TeacherScores
from clusterbatch.config import MaskConfig
from clusterbatch.training.margin_mse import TeacherMargins
from clusterbatch.training.masks import limit


@dataclass(frozen=True)
class ScoredPairs:
    """The teacher's scores of this rank's rows in a global batch, sorted by row.

    positive: (Q,) scores of the rows' own documents; row: (S,) int64, within [0, Q); column: (S,) int64, within
    [0, B + N); score: (S,); rank: (S,) int64, the document's place among all that were scored for the row, 0 for the
    best; repeated: (S,) bool, whether an earlier column holds the same document.
    """

    positive: Tensor
    row: Tensor
    column: Tensor
    score: Tensor
    rank: Tensor
    repeated: Tensor

    def answers(self, config: MaskConfig) -> tuple[Tensor, Tensor]:
        """Return rows, within [0, Q), and columns of the pairs that the teacher takes for answers."""
        found = self.rank < config.teacher_ranks
        if config.teacher_margin is not None:
            found |= self.score > limit(self.positive, config.teacher_margin, config.teacher_relative)[self.row]
        return self.row[found], self.column[found]

    def margins(self, scale: float) -> tuple[TeacherMargins, Tensor]:
        """Return how far the teacher scores each document of the batch below the row's own, and the columns of these
        documents; times `scale`."""
        once = ~self.repeated
        row = self.row[once]
        return TeacherMargins(row, (self.positive[row] - self.score[once]) * scale), self.column[once]


def scored_pairs(scores: TeacherScores, columns: np.ndarray, device: torch.device) -> ScoredPairs:
    """Return the entries of the rows' lists that are among a batch's columns, on `device`.

    columns: (B + N,) uint64 hashes of the batch's documents and hard negatives. They are few, and most of the time goes
    into starting operations: numpy takes half as long for that as torch, and an accelerator would be waited for.
    """
    counts = scores.counts.astype(np.int64)
    order = np.argsort(columns, kind="stable")
    ordered = columns[order]
    first = np.searchsorted(ordered, scores.document)
    found = np.searchsorted(ordered, scores.document, side="right") - first
    entry = np.repeat(np.arange(len(found)), found)
    # Of each entry's columns, the first and so on.
    turn = np.arange(len(entry)) - (found.cumsum() - found)[entry]
    row = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(found)) - (counts.cumsum() - counts)[row]
    arrays = [row[entry], order[first[entry] + turn], scores.score[entry], rank[entry], turn > 0]
    # A copy: Arrow's arrays are not writable, and torch has no such tensors.
    return ScoredPairs(*(torch.from_numpy(each).to(device) for each in (scores.positive.copy(), *arrays)))


def distillation(
    query_QE: Tensor,
    document_QE: Tensor,
    column_DE: Tensor,
    teacher: ScoredPairs,
    weight_Q: Tensor,
    temperature: float,
    scale: float,
) -> Tensor:
    """Return this rank's part of the KL loss, a scalar.

    Vectors are unit-norm; column_DE: (B + N, E) of the global batch; weight_Q is normalised over the global batch.
    """
    once = ~teacher.repeated
    own = torch.arange(len(query_QE), device=query_QE.device)
    row = torch.cat([own, teacher.row[once]])
    documents = torch.cat([document_QE, column_DE[teacher.column[once]]])
    student = (query_QE[row] * documents).sum(1) / temperature
    wanted = torch.cat([teacher.positive, teacher.score[once]]).to(student.dtype) * (scale / temperature)
    student_log, wanted_log = (_log_softmax(values, row, len(query_QE)) for values in (student, wanted))
    return (wanted_log.exp() * (wanted_log - student_log) * weight_Q[row]).sum()


def _log_softmax(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return the logarithm of the softmax over the values of each row; every row has some."""
    largest = values.new_full((rows,), -torch.inf).scatter_reduce(0, row, values.detach(), "amax")
    shifted = values - largest[row]
    total = values.new_zeros(rows).index_add(0, row, shifted.exp())
    return shifted - total.log()[row]

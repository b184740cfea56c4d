"""Margin-MSE: a mined negative should score as far below the positive as a teacher scores it.

Hofstaetter 2020, "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation" (arXiv
2010.02666); in TAS-B (2021, arXiv 2104.06967) it is the loss on pairs of passages. The teacher here is the surrogate,
which has scored the negatives when it found them. With cosines s of the model and t of the teacher, temperature T, and
the negatives N_i of row i that were scored:

    m_i = mean over n in N_i of  (((s_ip - s_in) - (t_ip - t_in)) / T)^2

Both margins are cosines, so that one scale, 1 / T as configured, suits both: that of the contrastive loss' logits. It
does not follow a temperature that is learned, which could make every margin small. A batch's loss is sum_i w_i m_i with
weights w that sum to one over the GLOBAL batch; rows without such negatives add nothing. No rank needs another's rows,
so the ranks' losses and gradients add up to the whole.

Legend: Q this rank's rows, N their hard negatives, E embedding dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherMargins:
    """Teacher's margins of this rank's hard negatives.

    row: (N,) int64, the row of this rank's slice that a negative belongs to; margin: (N,) how far the teacher scores it
    below that row's document, NaN if it has not scored it.
    """

    row: Tensor
    margin: Tensor


def margin_mse(
    query_QE: Tensor,
    document_QE: Tensor,
    negative_NE: Tensor,
    teacher: TeacherMargins,
    weight_Q: Tensor,
    temperature: float,
) -> Tensor:
    """Return this rank's part, a scalar. Vectors are unit-norm; weight_Q is normalised over the global batch."""
    scored = ~teacher.margin.isnan()
    row, wanted = teacher.row[scored], teacher.margin[scored].to(query_QE.dtype)
    student = (query_QE[row] * (document_QE[row] - negative_NE[scored])).sum(1)
    share = weight_Q / torch.bincount(row, minlength=len(query_QE)).clamp(min=1)
    return (((student - wanted) / temperature) ** 2 * share[row]).sum()

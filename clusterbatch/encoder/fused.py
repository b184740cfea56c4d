"""A lean forward pass on CPUs for backbones built like BERT: no padding, products fused with what follows them.

Savings over the usual path of transformers, the largest first: padding and its masks; scores of attention that leave
the cache; passes over the activations for bias, GELU and residual, which oneDNN applies to a product while it is in
registers; the blocking of weights, done once; three products for query, key and value instead of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# Scores of all heads that are kept in memory at once; a longer text goes through torch's blocked attention.
_SCORES = 2**20
# Rows of activations that a weight is blocked for: those of a usual micro-batch. Any number is correct.
_ROWS = 2048


@dataclass(frozen=True)
class LayerNames:
    """Names under which an architecture keeps the modules of a layer."""

    layers: str
    query: str
    key: str
    value: str
    attended: str
    attended_norm: str
    up: str
    down: str
    norm: str
    # of the weights of attention, of what was attended to, and of the layer's output; None where there is none
    dropouts: tuple[str | None, str | None, str | None]

    @property
    def products(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.attended, self.up, self.down


_BERT = LayerNames(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attended="attention.output.dense",
    attended_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
    dropouts=("attention.self.dropout", "attention.output.dropout", "output.dropout"),
)
_DISTILBERT = LayerNames(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attended="attention.out_lin",
    attended_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm="output_layer_norm",
    dropouts=("attention.dropout", None, "ffn.dropout"),
)
_NAMES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}


def layer_names(config: Any) -> LayerNames:
    """Return the names in the layers of a backbone built like BERT; raises ValueError for another architecture."""
    names = _NAMES.get(config.model_type)
    activation = getattr(config, "hidden_act", getattr(config, "activation", None))
    if names is None or activation != "gelu" or getattr(config, "is_decoder", False):
        raise ValueError("not built like BERT")
    return names


class FusedBackbone:
    """The layers of a backbone built like BERT: learned positions, layer norms after the residuals, GELU.

    Holds blocked copies of the layers' weights; embeddings are shared. Raises ValueError for another architecture:
    the caller must check that an accepted one gives the vectors of the usual path.
    """

    def __init__(self, backbone: nn.Module, first_position: int) -> None:
        config: Any = backbone.config
        names = layer_names(config)
        self._heads = int(config.num_attention_heads)
        embeddings: Any = backbone.get_submodule("embeddings")
        self._words: Tensor = embeddings.word_embeddings.weight
        positions: Tensor = embeddings.position_embeddings.weight[first_position:]
        types = getattr(embeddings, "token_type_embeddings", None)
        self._positions = positions if types is None else positions + types.weight[0]
        self._norm = _Norm(embeddings.LayerNorm)
        layers: Any = backbone.get_submodule(names.layers)
        self._layers = [_Layer(layer, names) for layer in layers]

    def __call__(self, ids: np.ndarray, offsets: np.ndarray) -> Tensor:
        """(T, d) states of the texts ids[offsets[i]:offsets[i + 1]], each attending to itself alone."""
        lengths = np.diff(offsets)
        positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        states_TD = self._norm(
            self._words[torch.from_numpy(ids.astype(np.int64))] + self._positions[torch.from_numpy(positions)]
        )
        runs = _runs(lengths)
        for layer in self._layers:
            attended_TD = _attend(layer.project(states_TD), runs, self._heads)
            states_TD = layer.attended_norm(layer.attended(attended_TD, states_TD))
            states_TD = layer.norm(layer.down(layer.up(states_TD), states_TD))
        return states_TD


class _Layer:
    def __init__(self, layer: nn.Module, names: LayerNames) -> None:
        query, key, value = (layer.get_submodule(name) for name in (names.query, names.key, names.value))
        self.project = _Product(query, key, value)
        self.attended = _ProductAndSum(layer.get_submodule(names.attended))
        self.attended_norm = _Norm(layer.get_submodule(names.attended_norm))
        self.up = _ProductAndGelu(layer.get_submodule(names.up))
        self.down = _ProductAndSum(layer.get_submodule(names.down))
        self.norm = _Norm(layer.get_submodule(names.norm))


class _Product:
    """Linear layers with the same input as one product; (T, in) -> (T, sum of outs)."""

    _activation, _algorithm = "none", ""

    def __init__(self, *linears: Any) -> None:
        weight = torch.cat([linear.weight for linear in linears])
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        self._bias = torch.cat([linear.bias for linear in linears])

    def __call__(self, states_TD: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            states_TD, self._weight, self._bias, self._activation, [], self._algorithm
        )
        return found


class _ProductAndGelu(_Product):
    _activation, _algorithm = "gelu", "none"


class _ProductAndSum(_Product):
    def __call__(self, states_TD: Tensor, residual_TD: Tensor) -> Tensor:  # type: ignore[override]
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            states_TD, residual_TD, self._weight, self._bias, "add"
        )
        return found


class _Norm:
    def __init__(self, norm: Any) -> None:
        self._weight, self._bias, self._epsilon = norm.weight, norm.bias, float(norm.eps)

    def __call__(self, states_TD: Tensor) -> Tensor:
        width = [states_TD.shape[-1]]
        return functional.layer_norm(states_TD, width, self._weight, self._bias, self._epsilon)


def _runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(texts, length) of each run of neighbours of one length: micro-batches come sorted, so there are few."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1, [len(lengths)]])
    return [(int(count), int(lengths[start])) for start, count in zip(starts[:-1], np.diff(starts), strict=True)]


def _attend(projected_TE: Tensor, runs: list[tuple[int, int]], heads: int) -> Tensor:
    """(T, d) from query, key and value side by side, (T, 3 d)."""
    attended_TD = projected_TE.new_empty(len(projected_TE), projected_TE.shape[1] // 3)
    start = 0
    for texts, length in runs:
        step = max(1, _SCORES // (heads * length**2))
        for first in range(0, texts, step):
            count = min(step, texts - first)
            rows = slice(start, start + count * length)
            start = rows.stop
            # 3, N, heads, L, d of a head
            parts = projected_TE[rows].view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            into_NHLD = attended_TD[rows].view(count, length, heads, -1).transpose(1, 2)
            if heads * length**2 > _SCORES:
                into_NHLD.copy_(functional.scaled_dot_product_attention(*parts))
                continue
            query, key, value = parts.flatten(1, 2)
            scores = query.new_empty(len(query), length, length)
            torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5, out=scores)
            into_NHLD.copy_(torch.bmm(torch.softmax(scores, -1), value).view_as(into_NHLD))
    return attended_TD

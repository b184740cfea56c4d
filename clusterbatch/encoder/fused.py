"""A lean forward pass on CPUs for backbones built like BERT: no padding, products fused with what follows them.

Savings over the usual path of transformers, the largest first: padding and its masks; scores of attention that leave
the cache; passes over the activations for bias, GELU and residual, which oneDNN applies to a product while it is in
registers; the blocking of weights, done once; three products for query, key and value instead of one.

Products can be of 8-bit integers: weights with a scale for each output, activations with their ranges in texts of
random tokens or, between the products of a feed-forward layer, with a range for each token. A text's vector then
depends on the model alone, not on a corpus or on other texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# Scores of all heads that are kept in memory at once in bfloat16; a longer text goes through torch's blocked attention.
_SCORES = 2**20
# Rows of activations that a weight is blocked for: those of a usual micro-batch. Any number is correct.
_ROWS = 2048
# Activations become unsigned bytes, the only ones that oneDNN multiplies fast.
_ZERO_POINT, _LARGEST = 128, 255
# Ranges of activations are wider by this factor than what random tokens showed.
_MARGIN = 1.1
# 0: all dimensions of an activation have the step of the widest; 1: each has its own.
_BALANCE = 0.5
# No GELU is below the negative of this.
_LEAST_GELU = 0.17


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
        heads = int(config.num_attention_heads)
        embeddings: Any = backbone.get_submodule("embeddings")
        self._words: Tensor = embeddings.word_embeddings.weight
        positions: Tensor = embeddings.position_embeddings.weight[first_position:]
        types = getattr(embeddings, "token_type_embeddings", None)
        self._positions = positions if types is None else positions + types.weight[0]
        self._norm = _Norm(embeddings.LayerNorm)
        layers: Any = backbone.get_submodule(names.layers)
        self._layers = [_Layer(layer, names, heads) for layer in layers]

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have an embedding."""
        return len(self._words)

    @property
    def most_tokens(self) -> int:
        """Length of the longest text that it has positions for."""
        return len(self._positions)

    def __call__(self, ids: np.ndarray, offsets: np.ndarray) -> Tensor:
        """(T, d) states of the texts ids[offsets[i]:offsets[i + 1]], each attending to itself alone."""
        lengths = np.diff(offsets)
        states_TD = self._embed(ids, offsets)
        runs = _runs(lengths)
        for layer in self._layers:
            states_TD = layer(states_TD, runs)
        return states_TD

    def quantise(self, ids: np.ndarray, offsets: np.ndarray) -> None:
        """Multiply 8-bit integers from now on, with the ranges of activations in the given texts.

        Needs weights in float32 and a CPU with VNNI: others round differently, or are slow.
        """
        states_TD = self._embed(ids, offsets)
        runs = _runs(np.diff(offsets))
        for layer in self._layers:
            states_TD = layer.quantise(states_TD, runs)

    def _embed(self, ids: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Return (T, d) inputs of the first layer."""
        positions = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        words_TD = self._words[torch.from_numpy(ids.astype(np.int64))]
        return self._norm(words_TD + self._positions[torch.from_numpy(positions)])


class _Layer:
    def __init__(self, layer: nn.Module, names: LayerNames, heads: int) -> None:
        query, key, value = (layer.get_submodule(name) for name in (names.query, names.key, names.value))
        up, down = layer.get_submodule(names.up), layer.get_submodule(names.down)
        self._heads = heads
        self._project: _Product | _Int8Product = _Product(_joined(query, key, value))
        self._attended: _Product | _Int8Product = _Product(_joined(layer.get_submodule(names.attended)))
        self._attended_norm = _Norm(layer.get_submodule(names.attended_norm))
        self._feed_forward: _FeedForward | _Int8FeedForward = _FeedForward(_joined(up), _joined(down))
        self._norm = _Norm(layer.get_submodule(names.norm))

    def __call__(self, states_TD: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        attended_TD = _attend(self._project(states_TD), runs, self._heads)
        states_TD = self._attended_norm(self._attended(attended_TD, states_TD))
        return self._norm(self._feed_forward(states_TD))

    def quantise(self, states_TD: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """Replace the products by those of 8-bit integers; return the layer's exact output."""
        project, attended, feed_forward = self._project, self._attended, self._feed_forward
        assert isinstance(project, _Product)
        assert isinstance(attended, _Product)
        assert isinstance(feed_forward, _FeedForward)
        projected_TE = project(states_TD)
        self._project = _Int8Product(project.linear, _Range.of(states_TD))
        # Attention gives means of values: their range holds for any text.
        self._attended = _Int8Product(attended.linear, _Range.of(projected_TE.chunk(3, dim=1)[2]))
        states_TD = self._attended_norm(attended(_attend(projected_TE, runs, self._heads), states_TD))
        self._feed_forward = _Int8FeedForward(feed_forward, _Range.of(states_TD))
        return self._norm(feed_forward(states_TD))


@dataclass(frozen=True)
class _Linear:
    """weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor


def _joined(*linears: Any) -> _Linear:
    """Return linear layers with the same input as one."""
    return _Linear(torch.cat([each.weight for each in linears]), torch.cat([each.bias for each in linears]))


class _Product:
    """(T, in) -> (T, out), followed by a GELU or the sum with a residual."""

    def __init__(self, linear: _Linear, gelu: bool = False) -> None:
        self.linear = linear
        self._activation: tuple[str, list[Any], str] = ("gelu", [], "none") if gelu else ("none", [], "")
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.contiguous(), _ROWS)

    def __call__(self, states_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        operands, product = (self._weight, self.linear.bias), torch.ops.mkldnn._linear_pointwise
        found: Tensor
        if residual_TD is None:
            found = product(states_TD, *operands, *self._activation)
        else:
            found = product.binary(states_TD, residual_TD, *operands, "add")
        return found


class _FeedForward:
    """Up, GELU, down, and the residual."""

    def __init__(self, up: _Linear, down: _Linear) -> None:
        self.up, self.down = _Product(up, gelu=True), _Product(down)

    def __call__(self, states_TD: Tensor) -> Tensor:
        return self.down(self.up(states_TD), states_TD)


@dataclass(frozen=True)
class _Range:
    """How activations become bytes: value = middle + step * (byte - zero point); (in,) each."""

    middle: Tensor
    step: Tensor

    @staticmethod
    def of(states_TD: Tensor) -> _Range:
        """Return ranges between one for all dimensions and one for each: weights get what is lost to dimensions."""
        low, high = torch.aminmax(states_TD, dim=0)
        wide = _MARGIN * (high - low) / _LARGEST
        return _Range((low + high) / 2, (wide.max() ** (1 - _BALANCE) * wide**_BALANCE).clamp_min(1e-8))


class _Int8Weight:
    """(out, in) weights as 8-bit integers, each output with a scale of its own."""

    def __init__(self, weight: Tensor) -> None:
        self._scales = (weight.abs().amax(dim=1) / 127).clamp_min(1e-12)
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        rounded = torch.round(weight / self._scales[:, None]).to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)

    def operands(self, bytes_TK: Tensor, zero_point: int) -> tuple[Any, ...]:
        """Return the operands of torch's product of them and unsigned bytes."""
        return bytes_TK, 1.0, zero_point, self._weight, self._scales, self._zeros


# Of a result in float32: scale, zero point, type.
_FLOAT = (1.0, 0, torch.float32)


class _Int8Product:
    """As _Product, by bytes and 8-bit weights; float32 in and out.

    The range of each dimension of the input goes into the weights and the bias, so that it costs nothing.
    """

    def __init__(self, linear: _Linear, inputs: _Range, gelu: bool = False) -> None:
        self._weight = _Int8Weight(linear.weight * inputs.step)
        self._bias = linear.bias + linear.weight @ inputs.middle
        self._activation: tuple[str, list[Any], str] = ("gelu", [], "none") if gelu else ("none", [], "")
        # Half a step is added because conversion cuts off fractions.
        self._factors = 1 / inputs.step
        self._shifts = _ZERO_POINT + 0.5 - inputs.middle / inputs.step

    def __call__(self, states_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        bytes_TD = torch.addcmul(self._shifts, states_TD, self._factors).clamp_(0, _LARGEST).to(torch.uint8)
        operands, product = self._weight.operands(bytes_TD, _ZERO_POINT), torch.ops.onednn.qlinear_pointwise
        found: Tensor
        if residual_TD is None:
            found = product(*operands, self._bias, *_FLOAT, *self._activation)
        else:
            found = product.binary(*operands, residual_TD, self._bias, *_FLOAT, 1.0, 0, "add", 1.0, *self._activation)
        return found


class _Int8FeedForward:
    """As _FeedForward. Between the products each token has a range of its own: some tokens' are ten times the usual."""

    def __init__(self, exact: _FeedForward, inputs: _Range) -> None:
        down = exact.down.linear
        self._up = _Int8Product(exact.up.linear, inputs, gelu=True)
        self._down = _Int8Weight(down.weight)
        self._bias = down.bias - _LEAST_GELU * down.weight.sum(dim=1)

    def __call__(self, states_TD: Tensor) -> Tensor:
        between_TE = self._up(states_TD)
        steps_T1 = (between_TE.amax(dim=1, keepdim=True) + _LEAST_GELU) / _LARGEST
        bytes_TE = between_TE.mul_(1 / steps_T1).add_(_LEAST_GELU / steps_T1 + 0.5).to(torch.uint8)
        operands = self._down.operands(bytes_TE, 0)
        product = torch.ops.onednn.qlinear_pointwise(*operands, None, *_FLOAT, "none", [], "")
        return torch.addcmul(states_TD + self._bias, product, steps_T1)


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
        step = texts if projected_TE.dtype == torch.float32 else max(1, _SCORES // (heads * length**2))
        for first in range(0, texts, step):
            count = min(step, texts - first)
            rows = slice(start, start + count * length)
            start = rows.stop
            # 3, N, heads, L, d of a head
            parts = projected_TE[rows].view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            into_NHLD = attended_TD[rows].view(count, length, heads, -1).transpose(1, 2)
            if projected_TE.dtype == torch.float32 or heads * length**2 > _SCORES:
                into_NHLD.copy_(functional.scaled_dot_product_attention(*parts))
                continue
            query, key, value = parts.flatten(1, 2)
            scores = query.new_empty(len(query), length, length)
            torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=query.shape[-1] ** -0.5, out=scores)
            into_NHLD.copy_(torch.bmm(torch.softmax(scores, -1), value).view_as(into_NHLD))
    return attended_TD

"""Layers built like BERT on packed texts on CPUs, forward and backward, keeping little in between.

Autograd keeps 16 vectors of the layer's width per token and layer: inputs of every product, both sides of GELU, inputs
and results of the norms. Only what a product or attention computed is kept here (10 vectors), or, if that is too much,
the sums that go into the second norm alone (1 vector); the backward pass then repeats all products of a layer but the
last, its largest. Norms and GELU are computed once more in either case: they cost next to nothing.

Dropout is drawn from generators seeded by one number of torch's own generator, layer and place, so that whatever is
computed again drops the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clusterbatch.encoder.fused import layer_names
from clusterbatch.training.bert_attention import attend, attend_backward, draw_dropout, runs

Kept = Literal["all", "sums", "nothing"]

# Rows of activations that weights are blocked for: those of a usual micro-batch. Any number is correct.
_ROWS = 2048
# Rows of bfloat16 come in multiples of this: oneDNN compiles a product for every number of rows.
_ALIKE = 64
# Places of dropout in a layer.
_ATTENTION, _ATTENDED, _OUTPUT = range(3)


class BertLayers:
    """PackedStates of a backbone built like BERT, differentiable in its parameters.

    Embeddings are those of the backbone. Weights are read at every call outside `fixed_weights`, so they may be
    trained; they are float32, and products are in the dtype of autocast where it is on. Raises ValueError for another
    architecture: the caller must check that an accepted one gives the states and gradients of the usual path.
    """

    def __init__(self, backbone: nn.Module, first_position: int) -> None:
        config: Any = backbone.config
        names = layer_names(config)
        self._embeddings = backbone.get_submodule("embeddings")
        self._first_position, self._heads = first_position, int(config.num_attention_heads)
        self._width = int(config.hidden_size)
        layers: Any = backbone.get_submodule(names.layers)
        self._layers = [
            _Modules(
                products=[layer.get_submodule(name) for name in names.products],
                norms=[layer.get_submodule(name) for name in (names.attended_norm, names.norm)],
                dropouts=[layer.get_submodule(name) if name else None for name in names.dropouts],
            )
            for layer in layers
        ]
        if any(type(product) is not nn.Linear for layer in self._layers for product in layer.products):
            raise ValueError("a layer with adapters")
        # What a call keeps for the backward pass.
        self.keep: Kept = "all"
        # Those of all layers by dtype, while the weights are fixed.
        self._products: dict[torch.dtype, list[_Products]] | None = None

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Prepare the weights of products once for all calls in the block, in which the weights must not change."""
        self._products = {}
        try:
            yield
        finally:
            self._products = None

    def __call__(self, ids: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Return (T, d) float32 states of the texts ids[offsets[i]:offsets[i + 1]], each attending to itself alone."""
        lengths = np.diff(offsets)
        positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths) + self._first_position
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        padding = -len(ids) % _ALIKE if dtype == torch.bfloat16 else 0
        keep = self.keep if torch.is_grad_enabled() else "nothing"
        room = None
        if keep != "nothing":
            # Before anything that is freed: holes between what stays would add up over the micro-batches.
            room = torch.empty(len(self._layers) + 1, len(ids) + padding, self._width)
        tokens = torch.from_numpy(ids.astype(np.int64))[None], torch.from_numpy(positions.astype(np.int64))[None]
        if keep == "sums":
            # What the norm of the embeddings would keep costs next to nothing to compute again.
            embedded_TD: Tensor = checkpoint(self._embed, *tokens, use_reentrant=False)
        else:
            embedded_TD = self._embed(*tokens)
        plan = _Plan(
            runs=runs(lengths),
            heads=self._heads,
            epsilons=[(float(layer.norms[0].eps), float(layer.norms[1].eps)) for layer in self._layers],
            dtype=dtype,
            products=self._products_in(dtype),
            dropouts=[layer.dropout_shares for layer in self._layers],
            # Drawn even if nothing is dropped: one number costs nothing.
            seed=int(torch.randint(2**48, ())),
            keep=keep,
            room=room,
        )
        with torch.autocast("cpu", enabled=False):
            states: Tensor = _Layers.apply(
                functional.pad(embedded_TD.float(), (0, 0, 0, padding)),
                plan,
                *(weight for layer in self._layers for weight in layer.weights),
            )
        return states[: len(ids)]

    def _embed(self, ids_1T: Tensor, positions_1T: Tensor) -> Tensor:
        """Return (T, d) inputs of the first layer."""
        embedded_1TD: Tensor = self._embeddings(input_ids=ids_1T, position_ids=positions_1T)
        return embedded_1TD[0]

    def _products_in(self, dtype: torch.dtype) -> list[_Products]:
        if self._products is not None and dtype in self._products:
            return self._products[dtype]
        with torch.no_grad():
            products = [_Products.of(layer.products, dtype) for layer in self._layers]
        if self._products is not None:
            self._products[dtype] = products
        return products


class _Product:
    """Product by the weights of linear layers with the same input, side by side; and the way back of gradients."""

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype) -> None:
        weight = torch.cat([linear.weight.to(dtype) for linear in linears])
        self._bias = torch.cat([linear.bias.to(dtype) for linear in linears])
        # oneDNN is fastest if weights are in blocks of its own, one way for each direction.
        self._blocked = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self._blocked:
            self._forward, self._backward = _blocks(weight), _blocks(weight.t().contiguous())
        else:
            self._forward, self._backward = weight, weight.t()

    def __call__(self, states: Tensor) -> Tensor:
        """(T, in) -> (T, out), in the product's dtype."""
        return self._times(self._forward, states, self._bias)

    def back(self, gradient: Tensor) -> Tensor:
        """(T, out) -> (T, in): the gradient of what the product was computed of."""
        return self._times(self._backward, gradient, None)

    def _times(self, weight: Tensor, states: Tensor, bias: Tensor | None) -> Tensor:
        if not self._blocked:
            return functional.linear(states, weight, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
        return found


def _blocks(weight: Tensor) -> Tensor:
    blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return blocks


class _Products(NamedTuple):
    """Products of one layer."""

    project: _Product
    attended: _Product
    up: _Product
    down: _Product

    @staticmethod
    def of(linears: Sequence[Any], dtype: torch.dtype) -> _Products:
        """Take the linear layers query, key, value, attended, up and down."""
        attended, up, down = (_Product([linear], dtype) for linear in linears[3:])
        return _Products(_Product(linears[:3], dtype), attended, up, down)


@dataclass(frozen=True)
class _Modules:
    # query, key, value, attended, up, down
    products: Sequence[Any]
    norms: Sequence[Any]
    # of attention's weights, of what was attended to, of the layer's output
    dropouts: Sequence[Any]

    @property
    def weights(self) -> Iterator[Tensor]:
        for module in (*self.products, *self.norms):
            yield from (module.weight, module.bias)

    @property
    def dropout_shares(self) -> tuple[float, ...]:
        return tuple(float(module.p) if module is not None and module.training else 0.0 for module in self.dropouts)


@dataclass(frozen=True)
class _Plan:
    # (texts, tokens of each) of neighbours of one length
    runs: Sequence[tuple[int, int]]
    heads: int
    epsilons: Sequence[tuple[float, float]]
    dtype: torch.dtype
    products: Sequence[_Products]
    dropouts: Sequence[tuple[float, ...]]
    seed: int
    keep: Kept
    # (layers + 1, T, d) float32 for the first layer's input and the sums of every layer; None: nothing is kept
    room: Tensor | None


class _Weights(NamedTuple):
    """Parameters of one layer, in the order of `_Modules.weights`."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    attended: Tensor
    attended_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    first_norm: Tensor
    first_norm_bias: Tensor
    second_norm: Tensor
    second_norm_bias: Tensor


_COUNT = len(_Weights._fields)


class _Results(NamedTuple):
    """Results of a layer's products before the last one; T tokens, d width, F width between `up` and `down`."""

    projected: Tensor  # (T, 3 d): query, key and value
    attended: Tensor  # (T, d)
    logarithms: Tensor  # of attention's sums, as its backward pass needs them
    sums: Tensor  # (T, d), into the first norm
    up: Tensor  # (T, F), before GELU


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states_TD: Tensor, plan: _Plan, *parameters: Tensor) -> Tensor:
        into, kept = plan.room, list[Tensor]()
        if into is not None:
            into[0] = states_TD
            kept.append(into)
        for number in range(len(plan.epsilons)):
            layer = _Layer(plan, number, parameters)
            results, normed = layer.results(states_TD)
            sums_TD = layer.second_sums(results, normed.states, None if into is None else into[number + 1])
            states_TD = layer.second_norm(sums_TD).states
            if plan.keep == "all":
                kept += results
        context.save_for_backward(*kept, *parameters)
        context.plan, context.kept = replace(plan, room=None), len(kept)
        return states_TD

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = context.plan
        kept, parameters = context.saved_tensors[: context.kept], context.saved_tensors[context.kept :]
        (first_TD, *sums_LTD), *results = kept
        every = len(_Results._fields) if plan.keep == "all" else 0
        found: list[Tensor | None] = []
        wanted = context.needs_input_grad[2:]
        gradient_TD = gradients[0]
        layers = [_Layer(plan, number, parameters) for number in range(len(plan.epsilons))]
        normed = layers[-1].second_norm(sums_LTD[-1])
        for number in reversed(range(len(layers))):
            below = layers[number - 1].second_norm(sums_LTD[number - 1]) if number else None
            states_TD = below.states if below else first_TD
            own = wanted[_COUNT * number : _COUNT * (number + 1)]
            gradient_TD, of_weights = layers[number].backward(
                gradient_TD, states_TD, results[every * number : every * (number + 1)], sums_LTD[number], normed, own
            )
            found[:0] = of_weights
            if below:
                normed = below
        return gradient_TD, None, *found


class _Normed(NamedTuple):
    """Result of a norm, and what its backward pass needs beside its input."""

    states: Tensor  # (T, d)
    mean: Tensor  # (T, 1)
    scale: Tensor  # (T, 1)


class _Layer:
    """The arithmetic of one layer. Residuals, norms and their gradients are float32, products in the plan's dtype."""

    def __init__(self, plan: _Plan, number: int, parameters: Sequence[Tensor]) -> None:
        self._weights = _Weights(*parameters[_COUNT * number : _COUNT * (number + 1)])
        self._plan, self._number, self._dtype = plan, number, plan.dtype
        self._products = plan.products[number]
        self._shares = plan.dropouts[number]

    def results(self, states_TD: Tensor) -> tuple[_Results, _Normed]:
        """Return the results of the products before the last one, and of the first norm."""
        products, plan = self._products, self._plan
        projected = products.project(states_TD.to(self._dtype))
        seed = self._seed(_ATTENTION)
        attended, logarithms = attend(projected, plan.runs, plan.heads, self._shares[_ATTENTION], seed)
        sums = self._dropped(products.attended(attended), _ATTENDED).add_(states_TD)
        normed = self._first_norm(sums)
        return _Results(projected, attended, logarithms, sums, products.up(normed.states.to(self._dtype))), normed

    def second_sums(self, results: _Results, normed_TD: Tensor, into_TD: Tensor | None) -> Tensor:
        """Return the sums that go into the second norm, written to `into_TD` if it is given."""
        product_TD = self._products.down(functional.gelu(results.up))
        return torch.add(self._dropped(product_TD, _OUTPUT), normed_TD, out=into_TD)

    def second_norm(self, sums_TD: Tensor) -> _Normed:
        weights = self._weights
        return _norm(sums_TD, weights.second_norm, weights.second_norm_bias, self._plan.epsilons[self._number][1])

    def backward(
        self,
        gradient_TD: Tensor,
        states_TD: Tensor,
        results: Sequence[Tensor],
        sums_TD: Tensor,
        normed: _Normed,
        wanted: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of the layer's input and, if wanted, of its weights in their order.

        results: those that were kept, or none; normed: of the second norm.
        """
        weights, products, plan, dtype = self._weights, self._products, self._plan, self._dtype
        found: dict[str, Tensor | None] = {}
        is_wanted = dict(zip(_Weights._fields, wanted, strict=True))

        def weigh(name: str, gradient: Tensor, input: Tensor) -> None:
            """Gradients of a product's weight and bias from those of its result, and its input."""
            if is_wanted[name]:
                found[name] = torch.mm(gradient.t(), input).float()
            if is_wanted[f"{name}_bias"]:
                found[f"{name}_bias"] = _sum(gradient)

        if results:
            done = _Results(*results)
            first = self._first_norm(done.sums)
        else:
            done, first = self.results(states_TD)
        of_sums, found["second_norm"], found["second_norm_bias"] = _norm_backward(
            gradient_TD, sums_TD, normed, weights.second_norm, weights.second_norm_bias
        )
        of_down = self._dropped(of_sums, _OUTPUT, copy=True).to(dtype)
        weigh("down", of_down, functional.gelu(done.up))
        of_up = torch.ops.aten.gelu_backward(products.down.back(of_down), done.up)
        weigh("up", of_up, first.states.to(dtype))
        of_normed = of_sums.add_(products.up.back(of_up))
        of_sums, found["first_norm"], found["first_norm_bias"] = _norm_backward(
            of_normed, done.sums, first, weights.first_norm, weights.first_norm_bias
        )
        of_product = self._dropped(of_sums, _ATTENDED, copy=True).to(dtype)
        weigh("attended", of_product, done.attended)
        of_projected = attend_backward(
            products.attended.back(of_product),
            done.projected,
            done.attended,
            done.logarithms,
            plan.runs,
            plan.heads,
            self._shares[_ATTENTION],
            self._seed(_ATTENTION),
        )
        if any(is_wanted[name] for name in ("query", "key", "value")):
            of_weights = torch.mm(of_projected.t(), states_TD.to(dtype)).float().chunk(3)
            found.update(zip(("query", "key", "value"), of_weights, strict=True))
        of_biases = _sum(of_projected).chunk(3)
        found.update(zip(("query_bias", "key_bias", "value_bias"), of_biases, strict=True))
        of_states = of_sums.add_(products.project.back(of_projected))
        return of_states, [found.get(name) if is_wanted[name] else None for name in _Weights._fields]

    def _first_norm(self, sums_TD: Tensor) -> _Normed:
        weights = self._weights
        return _norm(sums_TD, weights.first_norm, weights.first_norm_bias, self._plan.epsilons[self._number][0])

    def _dropped(self, tensor: Tensor, place: int, *, copy: bool = False) -> Tensor:
        """Return `tensor` as float32 with the dropout of `place`; written over unless a copy is asked for."""
        tensor, share = tensor.float(), self._shares[place]
        if not share:
            return tensor
        dropped, factor = draw_dropout(tensor.shape, share, self._generator(place))
        tensor = tensor.masked_fill(dropped, 0.0) if copy else tensor.masked_fill_(dropped, 0.0)
        return tensor.mul_(factor)

    def _seed(self, place: int) -> int:
        return self._plan.seed + 3 * self._number + place

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(place))


def _sum(gradient: Tensor) -> Tensor:
    # Added up in float32 whatever the type; asked for a result in float32, torch would convert all rows first.
    return gradient.sum(0).float()


def _norm(sums: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> _Normed:
    return _Normed(*torch.native_layer_norm(sums, [sums.shape[-1]], weight, bias, epsilon))


def _norm_backward(
    gradient: Tensor, sums: Tensor, normed: _Normed, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        gradient, sums, [sums.shape[-1]], normed.mean, normed.scale, weight, bias, [True, True, True]
    )
    return found

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
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clusterbatch.encoder.fused import layer_names

Kept = Literal["all", "sums", "nothing"]

# Scores of all heads that exist at once if attention drops some of them: few enough to stay in a cache.
_SCORES = 2**20
_ATTENTION, _ATTENDED, _OUTPUT = range(3)


class BertLayers:
    """PackedStates of a backbone built like BERT, differentiable in its parameters.

    Embeddings are those of the backbone. Weights are read at every call, so they may be trained; they are float32, and
    products are in the dtype of autocast where it is on. Raises ValueError for another architecture: the caller must
    check that an accepted one gives the states and gradients of the usual path.
    """

    def __init__(self, backbone: nn.Module, first_position: int) -> None:
        config: Any = backbone.config
        names = layer_names(config)
        self._embeddings = backbone.get_submodule("embeddings")
        self._first_position, self._heads = first_position, int(config.num_attention_heads)
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

    def __call__(self, ids: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Return (T, d) float32 states of the texts ids[offsets[i]:offsets[i + 1]], each attending to itself alone."""
        lengths = np.diff(offsets)
        positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths) + self._first_position
        embedded_TD: Tensor = self._embeddings(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            position_ids=torch.from_numpy(positions.astype(np.int64))[None],
        )[0]
        autocast = torch.is_autocast_enabled("cpu")
        plan = _Plan(
            runs=runs(lengths),
            heads=self._heads,
            epsilons=[(float(layer.norms[0].eps), float(layer.norms[1].eps)) for layer in self._layers],
            dtype=torch.get_autocast_dtype("cpu") if autocast else torch.float32,
            dropouts=[layer.dropout_shares for layer in self._layers],
            # Drawn even if nothing is dropped: one number costs nothing.
            seed=int(torch.randint(2**48, ())),
            keep=self.keep if torch.is_grad_enabled() else "nothing",
        )
        with torch.autocast("cpu", enabled=False):
            states: Tensor = _Layers.apply(
                embedded_TD.float(), plan, *(weight for layer in self._layers for weight in layer.weights)
            )
        return states


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
    dropouts: Sequence[tuple[float, ...]]
    seed: int
    keep: Kept


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


class _Products(NamedTuple):
    """Results of a layer's products before the last one; T tokens, d width, F width between `up` and `down`."""

    projected: Tensor  # (T, 3 d): query, key and value
    attended: Tensor  # (T, d)
    logarithms: Tensor  # of attention's sums, as its backward pass needs them
    sums: Tensor  # (T, d), into the first norm
    up: Tensor  # (T, F), before GELU


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, states_TD: Tensor, plan: _Plan, *parameters: Tensor) -> Tensor:
        kept = [states_TD]
        for number in range(len(plan.epsilons)):
            layer = _Layer(plan, number, parameters)
            products = layer.products(states_TD)
            sums_TD = layer.second_sums(products)
            states_TD = layer.second_norm(sums_TD)
            if plan.keep == "all":
                kept += products
            if plan.keep != "nothing":
                kept.append(sums_TD)
        if plan.keep != "nothing":
            context.save_for_backward(*kept, *parameters)
            context.plan, context.kept = plan, len(kept)
        return states_TD

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = context.plan
        kept, parameters = context.saved_tensors[: context.kept], context.saved_tensors[context.kept :]
        every = len(_Products._fields) + 1 if plan.keep == "all" else 1
        found: list[Tensor | None] = []
        wanted = context.needs_input_grad[2:]
        gradient_TD = gradients[0]
        for number in reversed(range(len(plan.epsilons))):
            layer = _Layer(plan, number, parameters)
            # Sums of the layer before; the first layer's input is kept itself.
            before = kept[every * number]
            states_TD = _Layer(plan, number - 1, parameters).second_norm(before) if number else before
            *products, sums_TD = kept[1 + every * number : 1 + every * (number + 1)]
            done = _Products(*products) if products else layer.products(states_TD)
            own = wanted[_COUNT * number : _COUNT * (number + 1)]
            gradient_TD, of_weights = layer.backward(gradient_TD, states_TD, done, sums_TD, own)
            found[:0] = of_weights
        return gradient_TD, None, *found


class _Layer:
    """The arithmetic of one layer. Residuals, norms and their gradients are float32, products in the plan's dtype."""

    def __init__(self, plan: _Plan, number: int, parameters: Sequence[Tensor]) -> None:
        self._weights = _Weights(*parameters[_COUNT * number : _COUNT * (number + 1)])
        self._plan, self._number, self._dtype = plan, number, plan.dtype
        self._shares = plan.dropouts[number]

    def products(self, states_TD: Tensor) -> _Products:
        weights, plan = self._weights, self._plan
        bias = torch.cat([weights.query_bias, weights.key_bias, weights.value_bias])
        projected = self._product(states_TD, self._projection, bias)
        seed = self._seed(_ATTENTION)
        attended, logarithms = _attend(projected, plan.runs, plan.heads, self._shares[_ATTENTION], seed)
        sums = self._dropped(self._product(attended, weights.attended, weights.attended_bias), _ATTENDED)
        sums = sums.add_(states_TD)
        return _Products(
            projected, attended, logarithms, sums, self._product(self._first_norm(sums)[0], weights.up, weights.up_bias)
        )

    def second_sums(self, products: _Products) -> Tensor:
        weights = self._weights
        down = self._product(functional.gelu(products.up), weights.down, weights.down_bias)
        return self._dropped(down, _OUTPUT).add_(self._first_norm(products.sums)[0])

    def second_norm(self, sums_TD: Tensor) -> Tensor:
        return self._second_norm(sums_TD)[0]

    def backward(
        self, gradient_TD: Tensor, states_TD: Tensor, done: _Products, sums_TD: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of the layer's input and, if wanted, of its weights in their order."""
        weights, plan, dtype = self._weights, self._plan, self._dtype
        found: dict[str, Tensor | None] = {}
        is_wanted = dict(zip(_Weights._fields, wanted, strict=True))

        def weigh(name: str, gradient: Tensor, input: Tensor) -> None:
            """Gradients of a product's weight and bias from those of its result, and its input."""
            if is_wanted[name]:
                found[name] = torch.mm(gradient.t(), input.to(dtype)).float()
            if is_wanted[f"{name}_bias"]:
                found[f"{name}_bias"] = gradient.sum(0, dtype=torch.float32)

        _, mean, scale = self._second_norm(sums_TD)
        of_sums, found["second_norm"], found["second_norm_bias"] = _norm_backward(
            gradient_TD, sums_TD, mean, scale, weights.second_norm, weights.second_norm_bias
        )
        of_down = self._dropped(of_sums, _OUTPUT, copy=True).to(dtype)
        weigh("down", of_down, functional.gelu(done.up))
        of_up = torch.ops.aten.gelu_backward(torch.mm(of_down, weights.down.to(dtype)), done.up)
        normed, mean, scale = self._first_norm(done.sums)
        weigh("up", of_up, normed)
        of_normed = of_sums.add_(torch.mm(of_up, weights.up.to(dtype)))
        of_sums, found["first_norm"], found["first_norm_bias"] = _norm_backward(
            of_normed, done.sums, mean, scale, weights.first_norm, weights.first_norm_bias
        )
        of_product = self._dropped(of_sums, _ATTENDED, copy=True).to(dtype)
        weigh("attended", of_product, done.attended)
        of_projected = _attend_backward(
            torch.mm(of_product, weights.attended.to(dtype)),
            done,
            plan.runs,
            plan.heads,
            self._shares[_ATTENTION],
            self._seed(_ATTENTION),
        )
        if any(is_wanted[name] for name in ("query", "key", "value")):
            of_weights = torch.mm(of_projected.t(), states_TD.to(dtype)).float().chunk(3)
            found.update(zip(("query", "key", "value"), of_weights, strict=True))
        of_biases = of_projected.sum(0, dtype=torch.float32).chunk(3)
        found.update(zip(("query_bias", "key_bias", "value_bias"), of_biases, strict=True))
        of_states = of_sums.add_(torch.mm(of_projected, self._projection.to(dtype)))
        return of_states, [found.get(name) if is_wanted[name] else None for name in _Weights._fields]

    @property
    def _projection(self) -> Tensor:
        return torch.cat([self._weights.query, self._weights.key, self._weights.value])

    def _product(self, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(states.to(self._dtype), weight.to(self._dtype), bias.to(self._dtype))

    def _first_norm(self, sums_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        epsilon = self._plan.epsilons[self._number][0]
        return _norm(sums_TD, self._weights.first_norm, self._weights.first_norm_bias, epsilon)

    def _second_norm(self, sums_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        epsilon = self._plan.epsilons[self._number][1]
        return _norm(sums_TD, self._weights.second_norm, self._weights.second_norm_bias, epsilon)

    def _dropped(self, tensor: Tensor, place: int, *, copy: bool = False) -> Tensor:
        """Return `tensor` as float32 with the dropout of `place`; written over unless a copy is asked for."""
        tensor, share = tensor.float(), self._shares[place]
        if not share:
            return tensor
        dropped, factor = _dropout(tensor.shape, share, self._generator(place))
        tensor = tensor.masked_fill(dropped, 0.0) if copy else tensor.masked_fill_(dropped, 0.0)
        return tensor.mul_(factor)

    def _seed(self, place: int) -> int:
        return self._plan.seed + 3 * self._number + place

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(place))


def runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(texts, length) of each run of neighbours of one length: micro-batches come sorted, so there are few."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(lengths)) + 1, [len(lengths)]])
    return [(int(count), int(lengths[start])) for start, count in zip(starts[:-1], np.diff(starts), strict=True)]


def _norm(sums: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_layer_norm(sums, [sums.shape[-1]], weight, bias, epsilon)


def _norm_backward(
    gradient: Tensor, sums: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        gradient, sums, [sums.shape[-1]], mean, scale, weight, bias, [True, True, True]
    )
    return found


def _dropout(shape: Sequence[int], share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return which elements are dropped, and the factor of the others; 16 bits are drawn for each."""
    count, level = int(np.prod(shape)), min(round(share * 2**16), 2**16 - 1)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    dropped = drawn.view(torch.int16)[:count].view(*shape) < level - 2**15
    return dropped, 2**16 / (2**16 - level)


def _attend(
    projected_TE: Tensor, runs: Sequence[tuple[int, int]], heads: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return (T, d) from query, key and value side by side, (T, 3 d); and the logarithms of the sums, if needed.

    The scores are float32, as those of torch's kernel are.
    """
    attended_TD = projected_TE.new_empty(len(projected_TE), projected_TE.shape[1] // 3)
    logarithms, start = [], 0
    if dropout:
        for rows, (query, key, value), dropped, factor in _blocks(projected_TE, runs, heads, dropout, seed):
            weights = _softmax(query, key).masked_fill_(dropped, 0.0)
            _heads(attended_TD[rows], query.shape[1], heads).copy_(
                torch.bmm(weights, value).mul_(factor).view(-1, heads, *query.shape[1:])
            )
        return attended_TD, projected_TE.new_empty(0)
    for count, length in runs:
        rows = slice(start, start := start + count * length)
        attended, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_three(projected_TE[rows], length, heads).float()
        )
        _heads(attended_TD[rows], length, heads).copy_(attended)
        logarithms.append(logarithm.flatten())
    return attended_TD, torch.cat(logarithms)


def _attend_backward(
    gradient_TD: Tensor, done: _Products, runs: Sequence[tuple[int, int]], heads: int, dropout: float, seed: int
) -> Tensor:
    """Return the gradient (T, 3 d) of `done.projected` from that of what was attended to."""
    projected_TE, attended_TD = done.projected, done.attended
    found_TE, start, first = torch.empty_like(projected_TE), 0, 0
    if dropout:
        # For each token and head: the sum over its weights of weight times gradient.
        drawn_TH = (gradient_TD.float() * attended_TD.float()).unflatten(1, (heads, -1)).sum(-1)
        for rows, (query, key, value), dropped, factor in _blocks(projected_TE, runs, heads, dropout, seed):
            length, scale = query.shape[1], query.shape[-1] ** -0.5
            gradient = _heads(gradient_TD[rows], length, heads).float().flatten(0, 1)
            weights = _softmax(query, key)
            into = _three(found_TE[rows], length, heads)
            kept = weights.masked_fill(dropped, 0.0).mul_(factor)
            into[2].copy_(torch.bmm(kept.transpose(1, 2), gradient).view_as(into[2]))
            of_weights = torch.bmm(gradient, value.transpose(1, 2)).masked_fill_(dropped, 0.0).mul_(factor)
            drawn = drawn_TH[rows].view(-1, length, heads).transpose(1, 2).reshape(-1, length, 1)
            of_scores = of_weights.sub_(drawn).mul_(weights).mul_(scale)
            into[0].copy_(torch.bmm(of_scores, key).view_as(into[0]))
            into[1].copy_(torch.bmm(of_scores.transpose(1, 2), query).view_as(into[1]))
        return found_TE
    for count, length in runs:
        rows = slice(start, start := start + count * length)
        logarithms = done.logarithms[first : first + count * heads * length].view(count, heads, length)
        first += logarithms.numel()
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(gradient_TD[rows], length, heads).float(),
            *_three(projected_TE[rows], length, heads).float(),
            _heads(attended_TD[rows], length, heads).float(),
            logarithms,
            0.0,
            False,
        )
        for into, gradient in zip(_three(found_TE[rows], length, heads), gradients, strict=True):
            into.copy_(gradient)
    return found_TE


def _blocks(
    projected_TE: Tensor, runs: Sequence[tuple[int, int]], heads: int, dropout: float, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor, float]]:
    """Rows of some texts of one length, their query, key and value (3, texts x heads, L, d) in float32, and dropout."""
    generator, start = torch.Generator().manual_seed(seed), 0
    for texts, length in runs:
        step = max(1, _SCORES // (heads * length**2))
        for first in range(0, texts, step):
            rows = slice(start, start := start + min(step, texts - first) * length)
            parts = _three(projected_TE[rows], length, heads).float().flatten(1, 2)
            yield rows, parts, *_dropout((parts.shape[1], length, length), dropout, generator)


def _softmax(query: Tensor, key: Tensor) -> Tensor:
    scores = query.new_empty(len(query), query.shape[1], key.shape[1])
    scale = query.shape[-1] ** -0.5
    return torch.softmax(torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=scale), -1)


def _three(rows_TE: Tensor, length: int, heads: int) -> Tensor:
    """Return the view (3, N, heads, L, d of a head) of query, key and value side by side."""
    return rows_TE.view(-1, length, 3, heads, rows_TE.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)


def _heads(rows_TD: Tensor, length: int, heads: int) -> Tensor:
    """Return the view (N, heads, L, d of a head) of the rows of texts of one length."""
    return rows_TD.view(-1, length, heads, rows_TD.shape[1] // heads).transpose(1, 2)

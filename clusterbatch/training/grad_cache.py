"""Gradient cache (GradCache, Gao 2021): embed a large batch within bounded memory, with the exact gradient.

The batch goes through the encoder in micro-batches of like lengths. If the activations of all fit the memory that is
allowed, every micro-batch keeps its graph, the backward pass is the plain one, and the batch pays nothing. Otherwise an
encoder that can keep less per token (`encode_keeping_less`) does so, and computes part of it again. What does not fit
even then is embedded without a graph and computed once more when its gradient is known.

Dropout must fall alike both times: the generators are seeded from (seed, step, rank, micro-batch) before every forward
pass. So there is no random state to restore, neither here nor after a crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clusterbatch.encoder.inputs import Inputs
from clusterbatch.encoder.tokens import micro_batches


@dataclass(frozen=True)
class RandomKey:
    """Key of the randomness of one rank in one step."""

    seed: int
    step: int
    rank: int

    def apply(self, micro_batch: int) -> None:
        """Seed torch's generators (CPU and accelerators) for one micro-batch."""
        text = f"{self.seed} {self.step} {self.rank} {micro_batch}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big"))


class CachedEmbedding:
    """One forward and one backward pass over the texts (and images) of a step.

    encode: inputs -> (n, E), differentiable in the model's parameters. `vectors` (N, E) is a leaf in the order of the
    input: compute a loss from it, call its `backward`, then `backward` here adds to the parameters' gradients.
    padded: whether `encode` pads, so that padding counts for `micro_batch_tokens`. encode_keeping_less: the same as
    `encode` with the same results, for a graph of less memory. `kept_share` is the share of micro-batches that kept
    their graph, `padded_tokens` the number of tokens computed on.
    """

    def __init__(
        self,
        encode: Callable[[Inputs], Tensor],
        tokens: Inputs,
        key: RandomKey,
        *,
        micro_batch_tokens: int,
        activation_bytes: int,
        padded: bool = True,
        encode_keeping_less: Callable[[Inputs], Tensor] | None = None,
    ) -> None:
        self._encode, self._tokens, self._key = encode, tokens, key
        self._encode_keeping_less = encode_keeping_less
        self._rows = micro_batches(tokens.lengths, micro_batch_tokens, padded=padded)
        self._graphs: dict[int, Tensor] = {}
        lengths = tokens.lengths
        sizes = [len(rows) * int(lengths[rows[0]]) if padded else int(lengths[rows].sum()) for rows in self._rows]
        self.padded_tokens = sum(sizes)
        # The first micro-batch is measured: what the largest keeps, in units of it.
        self._largest = max(sizes, default=0) / max(1, sizes[0] if sizes else 0)
        self.vectors = self._forward(activation_bytes)
        self.kept_share = len(self._graphs) / max(1, len(self._rows))

    def backward(self) -> None:
        gradient = self.vectors.grad
        assert gradient is not None, "the loss must have been differentiated first"
        for number, rows in enumerate(self._rows):
            vectors = self._graphs.pop(number, None)
            if vectors is None:
                self._key.apply(number)
                vectors = self._encode(self._tokens.take(rows))
            vectors.backward(gradient[torch.from_numpy(rows).to(gradient.device)])

    def _forward(self, activation_bytes: int) -> Tensor:
        parts: list[Tensor] = []
        encode, room, largest = self._encode, activation_bytes, 0
        for number, rows in enumerate(self._rows):
            self._key.apply(number)
            tokens = self._tokens.take(rows)
            if room < max(largest, 1):
                with torch.no_grad():
                    parts.append(encode(tokens))
                continue
            if largest:
                vectors = encode(tokens)
            else:
                with _counting_saved() as saved:
                    vectors = encode(tokens)
                largest = int(saved.bytes * self._largest)
                if self._encode_keeping_less and largest * len(self._rows) > activation_bytes:
                    # The first of those that keep less is measured in turn.
                    encode, self._encode_keeping_less = self._encode_keeping_less, None
                    room, largest = room - largest, 0
            room -= largest
            self._graphs[number] = vectors
            parts.append(vectors.detach())
        order = np.concatenate(self._rows)
        gathered = torch.cat(parts)
        vectors = torch.empty_like(gathered)
        vectors[torch.from_numpy(order).to(gathered.device)] = gathered
        return vectors.requires_grad_()


class _Saved:
    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        # Parameters and views of them take no memory of their own here; views of one storage are one allocation.
        owner = tensor if tensor._base is None else tensor._base
        is_parameter = owner.is_leaf and owner.requires_grad
        storage = tensor.untyped_storage()
        if not is_parameter and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def _counting_saved() -> Iterator[_Saved]:
    """Count the bytes that autograd saves for the backward pass."""
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved

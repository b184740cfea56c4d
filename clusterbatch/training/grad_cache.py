"""Gradient cache (GradCache, Gao 2021): embed a large batch within bounded memory, with the exact gradient.

The batch goes through the encoder in micro-batches of like lengths. As long as activations fit the memory that is
allowed, a micro-batch keeps its graph and the backward pass is the plain one; what does not fit is embedded without a
graph and computed once more when its gradient is known. A batch that fits pays nothing.

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
    `kept_share` is the share of micro-batches that kept their graph.
    """

    def __init__(
        self,
        encode: Callable[[Inputs], Tensor],
        tokens: Inputs,
        key: RandomKey,
        *,
        micro_batch_tokens: int,
        activation_bytes: int,
    ) -> None:
        self._encode, self._tokens, self._key = encode, tokens, key
        self._rows = micro_batches(tokens.lengths, micro_batch_tokens)
        self._graphs: dict[int, Tensor] = {}
        self.padded_tokens = sum(len(rows) * int(tokens.lengths[rows[0]]) for rows in self._rows)
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
        # Longest rows come first, so the first micro-batch is as large as any: what it keeps bounds the others.
        room, largest = activation_bytes, 0
        for number, rows in enumerate(self._rows):
            self._key.apply(number)
            tokens = self._tokens.take(rows)
            if room < max(largest, 1):
                with torch.no_grad():
                    parts.append(self._encode(tokens))
                continue
            if largest:
                vectors = self._encode(tokens)
            else:
                with _counting_saved() as saved:
                    vectors = self._encode(tokens)
                largest = saved.bytes
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
        # Parameters take no memory of their own here; views of one storage are one allocation.
        storage = tensor.untyped_storage()
        if not tensor.is_leaf and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def _counting_saved() -> Iterator[_Saved]:
    """Count the bytes that autograd saves for the backward pass."""
    saved = _Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved

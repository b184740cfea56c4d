"""Inputs of an encoder: texts, images, or rows of both. All have a length, rows to take, and a cost per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clusterbatch.encoder.images import Pixels
from clusterbatch.encoder.tokens import Tokens


@dataclass(frozen=True)
class Mixed:
    """N rows of texts and images in one order. is_image: (N,) bool; the texts, and the images, are in that order."""

    tokens: Tokens
    pixels: Pixels
    is_image: np.ndarray

    def __len__(self) -> int:
        return len(self.is_image)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64."""
        lengths = np.empty(len(self), np.int64)
        lengths[~self.is_image] = self.tokens.lengths
        lengths[self.is_image] = self.pixels.lengths
        return lengths

    def take(self, rows: np.ndarray) -> Mixed:
        rows = np.asarray(rows, dtype=np.int64)
        # The number of each row among those of its kind.
        number = np.where(self.is_image, np.cumsum(self.is_image), np.cumsum(~self.is_image)) - 1
        taken = self.is_image[rows]
        return Mixed(self.tokens.take(number[rows[~taken]]), self.pixels.take(number[rows[taken]]), self.is_image[rows])


Inputs = Tokens | Pixels | Mixed


def concatenate(parts: Sequence[Tokens | Pixels]) -> Inputs:
    """The rows of all parts, one part after the other."""
    texts = [part for part in parts if isinstance(part, Tokens)]
    images = [part for part in parts if isinstance(part, Pixels)]
    if not images:
        return Tokens.concatenate(texts)
    pixels = Pixels(np.concatenate([part.values for part in images]), images[0].each)
    if not texts:
        return pixels
    is_image = np.concatenate([np.full(len(part), isinstance(part, Pixels)) for part in parts])
    return Mixed(Tokens.concatenate(texts), pixels, is_image)


def token_ids(inputs: Inputs) -> np.ndarray:
    """All token ids of the texts among them."""
    if isinstance(inputs, Pixels):
        return np.empty(0, np.int32)
    return inputs.tokens.values if isinstance(inputs, Mixed) else inputs.values

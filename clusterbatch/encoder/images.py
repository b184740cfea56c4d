"""Preparation of images for an image tower: decoded, resized and cropped as its processor says, not yet normalised.

Before a processor scales the numbers, an image is uint8: a quarter of the bytes that the tower takes. Resizing is the
work of CPUs and is done ahead; scaling is done where the tower is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from clusterbatch.corpus.images import ImageError, open_image
from clusterbatch.encoder.model_files import Layout
from clusterbatch.encoder.untrusted_files import read_config
from clusterbatch.errors import DataError, UsageError, first_line


@dataclass(frozen=True)
class Pixels:
    """N images for one tower.

    values: (N, 3, H, W) uint8; each: what one costs, in tokens of the tower (its patches and its class token).
    """

    values: np.ndarray
    each: int

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) int64 lengths by which micro-batches are made, as of texts."""
        return np.full(len(self), self.each, np.int64)

    @property
    def hashes(self) -> np.ndarray:
        """(N,) uint64: two images with equal pixels are one image to the model."""
        return np.fromiter((xxhash.xxh3_64_intdigest(image.tobytes()) for image in self.values), np.uint64, len(self))

    def take(self, rows: np.ndarray) -> Pixels:
        """The images at `rows` (any order, repeats allowed)."""
        return Pixels(self.values[np.asarray(rows, dtype=np.int64)], self.each)

    def slice(self, start: int, end: int) -> Pixels:
        return Pixels(self.values[start:end], self.each)

    def to_arrow(self) -> pa.FixedSizeListArray:
        flat = pa.array(self.values.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(self.values.shape[1:])))


class ImageProcessor:
    """The image processor in a model's folder, as transformers reads it, with Pillow alone."""

    def __init__(self, layout: Layout) -> None:
        self._folder = str(layout.module)
        vision = read_config(layout.module)["vision_config"]
        self._each = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
        # Its files state the size of its images in many ways, so the processor is asked.
        blank = np.zeros((4, 4, 3), np.uint8)
        self._shape = self._processed([blank]).shape[1:]

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        try:
            # The other backend needs torchvision, and gives other pixels.
            return AutoImageProcessor.from_pretrained(
                self._folder, local_files_only=True, trust_remote_code=False, backend="pil"
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(f"{self._folder}: image processor cannot be loaded ({first_line(error)})") from error

    @property
    def fingerprint(self) -> str:
        """Fingerprint that changes if any image could get other pixels."""
        return str(self._processor.to_json_string())

    def pixels(self, images: Iterable[bytes]) -> Pixels:
        """Turn encoded images into pixels. Raises DataError if one cannot be decoded (ingest has decoded them all)."""
        prepared = [self._prepared(image) for image in images]
        empty = np.empty((0, *self._shape), np.uint8)
        return Pixels(np.concatenate([empty, *prepared]), self._each)

    def from_arrow(self, column: pa.FixedSizeListArray) -> Pixels:
        values = column.flatten().to_numpy(zero_copy_only=False)
        return Pixels(values.reshape(len(column), *self._shape), self._each)

    def normalised(self, pixels: Pixels, device: torch.device) -> Tensor:
        """(N, 3, H, W) float32: scaled and centred as the processor would."""
        processor = self._processor
        values = torch.from_numpy(pixels.values).to(device).float()
        if processor.do_rescale:
            values = values * processor.rescale_factor
        if processor.do_normalize:
            mean, std = (
                torch.tensor(numbers, device=device)[:, None, None]
                for numbers in (processor.image_mean, processor.image_std)
            )
            values = (values - mean) / std
        return values

    def save(self, folder: str) -> None:
        self._processor.save_pretrained(folder)

    def _prepared(self, image: bytes) -> np.ndarray:
        try:
            opened = open_image(image)
        except ImageError as error:
            raise DataError(f"an image cannot be decoded: {error}") from error
        return self._processed([np.asarray(opened.convert("RGB"))])

    def _processed(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(N, 3, H, W) uint8."""
        output = self._processor(
            list(images), do_rescale=False, do_normalize=False, return_tensors="np", input_data_format="channels_last"
        )
        values = output["pixel_values"]
        if values.ndim != 4 or values.dtype != np.uint8:
            raise UsageError(f"{self._folder}: an image processor that makes no plain pixels is not supported")
        return np.asarray(values)

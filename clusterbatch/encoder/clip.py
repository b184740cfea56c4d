"""CLIP-like encoders: a tower for texts and one for images, with vectors in one space (Radford 2021, arXiv 2103.00020).

The towers are those of transformers, called one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clusterbatch.corpus.images import image_bytes, is_data_uri
from clusterbatch.encoder.images import ImageProcessor, Pixels
from clusterbatch.encoder.inputs import Inputs
from clusterbatch.encoder.model import Encoder, padded
from clusterbatch.encoder.model_files import read_layout
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError, UsageError


class TowersEncoder(Encoder):
    """Texts and images to unit vectors of one space. `images` prepares the images."""

    images: ImageProcessor

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Tokenizer,
        images: ImageProcessor,
        *,
        max_tokens: int | None,
        prompts: dict[str, str],
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__(
            "towers",
            backbone,
            tokenizer,
            pooling="",
            max_tokens=max_tokens,
            prompts=prompts,
            truncate_dim=truncate_dim,
        )
        self.images = images

    @property
    def _computed_dimensions(self) -> int:
        return int(self.backbone.config.projection_dim)  # type: ignore[union-attr,arg-type]

    @property
    def preparation(self) -> str:
        return f"{self.tokenizer.fingerprint} {self.images.fingerprint}"

    def prepare(self, texts: Sequence[str], max_tokens: int | None, prompt: str = "") -> Tokens | Pixels:
        """Prepare texts or images. Raises DataError if only some are images: texts would be compared with images."""
        are_images = sum(map(is_data_uri, texts))
        if not are_images:
            return super().prepare(texts, max_tokens, prompt)
        if are_images < len(texts):
            raise DataError(f"{are_images} of {len(texts)} queries or documents are images: expected all or none")
        return self.images.pixels(map(image_bytes, texts))

    def freeze_unused(self, images: Sequence[str]) -> None:
        """Freeze a tower that no side of the pairs goes through: weight decay alone would shrink it.

        images: the sides that are images.
        """
        model: Any = self.backbone
        if not images:
            model.vision_model.requires_grad_(False)
            model.visual_projection.requires_grad_(False)
        if len(set(images)) == 2:
            model.text_model.requires_grad_(False)
            model.text_projection.requires_grad_(False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Return (N, d) float32 unit vectors, differentiable; each row goes through the tower of its kind."""
        if isinstance(inputs, Tokens):
            return self._of_texts(inputs)
        if isinstance(inputs, Pixels):
            return self._of_images(inputs)
        parts = []
        if len(inputs.tokens):
            parts.append(self._of_texts(inputs.tokens))
        if len(inputs.pixels):
            parts.append(self._of_images(inputs.pixels))
        # Texts first, images after them; back to the order of the rows.
        order = np.argsort(inputs.is_image, kind="stable")
        place = torch.from_numpy(np.argsort(order, kind="stable")).to(self.device)
        return torch.cat(parts)[place]

    def _of_texts(self, tokens: Tokens) -> Tensor:
        ids_NL, lengths_N = padded(tokens, self.tokenizer.padding)
        mask_NL = torch.from_numpy((np.arange(ids_NL.shape[1]) < lengths_N[:, None]).astype(np.int64))
        features = self.backbone.get_text_features(  # type: ignore[operator]
            input_ids=torch.from_numpy(ids_NL).to(self.device), attention_mask=mask_NL.to(self.device)
        )
        return self._finished(features.pooler_output.float())

    def _of_images(self, pixels: Pixels) -> Tensor:
        values = self.images.normalised(pixels, self.device).to(next(self.backbone.parameters()).dtype)
        features = self.backbone.get_image_features(pixel_values=values)  # type: ignore[operator]
        return self._finished(features.pooler_output.float())


def image_processor(folder: str, key: str) -> ImageProcessor:
    """Return the processor of the model in `folder`, configured as `key`; raises UsageError if it has none."""
    layout = read_layout(folder)
    if layout.kind != "towers":
        raise UsageError(f"{key}: {folder} has no tower for images, and corpus.columns.images says that there are some")
    return ImageProcessor(layout)

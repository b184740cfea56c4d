"""Two towers, one for texts and one for images, whose vectors lie in one space: models in the manner of CLIP.

CLIP: Radford 2021, arXiv 2103.00020. The towers are those of transformers; what is asked of them is that a text's and
an image's features can be had each for itself.
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
from clusterbatch.encoder.model import Encoder, load_transformer, padded, unit
from clusterbatch.encoder.model_files import Layout, read_layout
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
    ) -> None:
        super().__init__("towers", backbone, tokenizer, pooling="", max_tokens=max_tokens, prompts=prompts)
        self.images = images

    @property
    def dimensions(self) -> int:
        return int(self.backbone.config.projection_dim)  # type: ignore[union-attr,arg-type]

    @property
    def preparation(self) -> str:
        return f"{self.tokenizer.fingerprint} {self.images.fingerprint}"

    def prepare(self, texts: Sequence[str], max_tokens: int | None, prompt: str = "") -> Tokens | Pixels:
        """Raises DataError where only some of them are images: they would be compared across the towers."""
        are_images = sum(map(is_data_uri, texts))
        if not are_images:
            return super().prepare(texts, max_tokens, prompt)
        if are_images < len(texts):
            raise DataError(f"{are_images} of {len(texts)} queries or documents are images: expected all or none")
        return self.images.pixels(map(image_bytes, texts))

    def freeze_unused(self, images: Sequence[str]) -> None:
        """A tower that no side of the pairs goes through stays as it is: weight decay alone would shrink it.

        `images`: the sides that are images.
        """
        model: Any = self.backbone
        if not images:
            model.vision_model.requires_grad_(False)
            model.visual_projection.requires_grad_(False)
        if len(set(images)) == 2:
            model.text_model.requires_grad_(False)
            model.text_projection.requires_grad_(False)

    def forward(self, inputs: Inputs) -> Tensor:
        """(N, d) float32 unit vectors, differentiable; each row through the tower of its kind."""
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
        return unit(features.pooler_output.float())

    def _of_images(self, pixels: Pixels) -> Tensor:
        values = self.images.normalised(pixels, self.device).to(next(self.backbone.parameters()).dtype)
        features = self.backbone.get_image_features(pixel_values=values)  # type: ignore[operator]
        return unit(features.pooler_output.float())


def load_towers(layout: Layout, dtype: torch.dtype, device: str | torch.device) -> TowersEncoder:
    """In evaluation mode. Raises DataError or UsageError when it cannot be loaded."""
    images = ImageProcessor(layout)
    tokenizer = Tokenizer(layout.folder)
    backbone = load_transformer(layout, dtype)
    # The loss has a temperature of its own.
    backbone.logit_scale.requires_grad_(False)  # type: ignore[union-attr,operator]
    backbone = backbone.to(device=device, dtype=dtype).eval()
    return TowersEncoder(backbone, tokenizer, images, max_tokens=layout.max_tokens, prompts=layout.prompts).eval()


def image_processor(folder: str, key: str) -> ImageProcessor:
    """Of the model in `folder`, which the configuration names under `key`; raises UsageError where it has none."""
    layout = read_layout(folder)
    if layout.kind != "towers":
        raise UsageError(f"{key}: {folder} has no tower for images, and corpus.columns.images says that there are some")
    return ImageProcessor(layout)

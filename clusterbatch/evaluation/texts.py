"""Texts (or images) that several encoders embed: those with the same tokenizer share the tokens."""

from __future__ import annotations

from typing import Literal

import torch

from clusterbatch.encoder.layout import shorter
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.pixels import Pixels
from clusterbatch.encoder.tokens import Tokens


class Texts:
    """N queries or documents; tokens are made once for all encoders that would make the same."""

    def __init__(self, kind: Literal["query", "document"], texts: list[str], max_tokens: int) -> None:
        self._kind: Literal["query", "document"] = kind
        self.texts, self._max_tokens = texts, max_tokens
        self._tokens: dict[tuple[str, int | None, str], Tokens | Pixels] = {}

    def tokens(self, encoder: Encoder) -> Tokens | Pixels:
        """Cut to the evaluation's limit or the model's own, whichever is shorter, behind the model's own prompt."""
        prompt = encoder.prompts[self._kind]
        key = (encoder.preparation, shorter(self._max_tokens, encoder.max_tokens), prompt)
        if key not in self._tokens:
            self._tokens[key] = encoder.prepare(self.texts, self._max_tokens, prompt)
        return self._tokens[key]

    def vectors(self, encoder: Encoder, batch_tokens: int) -> torch.Tensor:
        """(N, D) float32 unit vectors on the encoder's device."""
        return torch.from_numpy(encoder.encode(self.tokens(encoder), batch_tokens)).to(encoder.device)

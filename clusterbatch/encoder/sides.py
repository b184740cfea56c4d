"""The two sides of a pair, and the tokenizer of a model with the prompt and the length limit of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clusterbatch.encoder.model_files import check_prompts, read_layout, shorter
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")


@dataclass(frozen=True)
class SideTokenizer:
    """Turn queries and documents into tokens for one model. Picklable.

    prompts: put before each text, by side, and by `source-side` for sources with a prompt of their own. max_tokens: the
    length to which texts are cut, special tokens included, by side; None: no limit.
    """

    tokenizer: Tokenizer
    prompts: Mapping[str, str]
    max_tokens: Mapping[Side, int | None]

    @classmethod
    def of_model(
        cls,
        folder: str,
        max_tokens: Mapping[Side, int | None],
        prompts: Mapping[Any, str] | None = None,
        *,
        special_tokens: bool | None = None,
    ) -> SideTokenizer:
        """Return the tokenizer of the model in `folder`.

        The model's own limit applies if it is shorter than `max_tokens`. prompts: None: the model's own.
        special_tokens: None: as the model is made.

        Raises UsageError if there are prompts and the model does not pool their tokens.
        """
        layout = read_layout(folder)
        check_prompts(layout, prompts or {})
        special = layout.kind != "static" if special_tokens is None else special_tokens
        limits: dict[Side, int | None] = {side: shorter(max_tokens[side], layout.max_tokens) for side in SIDES}
        return cls(Tokenizer(folder, special_tokens=special), prompts or layout.prompts, limits)

    def tokens(self, texts: Sequence[str], side: Side, sources: Sequence[str] | None = None) -> Tokens:
        """Return the token ids (int32) of each text behind the prompt of its side, or of its source and side.

        sources: the source of each text; None: prompts of sources are not used. Raises UsageError if a prompt leaves no
        room for text.
        """
        if sources is None:
            return self.tokenizer.encode(texts, self.max_tokens[side], self.prompts[side])
        prompts = {source: self.prompts.get(f"{source}-{side}", self.prompts[side]) for source in set(sources)}
        limit = self.max_tokens[side]
        for prompt in set(prompts.values()):
            self.tokenizer.check_room(limit, prompt)
        asked = [prompts[source] + text for source, text in zip(sources, texts, strict=True)]
        return self.tokenizer.encode(asked, limit)

    def unknown(self, tokens: Tokens) -> np.ndarray:
        """Return (N, 2) int64: unknown tokens and tokens of each text, special ones not counted."""
        lengths = tokens.lengths - self.tokenizer.added
        if self.tokenizer.unknown is None:
            return np.stack([np.zeros_like(lengths), lengths], axis=1)
        running = np.concatenate([[0], np.cumsum(tokens.values == self.tokenizer.unknown)])
        return np.stack([running[tokens.offsets[1:]] - running[tokens.offsets[:-1]], lengths], axis=1)

"""Limits on the tokens of a text that special tokens and a prompt alone would fill: all vectors would be equal."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clusterbatch.config import RunConfig, StorageConfig
from clusterbatch.encoder.model_files import Kind, read_layout, shorter
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.sides import SIDES, Side
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.errors import about

# No tokenizer puts so many special tokens around a text.
_SPECIAL_TOKENS = 32


@dataclass(frozen=True)
class TextLimit:
    """Tokens to which the texts of a side are cut, by the configuration key `key`; None: the model's own limit alone.

    prompts: by side, and by `source-side` for sources with a prompt of their own, in place of those in the model's
    files.
    """

    key: str
    tokens: int | None
    side: Side
    prompts: Mapping[str, str] = field(default_factory=dict)

    def prompts_of_side(self, own: Mapping[str, str]) -> list[str]:
        """Return the prompts that texts of the side get. own: those in the model's files."""
        named = {**own, **self.prompts}
        of_side = {text for name, text in named.items() if name == self.side or name.endswith(f"-{self.side}")}
        return sorted(of_side | {""})


def embedding_limits(config: RunConfig) -> list[TextLimit]:
    """Return the limits of the stage `embed` on texts."""
    prompts = _given({"query": config.embed.query_prompt, "document": config.embed.document_prompt})
    return [TextLimit("embed.max_tokens", config.embed.max_tokens, side, prompts) for side in _text_sides(config)]


def training_limits(config: RunConfig) -> list[TextLimit]:
    """Return the limits of the stage `train`, for which `cluster` tokenises."""
    limits = {"query": config.train.max_query_tokens, "document": config.train.max_document_tokens}
    prompts = config.train.named_prompts
    return [TextLimit(f"train.max_{side}_tokens", limits[side], side, prompts) for side in _text_sides(config)]


def evaluation_limits(config: RunConfig, prompts: Mapping[str, str]) -> list[TextLimit]:
    """Return the limits of evaluations of a model with these prompts in place of its own."""
    limits = {"query": config.evaluate.max_query_tokens, "document": config.evaluate.max_document_tokens}
    return [TextLimit(f"evaluate.max_{side}_tokens", limits[side], side, prompts) for side in _text_sides(config)]


def starting_model_limits(config: RunConfig) -> list[TextLimit]:
    """Return the limits of training and of evaluations of `train.model`, which get the same prompts.

    Prompts of single sources are of training alone.
    """
    return [*training_limits(config), *evaluation_limits(config, _given(config.train.prompts.model_dump()))]


def scoring_limits(config: RunConfig) -> list[TextLimit]:
    """Return the limits of the stage `score` with an embedding model, which gets its own prompts."""
    return [TextLimit("score.max_tokens", config.score.max_tokens, side) for side in SIDES]


def check_limits(
    name: str, storage: StorageConfig | None, limits: Sequence[TextLimit], kind: Kind | None = None
) -> None:
    """Raise UsageError if special tokens and a prompt leave no room for text within a limit, or the model's own.

    name, storage: as for `resolve_model`; kind: as for `load_encoder`.
    """
    folder = resolve_model(name, storage)
    layout = read_layout(folder)
    tokenizer = None
    for limit in limits:
        tokens = shorter(limit.tokens, layout.max_tokens)
        for prompt in limit.prompts_of_side(layout.prompts):
            if tokens is None or tokens > _most_tokens(prompt):
                continue
            # Loaded only when needed: for a transformer it imports transformers, which takes seconds.
            tokenizer = tokenizer or Tokenizer(folder, special_tokens=(kind or layout.kind) != "static")
            with about(limit.key if tokens == limit.tokens else f"{folder} (its longest input)"):
                tokenizer.check_room(tokens, prompt)


def _most_tokens(prompt: str) -> int:
    """Return more tokens than a prompt and the special ones can be: no tokenizer makes several of a byte."""
    return _SPECIAL_TOKENS + len(unicodedata.normalize("NFKD", prompt).encode(errors="replace"))


def _text_sides(config: RunConfig) -> list[Side]:
    """Return the sides that are not images, which have neither tokens nor a prompt."""
    return [side for side in SIDES if side not in config.corpus.columns.images]


def _given(prompts: Mapping[str, str | None]) -> dict[str, str]:
    return {side: prompt for side, prompt in prompts.items() if prompt is not None}

"""The encoder: token ids in, unit vectors out. The same module embeds corpora and is trained.

Pooling and normalisation are in fp32 whatever the backbone computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clusterbatch.encoder.model_files import DenseLayout, Kind, shorter
from clusterbatch.encoder.packed import PackedStates, mean_divisor, pool_packed
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens, micro_batches
from clusterbatch.errors import DataError

if TYPE_CHECKING:
    # The encoder of texts runs on a machine that has only torch and transformers.
    from clusterbatch.encoder.images import ImageProcessor, Pixels


def pool(states_NLD: Tensor, lengths_N: Tensor, mode: str) -> Tensor:
    """Pool right-padded states (N, L, d) to (N, d) float32, or (N, m d) if `mode` joins m modes by plus signs.

    lengths (N,): at least 1; mode: see POOLING_MODES.
    """
    if "+" in mode:
        return torch.cat([pool(states_NLD, lengths_N, each) for each in mode.split("+")], dim=1)
    if mode == "cls":
        return states_NLD[:, 0].float()
    if mode == "lasttoken":
        return states_NLD[torch.arange(len(states_NLD), device=states_NLD.device), lengths_N - 1].float()
    positions = torch.arange(states_NLD.shape[1], device=states_NLD.device)
    padding_NL1 = (positions >= lengths_N[:, None])[..., None]
    if mode == "max":
        return states_NLD.masked_fill(padding_NL1, -torch.inf).amax(dim=1).float()
    states_NLD = states_NLD.masked_fill(padding_NL1, 0.0)
    if mode == "weightedmean":
        states_NLD = states_NLD.float() * (positions + 1)[:, None]
    return states_NLD.sum(dim=1, dtype=torch.float32) / mean_divisor(lengths_N, mode)[:, None]


class Dense(nn.Module):
    """A linear layer behind the pooling; names of its weights are those of Sentence Transformers' module."""

    def __init__(self, layout: DenseLayout) -> None:
        super().__init__()
        self.layout = layout
        self.linear = nn.Linear(layout.in_features, layout.out_features, layout.bias)
        self.activation = getattr(nn, layout.activation)()
        if layout.residual and layout.in_features != layout.out_features:
            self.residual = nn.Linear(layout.in_features, layout.out_features, bias=False)

    def forward(self, vectors_ND: Tensor) -> Tensor:
        """Compute in float32, whatever the backbone computes in: (N, in) -> (N, out)."""
        with torch.autocast(vectors_ND.device.type, enabled=False):
            found: Tensor = self.activation(self.linear(vectors_ND))
            if self.layout.residual:
                found = found + (self.residual(vectors_ND) if hasattr(self, "residual") else vectors_ND)
        return found


def unit(vectors_ND: Tensor) -> Tensor:
    """Scale rows to length 1. A zero row (a text without any known token) becomes a fixed unit vector."""
    norms_N1 = vectors_ND.norm(dim=-1, keepdim=True)
    fixed = torch.full_like(vectors_ND, vectors_ND.shape[-1] ** -0.5)
    # A row with a NaN keeps it: whoever reads the vectors must see that something is wrong.
    return torch.where(norms_N1 <= 1e-12, fixed, vectors_ND / norms_N1.clamp_min(1e-12))


class Encoder(nn.Module):
    """A backbone with pooling and Dense modules, or a static encoder; always ends in vectors of length 1.

    tokenizer, prompts ('query', 'document'), max_tokens and truncate_dim belong to the model and are saved with it;
    the caller chooses the prompt that is put before a text. truncate_dim: only the first dimensions of a vector are
    used; None: all. Dropout follows `train()` and `eval()`, as in any module.
    """

    def __init__(
        self,
        kind: Kind,
        backbone: nn.Module,
        tokenizer: Tokenizer,
        *,
        pooling: str,
        max_tokens: int | None,
        prompts: dict[str, str],
        truncate_dim: int | None = None,
        dense: Sequence[Dense] = (),
    ) -> None:
        super().__init__()
        self.kind = kind
        self.backbone = backbone
        self.dense = nn.Sequential(*dense)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.prompts = prompts
        self.truncate_dim = truncate_dim
        # Prepares images, if there is a tower for them.
        self.images: ImageProcessor | None = None
        # Computes states without padding; see load.drop_padding.
        self.packed: PackedStates | None = None

    @property
    def dimensions(self) -> int:
        return min(self._computed_dimensions, self.truncate_dim or self._computed_dimensions)

    @property
    def _computed_dimensions(self) -> int:
        if isinstance(self.backbone, nn.EmbeddingBag):
            return int(self.backbone.embedding_dim)
        if len(self.dense):
            return self.dense[-1].layout.out_features  # type: ignore[union-attr,return-value]
        return self.pooled_dimensions

    @property
    def pooled_dimensions(self) -> int:
        """Dimensions of what a backbone's pooling gives."""
        return int(self.backbone.config.hidden_size) * len(self.pooling.split("+"))  # type: ignore[union-attr,arg-type]

    @property
    def _embeddings(self) -> int:
        table = self.backbone if isinstance(self.backbone, nn.EmbeddingBag) else self.backbone.get_input_embeddings()  # type: ignore[operator]
        return int(table.num_embeddings)  # type: ignore[union-attr,arg-type]

    @property
    def unpadded(self) -> bool:
        """True if it runs without padding (see `load_encoder`)."""
        return self.packed is not None

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the backbone's weights."""
        return next(self.backbone.parameters()).dtype

    @property
    def preparation(self) -> str:
        """Fingerprint of `prepare`: encoders with the same one prepare alike."""
        return self.tokenizer.fingerprint

    def prepare(self, texts: Sequence[str], max_tokens: int | None, prompt: str = "") -> Tokens | Pixels:
        """Turn texts into what `encode` takes; with a tower for images also images, written as data URIs.

        Cut to `max_tokens` or the model's own limit, whichever is shorter.
        """
        return self.tokenizer.encode(texts, shorter(max_tokens, self.max_tokens), prompt)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return (N, d) float32 unit vectors, differentiable; padded no further than the longest text given.

        Raises DataError for token ids that the model has no embeddings for.
        """
        largest = int(tokens.values.max(initial=0))
        if largest >= self._embeddings:
            raise DataError(
                f"{self.tokenizer.folder}: its tokenizer made token {largest}, its weights hold embeddings of "
                f"{self._embeddings:,} tokens"
            )
        if self.kind == "static":
            values = torch.from_numpy(tokens.values.astype(np.int64)).to(self.device)
            starts = torch.from_numpy(tokens.offsets[:-1]).to(self.device)
            return self._finished(self.backbone(values, starts).float())
        if self.packed:
            tokens = _without_empty(tokens, self.tokenizer.padding)
            states_TD = self.packed(tokens.values, tokens.offsets)
            return self._finished(pool_packed(states_TD, tokens.offsets, self.pooling))
        ids_NL, lengths_N = padded(tokens, self.tokenizer.padding)
        mask_NL = None
        if lengths_N.min() < ids_NL.shape[1]:
            # Of integers, as tokenizers make it: some architectures compute with it.
            mask_NL = torch.from_numpy((np.arange(ids_NL.shape[1]) < lengths_N[:, None]).astype(np.int64))
            mask_NL = mask_NL.to(self.device)
        # Without padding there is no mask: attention then takes its fastest path.
        states_NLD = self.backbone(
            input_ids=torch.from_numpy(ids_NL).to(self.device), attention_mask=mask_NL
        ).last_hidden_state
        return self._finished(pool(states_NLD, torch.from_numpy(lengths_N).to(self.device), self.pooling))

    def _finished(self, vectors_ND: Tensor) -> Tensor:
        return unit(self.dense(vectors_ND)[:, : self.dimensions])

    def encode(self, tokens: Tokens | Pixels, batch_tokens: int) -> np.ndarray:
        """Return (N, d) float32 unit vectors in input order, from micro-batches of at most `batch_tokens` tokens.

        For inference: no gradients, dropout off. A row's vector depends, in its last bits, on the other rows of its
        micro-batch, and those depend on `tokens` alone.
        """
        vectors = np.empty((len(tokens), self.dimensions), np.float32)
        batches = micro_batches(tokens.lengths, batch_tokens)
        if not batches:
            return vectors
        with _evaluating(self), torch.inference_mode():
            # Fetched at the end: a GPU computes one micro-batch while the next is put together.
            found = torch.cat([self(tokens.take(rows)) for rows in batches])
        vectors[np.concatenate(batches)] = found.cpu().numpy()
        return vectors


def padded(tokens: Tokens, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (N, L) int64, right-padded, and lengths (N,); an empty text becomes one padding token, attended to."""
    longest = max(1, int(tokens.lengths.max(initial=0)))
    ids = np.full((len(tokens), longest), padding, np.int64)
    ids[np.arange(longest) < tokens.lengths[:, None]] = tokens.values
    return ids, np.maximum(tokens.lengths, 1)


def _without_empty(tokens: Tokens, padding: int) -> Tokens:
    """Replace each empty text by one padding token."""
    empty = tokens.lengths == 0
    if not empty.any():
        return tokens
    values = np.insert(tokens.values, tokens.offsets[:-1][empty], padding)
    return Tokens(values, np.concatenate([[0], np.cumsum(np.maximum(tokens.lengths, 1))]))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)

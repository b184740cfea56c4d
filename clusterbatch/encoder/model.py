"""The encoder: token ids in, unit vectors out. The same module embeds corpora and is trained.

From token states to one vector a text, in fp32 whatever the backbone computes in.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clusterbatch.encoder.model_files import Kind, Layout, read_layout, shorter
from clusterbatch.encoder.packed import PackedStates, pack, pool_packed
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens, micro_batches
from clusterbatch.errors import DataError, UsageError


def pool(states_NLD: Tensor, lengths_N: Tensor, mode: str) -> Tensor:
    """(N, d) float32 of right-padded states (N, L, d); lengths (N,) are at least 1. mode: cls, mean or lasttoken."""
    if mode == "cls":
        return states_NLD[:, 0].float()
    if mode == "lasttoken":
        return states_NLD[torch.arange(len(states_NLD), device=states_NLD.device), lengths_N - 1].float()
    positions = torch.arange(states_NLD.shape[1], device=states_NLD.device)
    padding_NL1 = (positions >= lengths_N[:, None])[..., None]
    return states_NLD.masked_fill(padding_NL1, 0.0).sum(dim=1, dtype=torch.float32) / lengths_N[:, None]


def unit(vectors_ND: Tensor) -> Tensor:
    """Rows of length 1. A zero row (a text without any known token) becomes a fixed unit vector."""
    norms_N1 = vectors_ND.norm(dim=-1, keepdim=True)
    fixed = torch.full_like(vectors_ND, vectors_ND.shape[-1] ** -0.5)
    # A row with a NaN keeps it: whoever reads the vectors must see that something is wrong.
    return torch.where(norms_N1 <= 1e-12, fixed, vectors_ND / norms_N1.clamp_min(1e-12))


if TYPE_CHECKING:
    # Imported by towers alone: the encoder of texts runs on a machine that has only torch and transformers.
    from clusterbatch.encoder.images import ImageProcessor, Pixels


class Encoder(nn.Module):
    """A backbone with pooling, or a static encoder; always ends in vectors of length 1.

    tokenizer, prompts ('query', 'document') and max_tokens belong to the model and are saved with it; which prompt
    stands before a text is for the caller to say. Dropout follows `train()` and `eval()`, as in any module.
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
        packed: PackedStates | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_tokens = max_tokens
        self.prompts = prompts
        # Prepares images, where there is a tower for them.
        self.images: ImageProcessor | None = None
        self._packed = packed

    @property
    def dimensions(self) -> int:
        if isinstance(self.backbone, nn.EmbeddingBag):
            return int(self.backbone.embedding_dim)
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @property
    def unpadded(self) -> bool:
        """Whether it runs without padding (see `load_encoder`)."""
        return self._packed is not None

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def preparation(self) -> str:
        """Encoders with the same one prepare alike."""
        return self.tokenizer.fingerprint

    def prepare(self, texts: Sequence[str], max_tokens: int | None, prompt: str = "") -> Tokens | Pixels:
        """What `encode` takes, of texts; with a tower for images also of images, written as data URIs.

        Cut to `max_tokens` or the model's own limit, whichever is shorter.
        """
        return self.tokenizer.encode(texts, shorter(max_tokens, self.max_tokens), prompt)

    def forward(self, tokens: Tokens) -> Tensor:
        """(N, d) float32 unit vectors, differentiable; padded no further than the longest text given."""
        if self.kind == "static":
            values = torch.from_numpy(tokens.values.astype(np.int64)).to(self.device)
            starts = torch.from_numpy(tokens.offsets[:-1]).to(self.device)
            return unit(self.backbone(values, starts).float())
        if self._packed:
            tokens = _without_empty(tokens, self.tokenizer.padding)
            return unit(pool_packed(self._packed(tokens.values, tokens.offsets), tokens.offsets, self.pooling))
        ids_NL, lengths_N = padded(tokens, self.tokenizer.padding)
        mask_NL = None
        if lengths_N.min() < ids_NL.shape[1]:
            mask_NL = torch.from_numpy(np.arange(ids_NL.shape[1]) < lengths_N[:, None]).to(self.device)
        # Without padding there is no mask: attention then takes its fastest path.
        states_NLD = self.backbone(
            input_ids=torch.from_numpy(ids_NL).to(self.device), attention_mask=mask_NL
        ).last_hidden_state
        return unit(pool(states_NLD, torch.from_numpy(lengths_N).to(self.device), self.pooling))

    def encode(self, tokens: Tokens | Pixels, batch_tokens: int) -> np.ndarray:
        """(N, d) float32 unit vectors in input order, computed in micro-batches of at most `batch_tokens` tokens.

        For inference: no gradients, dropout off. A row's vector depends, to the last bits, on what shares its
        micro-batch, and that on `tokens` alone.
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
    """Ids (N, L) int64, right-padded, and lengths (N,) int64; an empty text becomes one padding token, attended to."""
    longest = max(1, int(tokens.lengths.max(initial=0)))
    ids = np.full((len(tokens), longest), padding, np.int64)
    ids[np.arange(longest) < tokens.lengths[:, None]] = tokens.values
    return ids, np.maximum(tokens.lengths, 1)


def _without_empty(tokens: Tokens, padding: int) -> Tokens:
    """An empty text becomes one padding token."""
    empty = tokens.lengths == 0
    if not empty.any():
        return tokens
    values = np.insert(tokens.values, tokens.offsets[:-1][empty], padding)
    return Tokens(values, np.concatenate([[0], np.cumsum(np.maximum(tokens.lengths, 1))]))


def load_encoder(
    folder: str,
    kind: Kind | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = False,
) -> Encoder:
    """The model in `folder`, in evaluation mode.

    kind: unset, what the folder holds; 'static' of a transformer takes only its input token embeddings, mean-pooled
    (the semantics of Sentence Transformers' StaticEmbedding: no special tokens). dtype: of a backbone's weights;
    pooling and normalisation are fp32, and so is a static encoder. packed: for inference alone, without any padding
    where the device and the architecture allow it.

    Raises DataError or UsageError when it cannot be loaded.
    """
    layout = read_layout(folder)
    kind = kind or layout.kind
    if kind == "backbone" and layout.kind == "static":
        raise UsageError(f"{folder}: holds a static encoder, not a transformer")
    if layout.kind == "towers":
        if kind == "static":
            raise UsageError(f"{folder}: has a tower for images, which a static encoder cannot take over")
        from clusterbatch.encoder.clip import load_towers

        return load_towers(layout, dtype, device)
    tokenizer = Tokenizer(folder, special_tokens=kind == "backbone")
    if kind == "static":
        weights = _static_weights(layout)
        if tokenizer.vocabulary > len(weights):
            raise DataError(f"{folder}: {tokenizer.vocabulary} token ids but {len(weights)} embeddings")
        backbone: nn.Module = nn.EmbeddingBag.from_pretrained(weights, freeze=False, mode="mean")
        dtype = torch.float32
    else:
        backbone = load_transformer(layout, dtype)
        if getattr(backbone, "pooler", None) is not None:
            # Its output is not used; without gradients nothing waits for it when they are reduced.
            backbone.pooler.requires_grad_(False)  # type: ignore[union-attr]
    backbone = backbone.to(device=device, dtype=dtype).eval()
    return Encoder(
        kind,
        backbone,
        tokenizer,
        pooling="mean" if kind == "static" else layout.pooling,
        max_tokens=layout.max_tokens,
        prompts=layout.prompts,
        packed=pack(backbone, tokenizer.vocabulary, layout.first_position) if packed and kind == "backbone" else None,
    ).eval()


def _static_weights(layout: Layout) -> Tensor:
    if layout.kind == "static":
        file = layout.module / "model.safetensors"
        try:
            weights = load_file(file)
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be loaded ({error})") from error
        if "embedding.weight" not in weights:
            raise UsageError(f"{layout.module}: static weights without embedding.weight are not supported")
        return weights["embedding.weight"].float()
    embeddings = load_transformer(layout, torch.float32).get_input_embeddings()  # type: ignore[operator]
    return embeddings.weight.detach().clone()


def load_transformer(layout: Layout, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel

    try:
        with quiet():
            # Other formats of weights are pickles.
            return AutoModel.from_pretrained(
                str(layout.module), dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{layout.module}: transformer cannot be loaded ({reason})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bar and the load report that transformers prints for every model."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)

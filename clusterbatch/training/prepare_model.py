"""Changes to a loaded encoder before it is trained, undone before it is written.

One of them is a mean of token embeddings whose backward pass does not write a gradient for every token. Torch's
EmbeddingBag spreads the gradient of each text over its tokens (tokens x dimensions, 46 MB for a batch of 30,000 tokens)
before it adds up by row. The same sum, turned round, is an embedding bag itself: the gradient of a table row is the
weighted sum of the gradients of the texts in which its token stands. That needs only the rows that are touched.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from clusterbatch.config import TrainConfig
from clusterbatch.encoder.devices import bound_kernel_caches, inference_dtype, keep_freed_memory
from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import UsageError, first_line
from clusterbatch.training.bert_layers import BertLayers
from clusterbatch.training.unpadded import IN_TRAINING, unpadded

# A CPU is fastest while a layer's activations stay in its caches; other work is best done in large pieces.
_SMALL, _LARGE = 2048, 65_536
# Compiled products to be kept: those of both passes, for a few numbers of rows.
_KERNELS = 64
_FLOAT32_ATTENTION = "sdpa_float32"


def prepare(encoder: Encoder, config: TrainConfig) -> None:
    """Set dropout, adapters, gradient checkpointing, padding and the token table's kind of gradient; training mode."""
    if config.dropout is not None:
        _set_dropout(encoder, config.dropout)
    if config.gradient_checkpointing:
        # Reentrant checkpointing loses the gradient of inputs that need none, as token ids do.
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if encoder.device.type == "cpu" and computing_dtype(config, encoder) == torch.bfloat16:
        _use_float32_attention(encoder.backbone)
    if config.lora is not None:
        encoder.backbone = _with_adapters(encoder.backbone, config)
    if encoder.device.type == "cpu":
        bound_kernel_caches(_KERNELS)
        keep_freed_memory()
        # A dense gradient of the table would be made, and added, for every micro-batch.
        if isinstance(encoder.backbone, nn.EmbeddingBag):
            encoder.backbone = TokenMean(encoder.backbone)
        else:
            token_table(encoder).sparse = True
    encoder.packed = unpadded(encoder, autocast(config, encoder))
    if config.gradient_checkpointing and isinstance(encoder.packed, BertLayers):
        encoder.packed.keep = "sums"
    encoder.train()


def _set_dropout(encoder: Encoder, probability: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        # Many architectures keep that of their attention as a number (`attention_dropout`, `dropout`, `dropout_prob`).
        numbers = [name for name, value in vars(module).items() if "dropout" in name and type(value) in (int, float)]
        for name in numbers:
            setattr(module, name, probability)


def finish(encoder: Encoder) -> Encoder:
    """Return the encoder as it is to be written: adapters merged, the usual attention, evaluation mode."""
    encoder.packed = None
    if hasattr(encoder.backbone, "merge_and_unload"):
        encoder.backbone = encoder.backbone.merge_and_unload()  # type: ignore[operator]
    backbone: Any = encoder.backbone
    if encoder.kind != "static" and backbone.config._attn_implementation in (_FLOAT32_ATTENTION, IN_TRAINING):
        backbone.set_attn_implementation("sdpa")
    return encoder.eval()


def token_table(encoder: Encoder) -> Any:
    """Return the module that turns token ids into vectors; a batch touches only the rows of its tokens."""
    if isinstance(encoder.backbone, nn.EmbeddingBag):
        return encoder.backbone
    if encoder.kind == "towers":
        return encoder.backbone.text_model.get_input_embeddings()  # type: ignore[union-attr,operator]
    return encoder.backbone.get_input_embeddings()  # type: ignore[operator]


def computing_dtype(config: TrainConfig, encoder: Encoder) -> torch.dtype:
    """Return the dtype of the encoder's products; its weights are always float32."""
    # A static encoder only adds table rows up: nothing to gain, digits to lose.
    return torch.float32 if encoder.kind == "static" else inference_dtype(config.precision, encoder.device)


def autocast(config: TrainConfig, encoder: Encoder) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes the context of one forward pass."""
    if computing_dtype(config, encoder) == torch.float32:
        return nullcontext
    return lambda: torch.autocast(encoder.device.type, dtype=torch.bfloat16)


def micro_batch_tokens(config: TrainConfig, encoder: Encoder) -> int:
    """Return the most tokens of a micro-batch, by kind and device if the configuration leaves it open."""
    if config.micro_batch_tokens is not None:
        return config.micro_batch_tokens
    return _LARGE if encoder.kind == "static" or encoder.device.type != "cpu" else _SMALL


def activation_bytes(config: TrainConfig, device: torch.device) -> int:
    """Return the bytes for activations; if the configuration leaves them open, ask before training takes any."""
    if config.activation_bytes is not None:
        return config.activation_bytes
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 5 * 2**29


def check_adapters(config: TrainConfig) -> None:
    """Raise UsageError if adapters are asked for and peft is not installed."""
    if config.lora is not None and importlib.util.find_spec("peft") is None:
        raise UsageError("train.lora: the package peft is not installed (pip install peft)")


def _use_float32_attention(backbone: nn.Module) -> None:
    """Compute attention in float32 between bfloat16 layers.

    On CPUs the backward pass of bfloat16 attention takes four times as long as that of float32 (torch 2.13), a quarter
    of a step of MiniLM.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        with torch.autocast("cpu", enabled=False):
            attended, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
        return attended.to(query.dtype), None

    if backbone.config._attn_implementation != "sdpa":  # type: ignore[union-attr]
        return
    AttentionInterface.register(_FLOAT32_ATTENTION, forward)
    AttentionMaskInterface.register(_FLOAT32_ATTENTION, sdpa_mask)
    backbone.set_attn_implementation(_FLOAT32_ATTENTION)  # type: ignore[operator]


def _with_adapters(backbone: nn.Module, config: TrainConfig) -> nn.Module:
    assert config.lora is not None
    check_adapters(config)
    import peft

    settings = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.layers or "all-linear",
    )
    # The adapters' first values are drawn at random; all ranks have to draw the same.
    torch.manual_seed(config.seed)
    try:
        return peft.get_peft_model(backbone, settings)
    except ValueError as error:
        raise UsageError(f"train.lora: {first_line(error)}") from error


class TokenMean(nn.EmbeddingBag):
    """nn.EmbeddingBag(mode="mean") whose table gets a sparse gradient of distinct rows. Shares the table of `bag`."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        assert bag.mode == "mean"
        assert bag.padding_idx is None
        super().__init__(bag.num_embeddings, bag.embedding_dim, mode="mean", _weight=bag.weight.detach())
        # The same Parameter, so that every holder of it sees it trained.
        self.weight = bag.weight

    def forward(self, input: Tensor, offsets: Tensor) -> Tensor:  # type: ignore[override]
        """input: (tokens,) ids of all texts; offsets: (texts,) where each begins; result (texts, dimensions)."""
        vectors: Tensor = _TokenMean.apply(self.weight, input, offsets)
        return vectors


class _TokenMean(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        context.save_for_backward(ids, offsets)
        context.rows = len(weight)
        return embedding_bag(ids, weight, offsets, mode="mean")

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ids, offsets = context.saved_tensors
        gradient = gradients[0].contiguous()
        lengths = torch.diff(offsets, append=offsets.new_tensor([len(ids)]))
        text = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        share = lengths.clamp(min=1).to(gradient.dtype).reciprocal()
        # Tokens in the order of the table; stable, so that sums come out the same every time.
        order = torch.argsort(ids, stable=True)
        row, counts = torch.unique_consecutive(ids[order], return_counts=True)
        text = text[order]
        starts = torch.cumsum(counts, 0) - counts
        sums = embedding_bag(text, gradient, starts, mode="sum", per_sample_weights=share[text])
        size = (context.rows, gradient.shape[1])
        found = torch.sparse_coo_tensor(row[None], sums, size, is_coalesced=True, check_invariants=False)
        return found, None, None

"""What is done to a loaded encoder before it is trained, and undone before it is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from clusterbatch.config import TrainConfig
from clusterbatch.encoder.hardware import inference_dtype
from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import UsageError
from clusterbatch.training.token_mean import TokenMean

# A CPU is fastest while a layer's activations stay in its caches; other work is best done in large pieces.
_SMALL, _LARGE = 2048, 65_536
_FLOAT32_ATTENTION = "sdpa_float32"


def prepare(encoder: Encoder, config: TrainConfig) -> None:
    """Sets dropout, adapters, gradient checkpointing and the token table's kind of gradient; training mode."""
    if config.dropout is not None:
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    if config.gradient_checkpointing:
        # Reentrant checkpointing loses the gradient of inputs that need none, as token ids do.
        encoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if encoder.device.type == "cpu" and computing_dtype(config, encoder) == torch.bfloat16:
        _use_float32_attention(encoder.backbone)
    if config.lora is not None:
        encoder.backbone = _with_adapters(encoder.backbone, config)
    if encoder.device.type == "cpu":
        # A dense gradient of the table would be made, and added, anew for every micro-batch.
        if isinstance(encoder.backbone, nn.EmbeddingBag):
            encoder.backbone = TokenMean(encoder.backbone)
        else:
            token_table(encoder).sparse = True
    encoder.train()


def finish(encoder: Encoder) -> Encoder:
    """The encoder as it is to be written: adapters merged, the usual attention, evaluation mode."""
    if hasattr(encoder.backbone, "merge_and_unload"):
        encoder.backbone = encoder.backbone.merge_and_unload()  # type: ignore[operator]
    if encoder.kind != "static" and encoder.backbone.config._attn_implementation == _FLOAT32_ATTENTION:  # type: ignore[union-attr]
        encoder.backbone.set_attn_implementation("sdpa")  # type: ignore[operator]
    return encoder.eval()


def token_table(encoder: Encoder) -> Any:
    """The module that turns token ids into vectors; a batch touches only the rows of its tokens."""
    if isinstance(encoder.backbone, nn.EmbeddingBag):
        return encoder.backbone
    if encoder.kind == "towers":
        return encoder.backbone.text_model.get_input_embeddings()  # type: ignore[union-attr,operator]
    return encoder.backbone.get_input_embeddings()  # type: ignore[operator]


def computing_dtype(config: TrainConfig, encoder: Encoder) -> torch.dtype:
    """What the encoder multiplies in; its weights are float32 always."""
    # A static encoder only adds table rows up: nothing to gain, digits to lose.
    return torch.float32 if encoder.kind == "static" else inference_dtype(config.precision, encoder.device)


def autocast(config: TrainConfig, encoder: Encoder) -> Callable[[], AbstractContextManager[Any]]:
    """Makes the context of one forward pass."""
    if computing_dtype(config, encoder) == torch.float32:
        return nullcontext
    return lambda: torch.autocast(encoder.device.type, dtype=torch.bfloat16)


def micro_batch_tokens(config: TrainConfig, encoder: Encoder) -> int:
    """Tokens of a micro-batch where the configuration leaves it open."""
    if config.micro_batch_tokens is not None:
        return config.micro_batch_tokens
    return _LARGE if encoder.kind == "static" or encoder.device.type != "cpu" else _SMALL


def activation_bytes(config: TrainConfig, device: torch.device) -> int:
    """Memory for activations where the configuration leaves it open; ask before training takes any."""
    if config.activation_bytes is not None:
        return config.activation_bytes
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 * 2**30


def check_adapters(config: TrainConfig) -> None:
    """Raises UsageError where adapters are asked for and peft is not there."""
    if config.lora is not None and importlib.util.find_spec("peft") is None:
        raise UsageError("train.lora: the package peft is not installed (pip install peft)")


def _use_float32_attention(backbone: nn.Module) -> None:
    """Scaled dot product attention in float32 between bfloat16 layers.

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
        raise UsageError(f"train.lora: {str(error).splitlines()[0]}") from error

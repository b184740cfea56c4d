"""Loading an encoder from a model folder, and refusing folders that would load as something other than they declare."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clusterbatch.encoder.devices import bound_kernel_caches
from clusterbatch.encoder.fused import FusedBackbone
from clusterbatch.encoder.model import Dense, Encoder
from clusterbatch.encoder.model_files import DenseLayout, Kind, Layout, check_weight_files, read_layout
from clusterbatch.encoder.packed import pack
from clusterbatch.encoder.tokenizer import Tokenizer
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.encoder.untrusted_files import read_config
from clusterbatch.errors import DataError, UsageError, first_line

# Encoder-decoders of which transformers has the encoder as a model of its own.
_ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
# Weights that vectors do not depend on; checkpoints of masked language models leave them out.
_UNUSED = "pooler."
_NAMED_KEYS = 3
# Texts that show the ranges of a model's activations, and the mean cosine that 8-bit integers must keep on others.
_RANDOM_TEXTS, _RANDOM_LENGTH = 32, 128
_LEAST_INT8_COSINE = 0.99


def load_encoder(
    folder: str,
    kind: Kind | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    packed: bool = False,
) -> Encoder:
    """Load the model in `folder`, in evaluation mode.

    kind: None: what the folder holds; 'static' of a transformer takes only its input token embeddings, mean-pooled (as
    Sentence Transformers' StaticEmbedding: no special tokens). dtype: of a backbone's weights; pooling, Dense modules,
    normalisation and a static encoder are in fp32. torch.int8: products of 8-bit integers, for inference only. packed:
    for inference only, without padding if device and architecture allow it.

    Raises DataError if files are missing, damaged, or do not hold all weights; UsageError if the model is of a kind
    that is not supported, or cannot compute in `dtype`.
    """
    if dtype == torch.int8:
        return _quantised(load_encoder(folder, kind, device=device, packed=True))
    layout = read_layout(folder)
    kind = kind or layout.kind
    if kind == "backbone" and layout.kind == "static":
        raise UsageError(f"{folder}: holds a static encoder, not a transformer")
    check_weight_files(layout)
    if layout.kind == "towers":
        if kind == "static":
            raise UsageError(f"{folder}: has a tower for images, which a static encoder cannot take over")
        return _load_towers(layout, dtype, device)
    tokenizer = Tokenizer(folder, special_tokens=kind == "backbone")
    if kind == "static":
        weights = _static_weights(layout)
        if tokenizer.vocabulary > len(weights):
            raise DataError(f"{folder}: {tokenizer.vocabulary} token ids but {len(weights)} embeddings")
        backbone: nn.Module = nn.EmbeddingBag.from_pretrained(weights, freeze=False, mode="mean")
        dtype = torch.float32
    else:
        backbone = _load_transformer(layout, dtype)
        if getattr(backbone, "pooler", None) is not None:
            # Its output is not used; without gradients nothing waits for it when they are reduced.
            backbone.pooler.requires_grad_(False)  # type: ignore[union-attr]
    backbone = backbone.to(device=device, dtype=dtype).eval()
    dense = [] if kind == "static" else [_load_dense(module).to(device) for module in layout.dense]
    encoder = Encoder(
        kind,
        backbone,
        tokenizer,
        pooling="mean" if kind == "static" else layout.pooling,
        max_tokens=layout.max_tokens,
        prompts=layout.prompts,
        truncate_dim=layout.truncate_dim,
        dense=dense,
    ).eval()
    width = encoder.pooled_dimensions if dense else 0
    for module in layout.dense[: len(dense)]:
        if module.in_features != width:
            raise DataError(f"{module.folder}: in_features {module.in_features}, but gets {width}")
        width = module.out_features
    if packed:
        drop_padding(encoder, dtype)
    if kind == "backbone" and not encoder.unpadded:
        _check_runs(encoder, layout)
    return encoder


def drop_padding(encoder: Encoder, dtype: torch.dtype) -> None:
    """Make an encoder compute in `dtype` and without padding if device and architecture allow it; for inference only.

    Its weights must not change afterwards: on a CPU copies of them are used.
    """
    if encoder.kind == "backbone":
        if encoder.device.type == "cpu":
            bound_kernel_caches()
        encoder.backbone.to(dtype)
        tokenizer = encoder.tokenizer
        first_position = read_layout(tokenizer.folder).first_position
        encoder.packed = pack(encoder.backbone, tokenizer.vocabulary, first_position)


def _quantised(encoder: Encoder) -> Encoder:
    """Return the encoder with products of 8-bit integers. Raises UsageError if it cannot have them."""
    folder = encoder.tokenizer.folder
    if not isinstance(encoder.packed, FusedBackbone):
        raise UsageError(f"{folder}: 8-bit integers (int8) are for encoders built like BERT, on CPUs")
    shown, others = (_random_texts(encoder.tokenizer, encoder.packed, seed) for seed in (0, 1))
    exact = encoder.encode(others, len(others.values))
    with torch.inference_mode():
        encoder.packed.quantise(shown.values, shown.offsets)
    cosine = float((exact * encoder.encode(others, len(others.values))).sum(axis=1).mean())
    if not cosine >= _LEAST_INT8_COSINE:
        raise UsageError(f"{folder}: 8-bit integers (int8) change its vectors too much (mean cosine {cosine:.3f})")
    return encoder


def _random_texts(tokenizer: Tokenizer, backbone: FusedBackbone, seed: int) -> Tokens:
    """Return texts of random tokens between the special ones."""
    generator = np.random.default_rng(seed)
    longest = min(_RANDOM_LENGTH, backbone.most_tokens) - tokenizer.added
    lengths = generator.integers(1, longest, _RANDOM_TEXTS, endpoint=True)
    known = min(tokenizer.vocabulary, backbone.vocabulary)
    return tokenizer.surrounded([generator.integers(0, known, length).tolist() for length in lengths])


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bar and the load report that transformers prints for every model."""
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


def _load_towers(layout: Layout, dtype: torch.dtype, device: str | torch.device) -> Encoder:
    # Imported here: the encoder of texts runs on a machine that has only torch and transformers.
    from clusterbatch.encoder.clip import TowersEncoder
    from clusterbatch.encoder.images import ImageProcessor

    images = ImageProcessor(layout)
    tokenizer = Tokenizer(layout.folder)
    backbone = _load_transformer(layout, dtype)
    # The loss has a temperature of its own.
    backbone.logit_scale.requires_grad_(False)  # type: ignore[union-attr,operator]
    return TowersEncoder(
        backbone.to(device=device, dtype=dtype).eval(),
        tokenizer,
        images,
        max_tokens=layout.max_tokens,
        prompts=layout.prompts,
        truncate_dim=layout.truncate_dim,
    ).eval()


def _static_weights(layout: Layout) -> Tensor:
    """Return (tokens, dimensions) float32."""
    if layout.kind == "static":
        file = layout.module / "model.safetensors"
        try:
            weights = load_file(file)
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{file}: cannot be loaded ({error})") from error
        if "embedding.weight" in weights:
            return weights["embedding.weight"].float()
        if "embeddings" in weights:
            return _model2vec_weights(weights)
        raise UsageError(f"{layout.module}: static weights without embedding.weight are not supported")
    embeddings = _load_transformer(layout, torch.float32).get_input_embeddings()  # type: ignore[operator]
    return embeddings.weight.detach().clone()


def _model2vec_weights(weights: dict[str, Tensor]) -> Tensor:
    """Return one row per token id of a model2vec file, which may share rows among tokens and weigh each token."""
    found = weights["embeddings"].float()
    if "mapping" in weights:
        found = found[weights["mapping"].long()]
    if "weights" in weights:
        found = found * weights["weights"].float()[:, None]
    return found.contiguous()


def _load_dense(layout: DenseLayout) -> Dense:
    module = Dense(layout)
    file = layout.folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(file))
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{file}: cannot be loaded ({' '.join(str(error).split())})") from error
    return module


def _load_transformer(layout: Layout, dtype: torch.dtype) -> nn.Module:
    config = read_config(layout.module)
    architecture = _ENCODERS.get(config.get("model_type", ""))
    if architecture is None and config.get("is_encoder_decoder"):
        raise UsageError(
            f"{layout.module}: encoder-decoders of type {config.get('model_type')} are not supported (encoders, "
            f"decoders and the encoders of {', '.join(_ENCODERS)} are)"
        )
    return load_weights(layout.module, architecture or "AutoModel", dtype)


def load_weights(module: Path, loader: str, dtype: torch.dtype) -> nn.Module:
    """Load the files of `module` by a class of transformers.

    Raises DataError if they cannot be loaded or do not hold all weights.
    """
    import transformers

    try:
        with quiet():
            model: Any = getattr(transformers, loader)
            # Weights in other formats are pickles.
            backbone, report = model.from_pretrained(
                str(module),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                # Otherwise transformers asks on the terminal, and waits.
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        raise DataError(f"{module}: transformer cannot be loaded ({first_line(error)})") from error
    _check_complete(module, report)
    loaded: nn.Module = backbone
    return loaded


def _check_complete(module: Path, report: dict[str, Any]) -> None:
    """Raise DataError if weights are missing: transformers would have made them up at random, and only logged it."""
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(_UNUSED))
    if missing:
        others = sorted(report["unexpected_keys"])
        hint = f"; the files hold others ({_some(others)})" if others else ""
        raise DataError(f"{module}: {len(missing)} weights are missing from its files ({_some(missing)}){hint}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED_KEYS]) + (", ..." if len(names) > _NAMED_KEYS else "")


def _check_runs(encoder: Encoder, layout: Layout) -> None:
    """Raise UsageError if the backbone does not turn token ids into states, as models of other inputs do not."""
    token = encoder.tokenizer.vocabulary // 2
    try:
        with torch.inference_mode():
            vectors = encoder(Tokens.from_lists([[token, token, token], [token]]))
        if vectors.shape != (2, encoder.dimensions):
            raise ValueError(f"vectors of shape {tuple(vectors.shape)}")
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
        kind = read_config(layout.module).get("model_type")
        raise UsageError(
            f"{layout.folder}: models of type {kind} are not supported as encoders of texts ({first_line(error)})"
        ) from error

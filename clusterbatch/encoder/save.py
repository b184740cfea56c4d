"""Writes an encoder as Sentence Transformers 6.2 does, so that any tool of that world reads it."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from clusterbatch.encoder.clip import TowersEncoder
from clusterbatch.encoder.model import Encoder, quiet
from clusterbatch.encoder.model_files import read_layout

_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_STATIC = "sentence_transformers.sentence_transformer.modules.static_embedding.StaticEmbedding"
_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
# What Sentence Transformers calls of a model, and what of the answer it takes.
_BACKBONE_CALLS = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
_TOWERS_CALLS = {
    "modality_config": {
        "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
        "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
    },
    "module_output_name": "sentence_embedding",
}
# The release whose layout this is; used where Sentence Transformers itself is not installed.
_LAYOUT_VERSION = "6.2.0"


def save_model(encoder: Encoder, folder: str | Path) -> None:
    """Weights as float32 safetensors, tokenizer, module list, pooling, prompts.

    `SentenceTransformer(folder).encode` gives the vectors of `encoder`; a backbone is also an `AutoModel` folder. The
    encoder's `max_tokens` becomes the saved model's maximal sequence length.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if encoder.kind == "static":
        modules = [("", _STATIC), ("1_Normalize", _NORMALIZE)]
        _save_static(encoder, folder)
    elif isinstance(encoder, TowersEncoder):
        modules = [("", _TRANSFORMER), ("1_Normalize", _NORMALIZE)]
        _save_backbone(encoder, folder, _TOWERS_CALLS)
        encoder.images.save(str(folder))
    else:
        modules = [("", _TRANSFORMER), ("1_Pooling", _POOLING), ("2_Normalize", _NORMALIZE)]
        _save_backbone(encoder, folder, _BACKBONE_CALLS)
        pooling = {"embedding_dimension": encoder.dimensions, "pooling_mode": encoder.pooling, "include_prompt": True}
        _write(folder / "1_Pooling" / "config.json", pooling)
    feature = "sentence_embedding"
    _write(folder / modules[-1][0] / "config.json", {"module_input_name": feature, "module_output_name": feature})
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": kind} for number, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)
    _write(folder / "config_sentence_transformers.json", _settings(encoder))


def _save_static(encoder: Encoder, folder: Path) -> None:
    weights = encoder.backbone.weight.detach().float().cpu().contiguous()  # type: ignore[union-attr,operator]
    save_file({"embedding.weight": weights}, folder / "model.safetensors")
    backend = tokenizers.Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    if encoder.max_tokens is not None:
        # The only place of this layout that can hold a limit.
        backend.enable_truncation(encoder.max_tokens)
    backend.save(str(folder / "tokenizer.json"))


def _save_backbone(encoder: Encoder, folder: Path, calls: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    module = read_layout(encoder.tokenizer.folder).module
    state = {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in encoder.backbone.state_dict().items()
    }
    with quiet():
        encoder.backbone.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        tokenizer = AutoTokenizer.from_pretrained(str(module))
        tokenizer.backend_tokenizer.normalizer = encoder.tokenizer.backend.normalizer
        if encoder.max_tokens is not None:
            tokenizer.model_max_length = encoder.max_tokens
        tokenizer.save_pretrained(folder)
    # transformers writes what the module in memory is in, not what the file holds.
    config = json.loads((folder / "config.json").read_bytes())
    _write(folder / "config.json", {**config, "dtype": "float32"})
    _write(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction", **calls})


def _settings(encoder: Encoder) -> dict[str, Any]:
    return {
        "__version__": {
            "pytorch": str(torch.__version__),
            "sentence_transformers": _version("sentence-transformers") or _LAYOUT_VERSION,
            "transformers": _version("transformers"),
        },
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": dict(sorted(encoder.prompts.items())),
        "similarity_fn_name": "cosine",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")

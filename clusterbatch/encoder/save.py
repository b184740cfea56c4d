"""Writer of an encoder as a Sentence Transformers folder that releases from 5.0 on, and other tools, can open.

Release 6 moved its modules and renamed settings; it still reads the older names, the only ones that older releases and
converters know. So the older names are written.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from clusterbatch.encoder.clip import TowersEncoder
from clusterbatch.encoder.load import quiet
from clusterbatch.encoder.model import Dense, Encoder
from clusterbatch.encoder.model_files import DOCUMENT_PROMPTS, POOLING_FLAGS, POOLING_MODES, read_layout

_MODULES = "sentence_transformers.models"
# The oldest release that opens it. Later ones warn of models that a newer release has written.
_LAYOUT_VERSION = "5.0.0"


def save_model(encoder: Encoder, folder: str | Path) -> None:
    """Write weights as float32 safetensors, tokenizer, module list, pooling, Dense modules, prompts.

    `SentenceTransformer(folder).encode` gives the vectors of `encoder`; a backbone is also an `AutoModel` folder. The
    encoder's `max_tokens` becomes the saved model's maximal sequence length.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if encoder.kind == "static":
        modules = [("", "StaticEmbedding"), ("1_Normalize", "Normalize")]
        _save_static(encoder, folder)
    elif isinstance(encoder, TowersEncoder):
        modules = [("", "CLIPModel"), ("1_Normalize", "Normalize")]
        _save_backbone(encoder, folder)
        encoder.images.save(str(folder))
    else:
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        _save_backbone(encoder, folder)
        _write(folder / "1_Pooling" / "config.json", _pooling(encoder))
        for number, module in enumerate(encoder.dense, 2):
            assert isinstance(module, Dense)
            modules.append((f"{number}_Dense", "Dense"))
            _save_dense(module, folder / f"{number}_Dense")
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    # Holds nothing, but tools that copy only files must not lose the folder.
    _write(folder / modules[-1][0] / "config.json", {})
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_MODULES}.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)
    _write(folder / "config_sentence_transformers.json", _settings(encoder))


def _pooling(encoder: Encoder) -> dict[str, Any]:
    modes = encoder.pooling.split("+")
    settings: dict[str, Any] = {flag: mode in modes for flag, mode in POOLING_FLAGS.items()}
    if modes != [mode for mode in POOLING_MODES if mode in modes]:
        # Flags have no order; only release 6 can read another one.
        settings = {"pooling_mode": modes}
    width = encoder.pooled_dimensions // len(modes)
    return {"word_embedding_dimension": width, **settings, "include_prompt": True}


def _save_dense(module: Dense, folder: Path) -> None:
    layout = module.layout
    config = {
        "in_features": layout.in_features,
        "out_features": layout.out_features,
        "bias": layout.bias,
        "activation_function": f"torch.nn.{layout.activation}",
        **({"use_residual": True} if layout.residual else {}),
    }
    _write(folder / "config.json", config)
    weights = {name: value.detach().float().cpu().contiguous() for name, value in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def _save_static(encoder: Encoder, folder: Path) -> None:
    weights = encoder.backbone.weight.detach().float().cpu().contiguous()  # type: ignore[union-attr,operator]
    save_file({"embedding.weight": weights}, folder / "model.safetensors")
    backend = tokenizers.Tokenizer.from_str(encoder.tokenizer.backend.to_str())
    if encoder.max_tokens is not None:
        # This layout has no other place for a limit.
        backend.enable_truncation(encoder.max_tokens)
    backend.save(str(folder / "tokenizer.json"))


def _save_backbone(encoder: Encoder, folder: Path) -> None:
    from transformers import AutoTokenizer

    layout = read_layout(encoder.tokenizer.folder)
    state = {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
        for name, value in encoder.backbone.state_dict().items()
    }
    with quiet():
        encoder.backbone.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
        tokenizer = AutoTokenizer.from_pretrained(str(layout.module), trust_remote_code=False)
        tokenizer.backend_tokenizer.normalizer = encoder.tokenizer.backend.normalizer
        if encoder.max_tokens is not None:
            tokenizer.model_max_length = encoder.max_tokens
        tokenizer.save_pretrained(folder)
    # transformers writes the type of the module in memory, not that of the file.
    config = json.loads((folder / "config.json").read_bytes())
    # Code that was named beside weights in the names of transformers' own class would not know these.
    config.pop("auto_map", None)
    _write(folder / "config.json", {**config, "dtype": "float32"})
    if not isinstance(encoder, TowersEncoder):
        # transformers drops the normalizer of a BERT tokenizer when it reads one: lower-casing has to be declared here.
        sentence = {"max_seq_length": encoder.max_tokens, "do_lower_case": layout.lower_case}
        _write(folder / "sentence_bert_config.json", sentence)


def _settings(encoder: Encoder) -> dict[str, Any]:
    truncation = {} if encoder.truncate_dim is None else {"truncate_dim": encoder.truncate_dim}
    # Those for tasks other than retrieval stay with the model.
    prompts = read_layout(encoder.tokenizer.folder).named_prompts | encoder.prompts
    if not encoder.prompts.get("document"):
        # Whoever reads the folder would take one of another name for that of a document.
        prompts = {name: prompt for name, prompt in prompts.items() if name not in DOCUMENT_PROMPTS or not prompt}
    return {
        "__version__": {
            "pytorch": str(torch.__version__),
            "sentence_transformers": _LAYOUT_VERSION,
            "transformers": _version("transformers"),
        },
        "default_prompt_name": None,
        "model_type": "SentenceTransformer",
        "prompts": dict(sorted(prompts.items())),
        "similarity_fn_name": "cosine",
        **truncation,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")

"""Settings in the files of a model folder, read without loading a weight.

Every setting that changes vectors is honoured or refused: none is ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clusterbatch.errors import DataError, UsageError

Kind = Literal["backbone", "static", "towers"]
POOLING_MODES = ("cls", "mean", "lasttoken")

# Position embeddings of these start after the padding index, so tokens have that many positions fewer.
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"}
# Models of transformers with a tower for texts and one for images.
_TOWERS = {"clip"}
# Older Sentence Transformers wrote one flag per mode.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Names under which models keep the prompt of a document, the first one present counts. Sentence Transformers differs:
# its `encode_document` uses a prompt named "document" and no other, so there a model with only "passage" gets none.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
# Sentence Transformers reads the first of these.
_SENTENCE_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Settings of those files that must have this value, if any: others mean another computation.
_REQUIRED = {
    "transformer_task": "feature-extraction",
    "tokenizer_name_or_path": None,
    "query_length": None,
    "document_length": None,
    "query_expansion": None,
}
# Arguments of loaders that leave the vectors as they are; Sentence Transformers 6 renamed the groups.
_ARGUMENTS = {
    "model_args": {"torch_dtype", "dtype", "attn_implementation", "trust_remote_code", "low_cpu_mem_usage"},
    "tokenizer_args": {"model_max_length", "trust_remote_code", "use_fast", "padding_side"},
    "config_args": {"trust_remote_code", "use_cache"},
}
_NEW_ARGUMENTS = {"model_kwargs": "model_args", "processor_kwargs": "tokenizer_args", "config_kwargs": "config_args"}


@dataclass(frozen=True)
class Layout:
    """A Sentence Transformers folder, or a bare transformer (which has no prompts).

    module: folder of the first module, which holds weights and tokenizer. max_tokens: longest input, special tokens
    included; None: no limit. prompts: text put before a 'query' and a 'document'. first_position: position of the first
    token, above 0 if positions start after the padding index. truncate_dim: number of dimensions kept; None: all.
    """

    folder: Path
    module: Path
    kind: Kind
    pooling: str
    max_tokens: int | None
    prompts: dict[str, str]
    lower_case: bool = False
    first_position: int = 0
    truncate_dim: int | None = None


def read_layout(folder: str | Path) -> Layout:
    """Read the settings of the model in `folder`.

    Raises DataError if there is no model, UsageError if it has parts or settings that are not supported.
    """
    folder = Path(folder)
    modules = _read(folder / "modules.json")
    settings: dict[str, Any] = _read(folder / "config_sentence_transformers.json") or {}
    prompts = _prompts(settings.get("prompts") or {})
    truncate_dim = _truncate_dim(folder, settings)
    if modules is None:
        return _bare_layout(folder, prompts, truncate_dim)
    first = folder / modules[0]["path"]
    kind = _class_name(modules[0])
    pooling = "mean"
    for module in modules[1:]:
        name = _class_name(module)
        if name == "Pooling" and kind == "Transformer":
            pooling = _pooling(folder / module["path"], any(prompts.values()))
        elif name != "Normalize":
            raise UsageError(f"{folder}: module {name} is not supported (a transformer with pooling, or static, is)")
    if kind == "StaticEmbedding":
        return Layout(folder, first, "static", "mean", _static_max_tokens(first), prompts, truncate_dim=truncate_dim)
    sentence = _sentence_settings(first)
    if kind in ("Transformer", "CLIPModel") and _is_towers(first):
        limit = _max_tokens(first, sentence)
        return Layout(folder, first, "towers", "", limit, prompts, truncate_dim=truncate_dim)
    if kind != "Transformer":
        raise UsageError(f"{folder}: module {kind} is not supported (a transformer with pooling, or static, is)")
    _refuse_adapter(first)
    return Layout(
        folder,
        first,
        "backbone",
        pooling,
        _max_tokens(first, sentence),
        prompts,
        lower_case=bool(sentence.get("do_lower_case")),
        first_position=_first_position(first),
        truncate_dim=truncate_dim,
    )


def check_weight_files(layout: Layout) -> None:
    """Raise UsageError if there are weights only in formats that are not loaded, DataError if there are none."""
    if any(layout.module.glob("*.safetensors")):
        return
    others = [name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.onnx") for name in layout.module.glob(pattern)]
    if others:
        raise UsageError(
            f"{layout.module}: weights only as {others[0].name}, which is not loaded (pickles can run code); save the "
            "model in the safetensors format"
        )
    raise DataError(f"{layout.module}: no weights in the safetensors format (model.safetensors)")


def _bare_layout(folder: Path, prompts: dict[str, str], truncate_dim: int | None) -> Layout:
    _refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model here (neither modules.json nor config.json)")
    if read_config(folder).get("model_type") == "model2vec":
        raise UsageError(
            f"{folder}: a model2vec folder without modules.json; open it with Sentence Transformers' "
            "StaticEmbedding.from_model2vec and save it from there"
        )
    if _is_towers(folder):
        return Layout(folder, folder, "towers", "", _max_tokens(folder), prompts, truncate_dim=truncate_dim)
    return Layout(
        folder,
        folder,
        "backbone",
        "lasttoken" if _is_causal(folder) else "mean",
        _max_tokens(folder),
        prompts,
        first_position=_first_position(folder),
        truncate_dim=truncate_dim,
    )


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder}: an adapter alone (adapter_config.json); merge it into its base model and save that"
        )


def _is_causal(folder: Path) -> bool:
    """Return whether the model is causal. Sentence Transformers then pools the last token, which alone has seen all
    others, if a folder names no pooling."""
    config = read_config(folder)
    architectures = config.get("architectures") or [""]
    return str(architectures[0]).endswith("ForCausalLM") and config.get("is_causal") is not False


def _sentence_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the transformer module. Raises UsageError for any that changes what is computed."""
    found = next(((name, content) for name in _SENTENCE_FILES if (content := _read(folder / name))), None)
    if found is None:
        return {}
    name, settings = found
    for key, value in _REQUIRED.items():
        if settings.get(key, value) != value:
            raise UsageError(f"{folder / name}: {key} {settings[key]!r} is not supported")
    if any((settings.get("processing_kwargs") or {}).values()):
        raise UsageError(f"{folder / name}: processing_kwargs are not supported")
    text = (settings.get("modality_config") or {}).get("text", {})
    if text.get("method_output_name", "last_hidden_state") not in ("last_hidden_state", "pooler_output"):
        raise UsageError(f"{folder / name}: output {text['method_output_name']} is not supported")
    for key, value in settings.items():
        old = _NEW_ARGUMENTS.get(key, key)
        unknown = sorted(set(value or {}) - _ARGUMENTS[old]) if old in _ARGUMENTS else []
        if unknown:
            raise UsageError(f"{folder / name}: {key} {unknown[0]} is not supported")
    return dict(settings)


def _truncate_dim(folder: Path, settings: dict[str, Any]) -> int | None:
    value = settings.get("truncate_dim")
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UsageError(
            f"{folder}: truncate_dim {value!r} in config_sentence_transformers.json is not a number of dimensions"
        )
    return value


def shorter(*limits: int | None) -> int | None:
    """Return the shortest of some limits in tokens; None stands for no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the model's own config.json; empty if there is none."""
    config: dict[str, Any] = _read(folder / "config.json") or {}
    return config


def _is_towers(folder: Path) -> bool:
    return read_config(folder).get("model_type") in _TOWERS


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None


def _class_name(module: dict[str, Any]) -> str:
    return str(module["type"]).rsplit(".", 1)[-1]


def _prompts(prompts: dict[str, str | None]) -> dict[str, str]:
    document = next((prompts[name] for name in _DOCUMENT_PROMPTS if prompts.get(name)), None)
    return {"query": prompts.get("query") or "", "document": document or ""}


def _pooling(folder: Path, prompted: bool) -> str:
    config = _read(folder / "config.json") or {}
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
    else:
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise UsageError(f"{folder}: pooling {'+'.join(modes)} is not supported (one of {', '.join(POOLING_MODES)} is)")
    if prompted and not config.get("include_prompt", True):
        raise UsageError(f"{folder}: pooling that leaves out the prompt is not supported")
    return str(modes[0])


def _max_tokens(folder: Path, sentence: dict[str, Any] | None = None) -> int | None:
    config = read_config(folder)
    config = config.get("text_config", config)
    positions = config.get("max_position_embeddings")
    if positions:
        positions -= _first_position(folder)
    sentence = sentence or {}
    arguments = sentence.get("processor_kwargs") or sentence.get("tokenizer_args") or {}
    declared = arguments.get("model_max_length", sentence.get("max_seq_length"))
    if declared is None:
        declared = (_read(folder / "tokenizer_config.json") or {}).get("model_max_length")
    # Tokenizers without a limit say 10^30.
    limits = [int(limit) for limit in (positions, declared) if limit and 0 < limit < 2**31]
    return min(limits, default=None)


def _first_position(folder: Path) -> int:
    config = _read(folder / "config.json") or {}
    return int(config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _POSITIONS_AFTER_PADDING else 0


def _static_max_tokens(folder: Path) -> int | None:
    truncation = (_read(folder / "tokenizer.json") or {}).get("truncation")
    return int(truncation["max_length"]) if truncation else None

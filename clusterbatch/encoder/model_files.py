"""What the files of a model folder say about it, read without loading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clusterbatch.errors import DataError, UsageError

Kind = Literal["backbone", "static", "towers"]
POOLING_MODES = ("cls", "mean", "lasttoken")

# Position embeddings of these start after the padding index, so that many positions are not there for tokens.
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
# Where Sentence Transformers looks for the prompt of a document.
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")


@dataclass(frozen=True)
class Layout:
    """A Sentence Transformers folder, or a bare transformer (then mean pooling and no prompts).

    module: folder of the first module, which holds weights and tokenizer. max_tokens: longest input, special tokens
    included; None: no limit. prompts: what is put before a 'query' and a 'document'.
    """

    folder: Path
    module: Path
    kind: Kind
    pooling: str
    max_tokens: int | None
    prompts: dict[str, str]
    lower_case: bool = False
    # Of the first token; above 0 where positions start after the padding index.
    first_position: int = 0


def read_layout(folder: str | Path) -> Layout:
    """Raises DataError where no model lies in `folder`, UsageError where it has parts that are not supported."""
    folder = Path(folder)
    modules = _read(folder / "modules.json")
    settings: dict[str, Any] = _read(folder / "config_sentence_transformers.json") or {}
    prompts = _prompts(settings.get("prompts") or {})
    if modules is None:
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: no model here (neither modules.json nor config.json)")
        if _is_towers(folder):
            return Layout(folder, folder, "towers", "", _max_tokens(folder), prompts)
        return Layout(
            folder, folder, "backbone", "mean", _max_tokens(folder), prompts, first_position=_first_position(folder)
        )
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
        return Layout(folder, first, "static", "mean", _static_max_tokens(first), prompts)
    if kind in ("Transformer", "CLIPModel") and _is_towers(first):
        return Layout(folder, first, "towers", "", _max_tokens(first), prompts)
    if kind != "Transformer":
        raise UsageError(f"{folder}: module {kind} is not supported (a transformer with pooling, or static, is)")
    sentence = _read(first / "sentence_bert_config.json") or {}
    return Layout(
        folder,
        first,
        "backbone",
        pooling,
        _max_tokens(first, sentence),
        prompts,
        lower_case=bool(sentence.get("do_lower_case")),
        first_position=_first_position(first),
    )


def shorter(*limits: int | None) -> int | None:
    """The shortest of some limits in tokens; None stands for no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def read_config(folder: Path) -> dict[str, Any]:
    """The model's own config.json; empty where there is none."""
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
    declared = (sentence or {}).get("max_seq_length")
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

"""Settings in the files of a model folder, read without loading a weight.

Every setting that changes vectors is honoured or refused: none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clusterbatch.encoder.untrusted_files import (
    check_names,
    check_weights,
    place_inside,
    read_config,
    read_json,
    refuse_adapter,
    refuse_code,
)
from clusterbatch.errors import DataError, UsageError

Kind = Literal["backbone", "static", "towers"]
# Several of them may be joined by a plus sign; their vectors are then concatenated in that order.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Activation functions of a Dense module, classes of torch.nn without weights or arguments of their own.
ACTIVATIONS = (
    *("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "SELU", "CELU", "ReLU6"),
    *("Softplus", "Softsign", "Mish", "Hardswish", "Hardsigmoid", "Hardtanh", "LogSigmoid", "Tanhshrink"),
)

# Position embeddings of these start after the padding index, so tokens have that many positions fewer.
_POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"}
# Models of transformers with a tower for texts and one for images.
_TOWERS = {"clip"}
# Older Sentence Transformers wrote one flag per mode; the vectors of several modes came in the order of POOLING_MODES.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Names under which models keep the prompt of a document, the first one present counts. Sentence Transformers differs:
# its `encode_document` uses a prompt named "document" and no other, so there a model with only "passage" gets none.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
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
class DenseLayout:
    """A Dense module behind the pooling: activation(weight x + bias), and x itself added if `residual`.

    folder: holds its weights. activation: one of ACTIVATIONS.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class Layout:
    """A Sentence Transformers folder, or a bare transformer (which has no prompts).

    module: folder of the first module, which holds weights and tokenizer. pooling: one of POOLING_MODES, or several
    joined by a plus sign. dense: modules behind the pooling. max_tokens: longest input, special tokens included; None:
    no limit. prompts: text put before a 'query' and a 'document'; named_prompts: all that the folder names.
    first_position: position of the first token, above 0 if positions start after the padding index. truncate_dim:
    number of dimensions kept; None: all. include_prompt: whether the prompt's tokens are pooled.
    """

    folder: Path
    module: Path
    kind: Kind
    pooling: str
    max_tokens: int | None
    prompts: dict[str, str] = field(default_factory=dict)
    lower_case: bool = False
    first_position: int = 0
    truncate_dim: int | None = None
    dense: tuple[DenseLayout, ...] = ()
    named_prompts: dict[str, str] = field(default_factory=dict)
    include_prompt: bool = True


def read_layout(folder: str | Path) -> Layout:
    """Read the settings of the model in `folder`.

    Raises DataError if there is no model, UsageError if it has parts or settings that are not supported, or would need
    code of its own.
    """
    folder = Path(folder)
    modules = read_json(folder / "modules.json")
    settings: dict[str, Any] = read_json(folder / "config_sentence_transformers.json") or {}
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise UsageError(f"{folder}: a {kind}, which does not give one dense vector per text")
    named_prompts = {name: prompt for name, prompt in (settings.get("prompts") or {}).items() if prompt is not None}
    layout = _bare_layout(folder) if modules is None else _layout_of_modules(folder, modules)
    layout = replace(
        layout,
        prompts=_prompts(named_prompts),
        named_prompts=named_prompts,
        truncate_dim=_truncate_dim(folder, settings),
    )
    check_prompts(layout, layout.prompts)
    return layout


def check_prompts(layout: Layout, prompts: Mapping[Any, str]) -> None:
    """Raise UsageError if there are prompts and the model leaves their tokens out of the pooling."""
    if not layout.include_prompt and any(prompts.values()):
        raise UsageError(f"{layout.folder}: pooling that leaves out the prompt (include_prompt) is not supported")


def _layout_of_modules(folder: Path, modules: list[dict[str, Any]]) -> Layout:
    if not isinstance(modules, list) or not modules or not all(map(_is_module, modules)):
        raise DataError(f"{folder / 'modules.json'}: not a list of modules, each with its type and path")
    for module in modules:
        if module["path"]:
            place_inside(folder, module["path"], folder / "modules.json")
        if not str(module["type"]).startswith("sentence_transformers."):
            raise UsageError(f"{folder}: module {module['type']} is code of its own (modules.json), which is not run")
    first = folder / modules[0]["path"]
    check_names(first)
    kind = _class_name(modules[0])
    pooling, include_prompt = None, True
    dense: list[DenseLayout] = []
    before = ""
    for module in modules[1:]:
        name, place = _class_name(module), folder / module["path"]
        if name == "Pooling" and kind == "Transformer" and not before:
            pooling, include_prompt = _pooling(place)
        elif name == "Dense" and before in ("Pooling", "Dense"):
            dense.append(_dense(place))
        elif name != "Normalize":
            raise _unsupported(folder, name)
        before = name
    if kind == "StaticEmbedding":
        return Layout(folder, first, "static", "mean", _static_max_tokens(first))
    sentence, name = _sentence_settings(first)
    if kind in ("Transformer", "CLIPModel") and _is_towers(first) and not dense:
        _refuse_other_outputs(first / name, sentence, "last_hidden_state", "pooler_output")
        return Layout(folder, first, "towers", "", longest_input(first, sentence))
    if kind != "Transformer":
        raise _unsupported(folder, kind)
    _refuse_other_outputs(first / name, sentence, "last_hidden_state")
    refuse_adapter(first)
    refuse_code(first)
    return Layout(
        folder,
        first,
        "backbone",
        pooling or "mean",
        longest_input(first, sentence),
        lower_case=bool(sentence.get("do_lower_case")),
        first_position=_first_position(first),
        dense=tuple(dense),
        include_prompt=include_prompt,
    )


def _unsupported(folder: Path, module: str) -> UsageError:
    return UsageError(
        f"{folder}: module {module} is not supported here (a transformer with pooling and Dense modules, or static, is)"
    )


def _is_module(module: Any) -> bool:
    return isinstance(module, dict) and isinstance(module.get("path"), str) and isinstance(module.get("type"), str)


def check_weight_files(layout: Layout) -> None:
    """Raise the errors of `check_weights` for the folders of all modules."""
    for folder in (layout.module, *(dense.folder for dense in layout.dense)):
        check_weights(folder)


def _bare_layout(folder: Path) -> Layout:
    check_names(folder)
    refuse_adapter(folder)
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no model here (neither modules.json nor config.json)")
    if read_config(folder).get("model_type") == "model2vec":
        raise UsageError(
            f"{folder}: a model2vec folder without modules.json; open it with Sentence Transformers' "
            "StaticEmbedding.from_model2vec and save it from there"
        )
    if _is_towers(folder):
        return Layout(folder, folder, "towers", "", longest_input(folder))
    refuse_code(folder)
    pooling = "lasttoken" if _is_causal(folder) else "mean"
    first_position = _first_position(folder)
    return Layout(folder, folder, "backbone", pooling, longest_input(folder), first_position=first_position)


def _is_causal(folder: Path) -> bool:
    """Return whether the model is causal. Sentence Transformers then pools the last token, which alone has seen all
    others, if a folder names no pooling."""
    config = read_config(folder)
    architectures = config.get("architectures") or [""]
    return str(architectures[0]).endswith("ForCausalLM") and config.get("is_causal") is not False


def _sentence_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the settings of the transformer module and the name of their file.

    Raises UsageError for any that changes what is computed.
    """
    name = next((name for name in _SENTENCE_FILES if read_json(folder / name)), _SENTENCE_FILES[0])
    settings: dict[str, Any] = read_json(folder / name) or {}
    for key, value in _REQUIRED.items():
        if settings.get(key, value) != value:
            raise UsageError(f"{folder / name}: {key} {settings[key]!r} is not supported")
    if any((settings.get("processing_kwargs") or {}).values()):
        raise UsageError(f"{folder / name}: processing_kwargs are not supported")
    for key, value in settings.items():
        old = _NEW_ARGUMENTS.get(key, key)
        unknown = sorted(set(value or {}) - _ARGUMENTS[old]) if old in _ARGUMENTS else []
        if unknown:
            raise UsageError(f"{folder / name}: {key} {unknown[0]} is not supported")
    return dict(settings), name


def _refuse_other_outputs(file: Path, settings: dict[str, Any], *outputs: str) -> None:
    """Raise UsageError unless texts, and not chat messages made of them, become one of `outputs`."""
    modalities = settings.get("modality_config") or {}
    output = modalities.get("text", {}).get("method_output_name", outputs[0])
    if output not in outputs:
        raise UsageError(f"{file}: output {output} is not supported")
    if "message" in modalities:
        raise UsageError(f"{file}: texts in a chat template (modality_config message) are not supported")


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


def _is_towers(folder: Path) -> bool:
    return read_config(folder).get("model_type") in _TOWERS


def _class_name(module: dict[str, Any]) -> str:
    return str(module["type"]).rsplit(".", 1)[-1]


def _prompts(prompts: dict[str, str]) -> dict[str, str]:
    document = next((prompts[name] for name in DOCUMENT_PROMPTS if prompts.get(name)), None)
    return {"query": prompts.get("query") or "", "document": document or ""}


def _pooling(folder: Path) -> tuple[str, bool]:
    """Return the modes joined by plus signs, and whether the tokens of a prompt are pooled."""
    config = read_json(folder / "config.json") or {}
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
    else:
        modes = [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    for mode in modes:
        if mode not in POOLING_MODES:
            raise UsageError(f"{folder}: pooling {mode} is not supported ({', '.join(POOLING_MODES)} are)")
    return "+".join(modes), bool(config.get("include_prompt", True))


def _dense(folder: Path) -> DenseLayout:
    file = folder / "config.json"
    config = read_json(file) or {}
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise UsageError(f"{file}: {key} {config[key]!r} is not supported (sentence_embedding is)")
    # Sentence Transformers' default.
    function = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = function.rsplit(".", 1)[-1]
    if not function.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise UsageError(f"{file}: activation_function {function} is not supported ({', '.join(ACTIVATIONS)} are)")
    try:
        sizes = int(config["in_features"]), int(config["out_features"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{file}: in_features and out_features are not both given as numbers") from None
    residual = bool(config.get("use_residual", False))
    return DenseLayout(folder, *sizes, bool(config.get("bias", True)), activation, residual)


def longest_input(folder: Path, sentence: dict[str, Any] | None = None) -> int | None:
    """Return the longest input of the model in `folder`, special tokens included; None: no limit.

    sentence: settings of Sentence Transformers' module, if there are some.
    """
    config = read_config(folder)
    config = config.get("text_config", config)
    positions = config.get("max_position_embeddings")
    if positions:
        positions -= _first_position(folder)
    sentence = sentence or {}
    arguments = sentence.get("processor_kwargs") or sentence.get("tokenizer_args") or {}
    declared = arguments.get("model_max_length", sentence.get("max_seq_length"))
    if declared is None:
        declared = (read_json(folder / "tokenizer_config.json") or {}).get("model_max_length")
    # Tokenizers without a limit say 10^30.
    limits = [int(limit) for limit in (positions, declared) if limit and 0 < limit < 2**31]
    return min(limits, default=None)


def _first_position(folder: Path) -> int:
    config = read_config(folder)
    # Files need not repeat transformers' default, 1 for all of these.
    return int(config.get("pad_token_id", 1) or 0) + 1 if config.get("model_type") in _POSITIONS_AFTER_PADDING else 0


def _static_max_tokens(folder: Path) -> int | None:
    truncation = (read_json(folder / "tokenizer.json") or {}).get("truncation")
    return int(truncation["max_length"]) if truncation else None

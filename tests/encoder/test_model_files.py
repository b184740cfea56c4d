from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.encoder.model_files import read_layout
from clusterbatch.errors import DataError, UsageError

_TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
_POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def _write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_old_and_new_files_of_sentence_transformers(minilm: str, tmp_path: Path) -> None:
    layout = read_layout(minilm)
    assert (layout.kind, layout.pooling, layout.max_tokens) == ("backbone", "mean", 256)
    new = _write(
        tmp_path,
        {
            "modules.json": [_TRANSFORMER, _POOLING],
            "1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": True},
            "config.json": {"max_position_embeddings": 512, "model_type": "bert"},
            "tokenizer_config.json": {"model_max_length": 10**30},
            "config_sentence_transformers.json": {"prompts": {"query": "q: ", "passage": "p: "}},
        },
    )
    layout = read_layout(new)
    assert (layout.pooling, layout.max_tokens) == ("cls", 512)
    assert layout.prompts == {"query": "q: ", "document": "p: "}


def test_positions_that_the_padding_index_takes(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("roberta")
    assert read_layout(folder).max_tokens == 128
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 130
    # Files need not repeat transformers' default.
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    del config["pad_token_id"]
    (copy / "config.json").write_text(json.dumps(config))
    assert read_layout(copy).first_position == read_layout(folder).first_position == 2


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, DataError, "no model here"),
        ({"modules.json": [{**_TRANSFORMER, "type": "x.CLIPModel"}]}, UsageError, "CLIPModel"),
        ({"modules.json": [_TRANSFORMER, {**_POOLING, "type": "x.Dense"}]}, UsageError, "Dense"),
        (
            {
                "modules.json": [_TRANSFORMER, _POOLING],
                "1_Pooling/config.json": {"pooling_mode": ["mean", "attention"]},
            },
            UsageError,
            "pooling attention",
        ),
        (
            {
                "modules.json": [_TRANSFORMER, _POOLING],
                "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False},
                "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
            },
            UsageError,
            "prompt",
        ),
    ],
)
def test_what_is_not_supported_is_named(
    files: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        read_layout(_write(tmp_path, files))


_SENTENCE_FILES = ["sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json"]


@pytest.mark.parametrize("name", _SENTENCE_FILES)
def test_the_limit_is_read_under_the_names_of_all_architectures(name: str, tmp_path: Path) -> None:
    files = {"modules.json": [_TRANSFORMER], "config.json": {"max_position_embeddings": 512}}
    folder = _write(tmp_path, {**files, name: {"max_seq_length": 20}})
    assert read_layout(folder).max_tokens == 20
    _write(tmp_path, {name: {"processor_kwargs": {"model_max_length": 30}, "transformer_task": "feature-extraction"}})
    assert read_layout(folder).max_tokens == 30


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"transformer_task": "fill-mask"}, "transformer_task 'fill-mask'"),
        ({"query_expansion": {"a": 1}}, "query_expansion"),
        ({"processing_kwargs": {"text": {"padding": "max_length"}}}, "processing_kwargs"),
        ({"model_args": {"num_hidden_layers": 2}}, "model_args num_hidden_layers"),
        ({"config_kwargs": {"is_causal": False}}, "config_kwargs is_causal"),
        ({"modality_config": {"text": {"method": "forward", "method_output_name": "logits"}}}, "output logits"),
    ],
)
def test_settings_that_would_change_vectors_are_refused(setting: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = _write(tmp_path, {"modules.json": [_TRANSFORMER], "sentence_bert_config.json": setting})
    with pytest.raises(UsageError, match=words):
        read_layout(folder)


def test_pooling_of_a_folder_without_pooling(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"config.json": {"architectures": ["Qwen2ForCausalLM"]}})
    assert read_layout(folder).pooling == "lasttoken"
    _write(tmp_path, {"config.json": {"architectures": ["Qwen2ForCausalLM"], "is_causal": False}})
    assert read_layout(folder).pooling == "mean"


_OUTSIDE = ["../weights", "/etc", "a/../../b", "..", "a\\..\\b", "C:/x"]


@pytest.mark.parametrize("name", _OUTSIDE)
@pytest.mark.parametrize("place", ["first module", "later module", "weights", "nested weights", "tokenizer"])
def test_names_that_lead_out_of_the_folder_are_refused(place: str, name: str, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": name}}
    files: dict[str, dict[str, Any]] = {
        "first module": {"modules.json": [{**_TRANSFORMER, "path": name}, _POOLING]},
        "later module": {"modules.json": [_TRANSFORMER, {**_POOLING, "path": name}]},
        "weights": {"model.safetensors.index.json": index},
        "nested weights": {
            "modules.json": [{**_TRANSFORMER, "path": "0_Transformer"}, _POOLING],
            "0_Transformer/model.safetensors.index.json": index,
        },
        "tokenizer": {"tokenizer_config.json": {"fast_tokenizer_files": ["tokenizer.json", name]}},
    }
    folder = _write(tmp_path / "model", {"config.json": {"model_type": "bert"}, **files[place]})
    with pytest.raises(DataError, match="is not a place inside the model's folder") as refused:
        read_layout(folder)
    assert repr(name.rstrip("/")) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("modules", [{}, [], [1], [{"type": "x.Transformer"}], [{"path": 1, "type": "x"}]])
def test_lists_of_modules_that_are_none_are_refused(modules: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"modules\.json: not a list of modules"):
        read_layout(_write(tmp_path, {"modules.json": modules}))


def test_names_of_the_machine_that_wrote_a_tokenizer_are_passed_over(tmp_path: Path) -> None:
    written = {"special_tokens_map_file": "/root/.cache/x/special_tokens_map.json", "name_or_path": "../elsewhere"}
    files = {"config.json": {"model_type": "bert"}, "tokenizer_config.json": written}
    assert read_layout(_write(tmp_path, files)).kind == "backbone"


def test_damaged_json(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_layout(tmp_path)

"""Encoders of the kinds that are published, with small random weights: embedded, trained, saved and loaded again.

Every kind that the page on embedding names as supported is here, and nothing else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from torch import nn
from transformers import AutoModel

from clusterbatch.batches.loader import SliceBatch
from clusterbatch.cli import main
from clusterbatch.config import RunConfig, TrainConfig
from clusterbatch.encoder.check import check_model
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.save import save_model
from clusterbatch.encoder.sides import SIDES, SideTokenizer
from clusterbatch.errors import DataError, UsageError
from clusterbatch.training.collectives import World
from clusterbatch.training.prepare_model import finish
from clusterbatch.training.starting_model import read_starting_model
from clusterbatch.training.step import TrainingStep
from tests.in_process import OVERRIDES
from tests.integration.subjects import subjects_config
from tests.training.batches import plain_batch

_LIMIT = 40
_TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "a",
    "while the cat sleeps on the warm windowsill all day long " * 12,
    "def add(first: int, second: int) -> int:\n    return first + second",
    "埼玉県は日本の関東地方に位置する県である。",
    "the warm windowsill, the lazy cat and the brown fox " * 3,
]
_E5 = {"query": "query: ", "document": "passage: "}
_INSTRUCTION = {"query": "Instruct: the\nQuery:", "document": ""}
_GEMMA = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "Clustering": "task: cluster | ",
}


@dataclass(frozen=True)
class _Case:
    """A model as Sentence Transformers keeps it: dense lists (outputs, bias, activation, residual)."""

    architecture: str
    pooling: str | list[str] = "mean"
    dense: Sequence[tuple[int, bool, nn.Module, bool]] = ()
    normalize: bool = True
    prompts: dict[str, str] = field(default_factory=dict)
    truncate_dim: int | None = None
    padding_side: str | None = None
    shards: bool = False
    # of its random weights
    std: float = 0.2


_MODERNBERT = "ModernBERT, gte-modernbert, Ettin encoders"
_TWO_DENSE = [(64, False, nn.Identity(), False), (32, False, nn.Identity(), False)]
# By their names in the table of the page on embedding.
_CASES = {
    "BERT: BGE, arctic-embed": _Case("bert", "cls", normalize=False),
    _MODERNBERT: _Case("modernbert", "cls"),
    "XLM-RoBERTa: bge-m3, arctic-embed-l-v2": _Case("xlm-roberta", "cls", prompts={"query": "query: "}),
    "multilingual-e5": _Case("xlm-roberta", "mean", prompts=_E5),
    "EmbeddingGemma": _Case("gemma3", "mean", _TWO_DENSE, prompts=_GEMMA),
    "Qwen3-Embedding": _Case("qwen3", "lasttoken", prompts=_INSTRUCTION, padding_side="left"),
    "LaBSE": _Case("bert", "cls", [(32, True, nn.Tanh(), False)]),
}
_PARTS = {
    # With weights of .2 bfloat16 turns one of its vectors by almost as much as is allowed: a cosine of .9991.
    "padding on the right": _Case("qwen3", "lasttoken", prompts=_INSTRUCTION, padding_side="right", std=0.15),
    "truncate_dim": _Case("modernbert", "mean", truncate_dim=8),
    "truncate_dim behind Dense": _Case("gemma3", "mean", _TWO_DENSE, truncate_dim=8),
    "weights in shards": _Case("modernbert", "mean", shards=True),
    "max": _Case("bert", "max"),
    "weightedmean": _Case("qwen3", "weightedmean", padding_side="right"),
    "several modes": _Case("bert", ["cls", "mean_sqrt_len_tokens"], [(16, True, nn.GELU(), False)]),
    "several modes in another order": _Case("bert", ["lasttoken", "max"]),
    "Dense with a residual": _Case("bert", "mean", [(32, True, nn.ReLU(), True), (8, True, nn.SiLU(), True)]),
}
_ALL = _CASES | _PARTS


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made(name)`: folder of the model called that in the tables."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = _make(_ALL[name], tiny, tmp_path_factory.mktemp("model"))
        return folders[name]

    return folder


def _make(case: _Case, tiny: Callable[[str], Path], folder: Path) -> Path:
    torch.manual_seed(1)
    transformer = st.Transformer(str(tiny(case.architecture)), max_seq_length=_LIMIT)
    # Weights of fresh models hardly tell texts, or windows, apart.
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=case.std)
    modules: list[nn.Module] = [transformer, st.Pooling(32, case.pooling)]
    width = 32 if isinstance(case.pooling, str) else 32 * len(case.pooling)
    for outputs, bias, activation, residual in case.dense:
        modules.append(st.Dense(width, outputs, bias, activation, use_residual=residual))
        width = outputs
    if case.normalize:
        modules.append(st.Normalize())
    model = SentenceTransformer(
        modules=modules, prompts=dict(case.prompts), truncate_dim=case.truncate_dim, device="cpu"
    )
    if case.padding_side:
        model.tokenizer.padding_side = case.padding_side
    model.save(str(folder))
    if case.shards:
        (folder / "model.safetensors").unlink()
        transformer.auto_model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def _vectors(encoder: Encoder, side: str) -> np.ndarray:
    return encoder.encode(encoder.tokenizer.encode(_TEXTS, encoder.max_tokens, encoder.prompts[side]), 256)


def _expected(folder: Path, side: str) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu")
    # In batches that pad.
    encode = model.encode_query if side == "query" else model.encode_document
    return np.asarray(encode(_TEXTS, batch_size=4, normalize_embeddings=True))


def _least_cosine(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float((first * second).sum(axis=1).min())


@pytest.mark.parametrize("name", _ALL)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.9999), (torch.bfloat16, 0.999)])
def test_the_vectors_are_those_of_sentence_transformers(
    name: str, dtype: torch.dtype, least: float, made: Callable[[str], Path], record_property: Callable[..., None]
) -> None:
    encoder = load_encoder(str(made(name)), dtype=dtype, packed=True)
    assert encoder.max_tokens == _LIMIT
    cosines = []
    for side in SIDES:
        vectors = _vectors(encoder, side)
        assert np.abs(np.triu(vectors @ vectors.T, 1)).max() < 0.999, "texts that are not told apart prove nothing"
        cosines.append(_least_cosine(vectors, _expected(made(name), side)))
    record_property("least_cosine", min(cosines))
    print(f"{name}, {dtype}: {min(cosines):.7f}")
    assert min(cosines) > least


def _batch(encoder: Encoder, step: int) -> SliceBatch:
    queries = [text for text in _TEXTS if text]
    tokens = [
        encoder.tokenizer.encode(texts, encoder.max_tokens, encoder.prompts[side])
        for side, texts in zip(SIDES, [queries, [text[::-1] for text in queries]], strict=True)
    ]
    return plain_batch(step, *tokens)


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "float32") for name in _ALL), *((name, "bfloat16") for name in _CASES)]
)
def test_trained_and_saved_it_is_the_same_model_everywhere(
    name: str, precision: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    encoder = load_encoder(str(made(name)), "backbone")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    tokens = _batch(encoder, 0).document_tokens
    expected = encoder.encode(tokens, 256)
    config = TrainConfig.model_validate(
        {
            "encoder": "backbone",
            "precision": precision,
            "dropout": 0.0,
            "learning_rate": 2e-3,
            "schedule": "constant",
            "warmup": 0.0,
            # Some of the micro-batches are computed twice.
            "micro_batch_tokens": 64,
            "activation_bytes": 2**18,
            "mask": {"duplicates": False},
        }
    )
    training = TrainingStep(encoder, config, 4, World())
    # In the mode, and by the attention, of training: windows and causality must be in it as well.
    assert encoder.training
    with torch.no_grad():
        assert _least_cosine(encoder(tokens).numpy(), expected) > 0.9999
    losses = [training.run(_batch(encoder, step)).loss for step in range(4)]
    assert losses[3] < losses[0]
    for weight, value in training.state()[0].items():
        assert not torch.equal(value, before[weight.removeprefix("encoder.")]), f"{weight} was not trained"
    finish(encoder)
    save_model(encoder, tmp_path)
    again = load_encoder(str(tmp_path), packed=True)
    assert again.dimensions == encoder.dimensions
    assert again.prompts == encoder.prompts
    for side in SIDES:
        trained = _vectors(encoder, side)
        assert _least_cosine(trained, _vectors(again, side)) > 0.99999
        assert _least_cosine(trained, _expected(tmp_path, side)) > 0.9999
    settings = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    assert _ALL[name].prompts.items() <= settings["prompts"].items()
    backbone = AutoModel.from_pretrained(tmp_path).state_dict()
    for weight, value in encoder.backbone.state_dict().items():
        assert torch.equal(backbone[weight], value), weight


def _copy(made: Callable[[str], Path], name: str, target: Path, files: dict[str, Any]) -> Path:
    """A copy of a model whose JSON files get these settings, or these values if they are lists."""
    folder = shutil.copytree(made(name), target)
    for file, settings in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        if isinstance(settings, dict) and (folder / file).is_file():
            settings = json.loads((folder / file).read_text()) | settings
        (folder / file).write_text(json.dumps(settings))
    return folder


def _modules(*types: str) -> list[dict[str, Any]]:
    paths = ["", *(f"{number}_{kind.rsplit('.', 1)[-1]}" for number, kind in enumerate(types[1:], 1))]
    return [
        {"idx": number, "name": str(number), "path": path, "type": kind if "." in kind else f"{_MODULES}.{kind}"}
        for number, (kind, path) in enumerate(zip(types, paths, strict=True))
    ]


_MODULES = "sentence_transformers.models"
_CODE = {"AutoConfig": "code.OwnConfig", "AutoModel": "code.OwnModel"}
_DENSE = "2_Dense/config.json"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"config.json": {"model_type": "own", "auto_map": _CODE}},
            r"needs code of its own \(code\.OwnModel, auto_map",
        ),
        # Here transformers would make another model of the same weights.
        ({"config.json": {"auto_map": {"AutoModel": "org/repo--code.JinaBertModel"}}}, "needs code of its own"),
        (
            {"modules.json": _modules("custom_st.Transformer", "Pooling")},
            "module custom_st.Transformer is code of its own",
        ),
        ({"modules.json": _modules("Transformer", "WeightedLayerPooling", "Pooling")}, "module WeightedLayerPooling"),
        ({"modules.json": _modules("Transformer", "CNN", "Pooling")}, "module CNN"),
        ({"modules.json": _modules("Transformer", "Pooling", "LayerNorm")}, "module LayerNorm"),
        ({"modules.json": _modules("Transformer", "Pooling", "Normalize", "Dense")}, "module Dense"),
        ({"modules.json": _modules("Transformer", "Dense")}, "module Dense"),
        ({"modules.json": _modules("Router", "Normalize")}, "module Router"),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "a SparseEncoder"),
        ({"1_Pooling/config.json": {"include_prompt": False}}, "include_prompt"),
        ({"1_Pooling/config.json": {"pooling_mode": "attention"}}, "pooling attention"),
        ({"tokenizer_config.json": {"truncation_side": "left"}}, "cuts long texts at their start"),
        ({"sentence_bert_config.json": {"modality_config": {"text": {}, "message": {}}}}, "chat template"),
        ({_DENSE: {"activation_function": "torch.nn.PReLU"}}, "activation_function torch.nn.PReLU"),
        ({_DENSE: {"activation_function": "code.Own"}}, "activation_function code.Own"),
        ({_DENSE: {"module_input_name": "token_embeddings"}}, "module_input_name"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    files: dict[str, Any], words: str, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def agree(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", agree)
    folder = _copy(made, "EmbeddingGemma", tmp_path / "model", files)
    (folder / "code.py").write_text("raise SystemExit('code of the model was run')")
    with pytest.raises(UsageError, match=rf"\Atrain\.model: .*{words}") as raised:
        check_model(str(folder), key="train.model", kind="backbone")
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert not asked


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "2_Dense" / "model.safetensors").unlink(), "2_Dense: no weights in the safetensors"),
        (lambda folder: (folder / "2_Dense" / "model.safetensors").write_bytes(b"no tensor"), "cannot be loaded"),
        (lambda folder: shutil.copytree(folder / "3_Dense", folder / "2_Dense", dirs_exist_ok=True), "but gets 32"),
        (lambda folder: (folder / _DENSE).write_text("{}"), "in_features and out_features"),
    ],
)
def test_damaged_dense_modules(
    change: Callable[[Path], Any], words: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _copy(made, "EmbeddingGemma", tmp_path / "model", {})
    change(folder)
    with pytest.raises(DataError, match=words) as raised:
        check_model(str(folder))
    assert "\n" not in str(raised.value)


def test_a_missing_shard_is_named(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _copy(made, "weights in shards", tmp_path / "model", {})
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        check_model(str(folder))


def test_prompts_of_the_configuration_need_pooling_that_takes_them(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = str(_copy(made, "LaBSE", tmp_path / "model", {"1_Pooling/config.json": {"include_prompt": False}}))
    assert load_encoder(folder).dimensions == 32
    SideTokenizer.of_model(folder, dict.fromkeys(SIDES))
    with pytest.raises(UsageError, match="include_prompt"):
        SideTokenizer.of_model(folder, dict.fromkeys(SIDES), {"query": "find: ", "document": ""})


def test_code_that_transformers_has_taken_over_is_no_obstacle(made: Callable[[str], Path], tmp_path: Path) -> None:
    code = {"AutoModel": "org/repo--modeling.ModernBertModel"}
    folder = _copy(made, _MODERNBERT, tmp_path / "model", {"config.json": {"auto_map": code}})
    encoder = load_encoder(str(folder))
    assert np.array_equal(_vectors(encoder, "query"), _vectors(load_encoder(str(made(_MODERNBERT))), "query"))
    save_model(encoder, tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_files_say_how_wide_the_vectors_are(made: Callable[[str], Path]) -> None:
    for name in _ALL:
        folder = str(made(name))
        for kind in ("backbone", "static"):
            config = RunConfig.model_validate({"workspace": "/none", "train": {"model": folder, "encoder": kind}})
            encoder = load_encoder(folder, kind)
            assert read_starting_model(config).dimensions == encoder.dimensions


def test_the_page_on_embedding_names_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "clusterbatch" / "embedding" / "README.md").read_text()
    table = page.split("## Supported encoders")[1].split("\n\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(_CASES)
    for row, case in zip(rows, _CASES.values(), strict=True):
        pooling = [case.pooling] if isinstance(case.pooling, str) else case.pooling
        assert row[1] == " and ".join(f"`{mode}`" for mode in pooling)
        assert int(row[2] or 0) == len(case.dense)


@pytest.mark.parametrize("name", [_MODERNBERT, "EmbeddingGemma"])
def test_a_run_by_the_command(name: str, made: Callable[[str], Path], tmp_path: Path, in_process: None) -> None:
    subjects = subjects_config(tmp_path)
    words = {
        "workspace": f"{tmp_path}/ws",
        "ray.mode": "in-process",
        "corpus.paths": f"{tmp_path}/pairs.jsonl",
        "evaluate.path": f"{tmp_path}/topics",
        "evaluate.top_k": 10,
        "evaluate.metrics": "[NDCG@10]",
        "embed.model": made(name),
        # EmbeddingGemma's own prompt of queries has 23 tokens.
        "embed.max_tokens": 32 if name == "EmbeddingGemma" else 16,
        "cluster.mean_size": 40,
        "train.model": made(name),
        "train.encoder": "backbone",
        "train.steps": 3,
        "train.workers": 1,
        "batches.size": 16,
    }
    assert subjects.workspace == words["workspace"]
    assert main(["run", *(f"{key}={value}" for key, value in words.items()), *OVERRIDES]) == 0
    for side in SIDES:
        trained = load_encoder(f"{tmp_path}/ws/model")
        assert _least_cosine(_vectors(trained, side), _expected(tmp_path / "ws" / "model", side)) > 0.9999
        assert _least_cosine(_vectors(trained, side), _expected(made(name), side)) < 0.9999, "nothing was trained"
    assert len(trained.dense) == len(_ALL[name].dense)

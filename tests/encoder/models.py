"""Small transformers with random weights and real tokenizers of their families, made without a hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_POSITIONS = 130
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, while the cat sleeps on the warm windowsill all day long.",
    "def add(first: int, second: int) -> int:\n    return first + second",
    "埼玉県は日本の関東地方に位置する県である。県庁所在地はさいたま市。",
    "השועל החום המהיר קופץ مرحبا بالعالم 😀😀 Ελληνικά русский текст",
]
_BRACKETS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ANGLES = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
# The order of ids: BERT's padding is 0, RoBERTa's 1.
_BERT_ORDER = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_ROBERTA_ORDER = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")

_Made = tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]


def make_model(architecture: str, folder: Path) -> Path:
    """Write a bare transformer folder (config, weights, tokenizer) of one of ARCHITECTURES or OTHER_ARCHITECTURES."""
    torch.manual_seed(0)
    model, tokenizer = (ARCHITECTURES | OTHER_ARCHITECTURES)[architecture]()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_static(words: Iterable[str], folder: Path, dimensions: int = 32) -> Path:
    """Writes a static encoder of random vectors that knows these words; a run of it handles kilobytes, not 140 MB."""
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = torch.randn(len(vocabulary), dimensions, generator=torch.Generator().manual_seed(0))
    save_file({"embedding.weight": weights}, folder / "model.safetensors")
    static = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.StaticEmbedding"}
    (folder / "modules.json").write_text(json.dumps([static]))
    return folder


def _wordpiece(names: dict[str, str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=names["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [names[name] for name in _BERT_ORDER]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return _templated(tokenizer, names)


def _bytes(names: dict[str, str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [names[name] for name in _ROBERTA_ORDER]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return _templated(tokenizer, names)


def _unigram(names: dict[str, str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [names[name] for name in _ROBERTA_ORDER]
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token=names["unk_token"], show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return _templated(tokenizer, names)


def _templated(tokenizer: Tokenizer, names: dict[str, str]) -> Tokenizer:
    first, last = names["cls_token"], names["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
    )
    return tokenizer


def _fast(tokenizer: Tokenizer, names: dict[str, str]) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def _bert() -> _Made:
    tokenizer = _wordpiece(_BRACKETS)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=_POSITIONS, pad_token_id=0, **_SIZE
    )
    return transformers.BertModel(config), _fast(tokenizer, _BRACKETS)


def _roberta() -> _Made:
    tokenizer = _bytes(_ANGLES)
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=_POSITIONS,
        pad_token_id=1,
        type_vocab_size=1,
        **_SIZE,
    )
    return transformers.RobertaModel(config), _fast(tokenizer, _ANGLES)


def _xlm_roberta() -> _Made:
    tokenizer = _unigram(_ANGLES)
    config = transformers.XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=_POSITIONS,
        pad_token_id=1,
        type_vocab_size=1,
        **_SIZE,
    )
    return transformers.XLMRobertaModel(config), _fast(tokenizer, _ANGLES)


def _modernbert() -> _Made:
    tokenizer = _bytes(_BRACKETS)
    config = transformers.ModernBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=_POSITIONS,
        pad_token_id=tokenizer.token_to_id("[PAD]"),
        cls_token_id=tokenizer.token_to_id("[CLS]"),
        sep_token_id=tokenizer.token_to_id("[SEP]"),
        bos_token_id=None,
        eos_token_id=None,
        local_attention=16,
        global_attn_every_n_layers=2,
        **_SIZE,
    )
    return transformers.ModernBertModel(config), _fast(tokenizer, _BRACKETS)


def _mpnet() -> _Made:
    tokenizer = _wordpiece(_ANGLES)
    # Its positions count from the padding's id, which the model takes to be 1.
    config = transformers.MPNetConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=_POSITIONS, pad_token_id=0, **_SIZE
    )
    return transformers.MPNetModel(config), _fast(tokenizer, _ANGLES)


def _distilbert() -> _Made:
    tokenizer = _wordpiece(_BRACKETS)
    config = transformers.DistilBertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=_POSITIONS,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        pad_token_id=0,
    )
    return transformers.DistilBertModel(config), _fast(tokenizer, _BRACKETS)


def _t5() -> _Made:
    tokenizer = _unigram(_ANGLES)
    config = transformers.T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        pad_token_id=1,
        decoder_start_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config), _fast(tokenizer, _ANGLES)


def _xlnet() -> _Made:
    tokenizer = _unigram(_ANGLES)
    config = transformers.XLNetConfig(
        vocab_size=tokenizer.get_vocab_size(), d_model=32, n_layer=2, n_head=4, d_inner=64, pad_token_id=1
    )
    return transformers.XLNetModel(config), _fast(tokenizer, _ANGLES)


def _qwen2() -> _Made:
    tokenizer = _bytes(_ANGLES)
    config = transformers.Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), num_key_value_heads=2, pad_token_id=1, **_SIZE
    )
    return transformers.Qwen2ForCausalLM(config), _fast(tokenizer, _ANGLES)


def _qwen3() -> _Made:
    """Decoder with the tokenizer class of its family, which pads on the left and ends texts by its post-processor."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    ended = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), ended])
    config = transformers.Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=_POSITIONS,
        pad_token_id=tokenizer.token_to_id(end),
        **_SIZE,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        fast = transformers.Qwen2TokenizerFast.from_pretrained(folder, padding_side="left", model_max_length=128)
    return transformers.Qwen3Model(config), fast


def _gemma3() -> _Made:
    """Text model of EmbeddingGemma: attention in both directions, in windows in the first layer."""
    names = {
        "cls_token": "<bos>",
        "sep_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<m>",
    }
    tokenizer = _bytes(names)
    config = transformers.Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=_POSITIONS,
        pad_token_id=tokenizer.token_to_id("<pad>"),
        sliding_window=16,
        use_bidirectional_attention=True,
        layer_types=["sliding_attention", "full_attention"],
        **_SIZE,
    )
    return transformers.Gemma3TextModel(config), _fast(tokenizer, names)


def _bart() -> _Made:
    tokenizer = _bytes(_ANGLES)
    config = transformers.BartConfig(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )
    return transformers.BartModel(config), _fast(tokenizer, _ANGLES)


def _vit() -> _Made:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **_SIZE)
    return transformers.ViTModel(config), _fast(_bytes(_ANGLES), _ANGLES)


ARCHITECTURES: dict[str, Callable[[], _Made]] = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _xlm_roberta,
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "distilbert": _distilbert,
}
# Families that are encoded with padding only on a CPU, or refused (bart, vit).
OTHER_ARCHITECTURES: dict[str, Callable[[], _Made]] = {
    "t5": _t5,
    "xlnet": _xlnet,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "bart": _bart,
    "vit": _vit,
}

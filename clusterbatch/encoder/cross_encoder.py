"""Cross-encoders: a transformer that reads query and document together and gives one score, as a teacher.

The folder is one of Sentence Transformers' CrossEncoder, or a bare transformer for sequence classification. For a pair,
its scores are those of `CrossEncoder.predict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clusterbatch.encoder.load import load_weights
from clusterbatch.encoder.model_files import ACTIVATIONS, longest_input, shorter
from clusterbatch.encoder.tokens import micro_batches
from clusterbatch.encoder.untrusted_files import check_weights, read_config, read_json, refuse_code
from clusterbatch.errors import DataError, UsageError, first_line

_LOADER = "AutoModelForSequenceClassification"
_SETTINGS = "config_sentence_transformers.json"
# Pairs whose tokens are in memory at once.
_CHUNK = 4096


@dataclass(frozen=True)
class CrossLayout:
    """Settings in the files of a cross-encoder. activation: one of ACTIVATIONS, applied to the logit."""

    folder: Path
    max_tokens: int | None
    activation: str


def is_cross_encoder(folder: str | Path) -> bool:
    """Return whether the folder holds a cross-encoder, by what its files say."""
    settings, config = read_json(Path(folder, _SETTINGS)) or {}, read_config(Path(folder))
    if settings.get("model_type") == "CrossEncoder":
        return True
    architecture = str((config.get("architectures") or [""])[0])
    return not Path(folder, "modules.json").is_file() and architecture.endswith("ForSequenceClassification")


def read_cross_layout(folder: str | Path) -> CrossLayout:
    """Read the settings of a cross-encoder, without loading a weight.

    Raises UsageError if it gives several labels, has parts or settings that are not supported, or would need code of
    its own.
    """
    folder = Path(folder)
    settings, config = read_json(folder / _SETTINGS) or {}, read_config(folder)
    modules = read_json(folder / "modules.json") or [{"type": "Transformer", "path": ""}]
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if kinds != ["Transformer"] or modules[0]["path"]:
        raise UsageError(f"{folder}: a cross-encoder of modules {', '.join(kinds)} (one Transformer is supported)")
    refuse_code(folder, _LOADER)
    # Of a configuration that names none, transformers makes two.
    labels = len(config.get("id2label") or range(2))
    if labels != 1:
        raise UsageError(f"{folder}: gives {labels} labels, but a teacher gives one score")
    if settings.get("default_prompt_name"):
        raise UsageError(f"{folder}: a prompt (default_prompt_name) is not supported for cross-encoders")
    sentence = read_json(folder / "sentence_bert_config.json") or {}
    check_weights(folder)
    return CrossLayout(folder, longest_input(folder, sentence), _activation(folder, settings, config))


class CrossEncoder:
    """Score pairs of texts, for inference. max_tokens: limit of a pair, beside the model's own; None: that alone.

    Raises DataError if files are damaged or do not hold all weights, and what `read_cross_layout` raises.
    """

    def __init__(
        self,
        folder: str | Path,
        max_tokens: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoTokenizer

        layout = read_cross_layout(folder)
        if dtype == torch.int8:
            raise UsageError(f"{folder}: a cross-encoder has no products of 8-bit integers (dtype int8; take auto)")
        self._max_tokens = shorter(max_tokens, layout.max_tokens)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            # Tokenizers of many families fail on missing or damaged files in ways of their own.
            raise DataError(f"{folder}: tokenizer cannot be loaded ({first_line(error)})") from error
        self._model = load_weights(layout.folder, _LOADER, dtype).to(device).eval()
        self._activation: nn.Module = getattr(nn, layout.activation)()
        self._device = torch.device(device)

    def scores(self, queries: Sequence[str], documents: Sequence[str], batch_tokens: int) -> np.ndarray:
        """Return (N,) float32 scores of N pairs, from micro-batches of at most `batch_tokens` tokens."""
        found = np.empty(len(queries), np.float32)
        for start in range(0, len(queries), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            found[chunk] = self._chunk(list(queries[chunk]), list(documents[chunk]), batch_tokens)
        return found

    def _chunk(self, queries: list[str], documents: list[str], batch_tokens: int) -> np.ndarray:
        limit = {"truncation": True, "max_length": self._max_tokens} if self._max_tokens else {}
        encoded = self._tokenizer(queries, documents, **limit)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        found = np.empty(len(queries), np.float32)
        for rows in micro_batches(lengths, batch_tokens):
            columns = {name: [values[row] for row in rows.tolist()] for name, values in encoded.items()}
            inputs = self._tokenizer.pad(columns, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                logits = self._model(**inputs).logits.float()
                found[rows] = self._activation(logits).squeeze(1).cpu().numpy()
        return found


def _activation(folder: Path, settings: dict[str, Any], config: dict[str, Any]) -> str:
    """Return the activation by its name in torch.nn; versions of Sentence Transformers have kept it in three places."""
    named = settings.get("activation_fn")
    named = named or (config.get("sentence_transformers") or {}).get("activation_fn")
    named = str(named or config.get("sbert_ce_default_activation_function") or "torch.nn.Sigmoid")
    name = named.rsplit(".", 1)[-1]
    if not named.startswith("torch.nn.") or name not in ACTIVATIONS:
        raise UsageError(f"{folder}: activation {named} is not supported ({', '.join(ACTIVATIONS)} are)")
    return name

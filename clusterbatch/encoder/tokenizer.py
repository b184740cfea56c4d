"""From texts to `Tokens`: the model's own fast tokenizer, without padding, truncated as Sentence Transformers does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from clusterbatch.encoder.model_files import Layout, read_layout
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import DataError, UsageError, first_line

# Texts are cut to this many characters per token wanted before they are tokenised. When that leaves too few tokens
# (long words, indentation), the cut is moved out, so it never changes the result.
_CHARACTERS_PER_TOKEN = 8
# A cut inside a word changes the tokens of that word: BERT makes up to 100 of one. These must be beyond the limit.
_MARGIN = 128
# Texts whose encodings are in memory at once.
_CHUNK = 4096
# Characters of a prompt that a message shows.
_SHOWN = 40


class Tokenizer:
    """Tokenizer of a model folder. Picklable: workers get the folder and load it themselves.

    special_tokens: whether [CLS], [SEP] and the like are put around every text (static encoders take none).
    """

    def __init__(self, folder: str | Path, special_tokens: bool = True) -> None:
        self.folder = str(folder)
        self.special_tokens = special_tokens
        layout = read_layout(folder)
        self.backend = _load(layout)
        self.backend.no_truncation()
        self.backend.no_padding()
        self._prefix, self._suffix = self._around() if special_tokens else ([], [])
        vocabulary = self.backend.get_vocab()
        self.vocabulary = max(vocabulary.values()) + 1
        self.unknown = _unknown_token(self.backend, vocabulary)
        self.padding = _padding_token(layout, vocabulary)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.folder, self.special_tokens)

    @property
    def fingerprint(self) -> str:
        """Fingerprint that changes if any text could get other tokens."""
        # Imported here: storage needs more than the encoder does.
        from clusterbatch.store.checksum import checksum

        return checksum(f"{self.special_tokens} {self.backend.to_str()}".encode())

    @property
    def added(self) -> int:
        """Number of special tokens around each text."""
        return len(self._prefix) + len(self._suffix)

    def encode(self, texts: Sequence[str], max_tokens: int | None = None, prompt: str = "") -> Tokens:
        """Return token ids (int32) of each text behind `prompt`, at most `max_tokens` with the special tokens.

        Raises UsageError if the special tokens and the prompt leave no room for text.
        """
        room = None if max_tokens is None else max_tokens - self.added
        self.check_room(max_tokens, prompt)
        parts = []
        for start in range(0, len(texts), _CHUNK):
            chunk = (
                [prompt + text for text in texts[start : start + _CHUNK]] if prompt else texts[start : start + _CHUNK]
            )
            parts.append(self.surrounded(self._bodies(chunk, room)))
        return Tokens.concatenate(parts) if parts else Tokens(np.empty(0, np.int32), np.zeros(1, np.int64))

    def check_room(self, max_tokens: int | None, prompt: str = "") -> None:
        """Raise UsageError if special tokens and `prompt` fill `max_tokens`: all texts would have the same tokens."""
        if max_tokens is None:
            return
        encoding = self.backend.encode(prompt + "a", add_special_tokens=False) if prompt else None
        # A token across the end of the prompt, as of a space and the letter behind it, holds some of the text.
        of_prompt = 0 if encoding is None else sum(end <= len(prompt) for _, end in encoding.offsets)
        if self.added + of_prompt >= max_tokens:
            shown = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}..."
            behind = f" and {of_prompt} of the prompt {shown!r}" if prompt else ""
            raise UsageError(f"{max_tokens} tokens leave no room for text beside {self.added} special ones{behind}")

    def surrounded(self, bodies: Sequence[list[int]]) -> Tokens:
        """Return texts of the given token ids (int32) with the special tokens around each."""
        return Tokens.from_lists([self._prefix + ids + self._suffix for ids in bodies])

    def _bodies(self, texts: Sequence[str], room: int | None) -> list[list[int]]:
        if room is None:
            return self._ids(texts)
        cut = _CHARACTERS_PER_TOKEN * (room + _MARGIN)
        bodies = self._ids([text[:cut] for text in texts])
        short = [row for row, text in enumerate(texts) if len(text) > cut and len(bodies[row]) < room + _MARGIN]
        while short:
            cut *= 8
            for row, ids in zip(short, self._ids([texts[row][:cut] for row in short]), strict=True):
                bodies[row] = ids
            short = [row for row in short if len(texts[row]) > cut and len(bodies[row]) < room + _MARGIN]
        return [ids[:room] for ids in bodies]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _around(self) -> tuple[list[int], list[int]]:
        encoding = self.backend.encode("a", add_special_tokens=True)
        body = [position for position, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: body[0]], encoding.ids[body[-1] + 1 :]


def _load(layout: Layout) -> tokenizers.Tokenizer:
    file = layout.module / "tokenizer.json"
    if layout.kind == "static":
        if not file.is_file():
            raise DataError(f"{layout.module}: no tokenizer.json")
        return tokenizers.Tokenizer.from_file(str(file))
    # As Sentence Transformers does: tokenizer_config.json may change what tokenizer.json says.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(layout.module), local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        # Japanese BERT's, for example, splits words with a package of its own.
        raise UsageError(f"{layout.module}: its tokenizer needs a package ({_one_line(error)})") from error
    except Exception as error:
        # Tokenizers of many families fail on missing or damaged files in ways of their own.
        raise DataError(f"{layout.module}: tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise UsageError(f"{layout.module}: has only a slow tokenizer; save it with its fast counterpart")
    if tokenizer.truncation_side != "right":
        raise UsageError(f"{layout.module}: a tokenizer that cuts long texts at their start is not supported")
    # A copy: the tokenizer that transformers keeps is changed by every call with padding or truncation.
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if layout.lower_case:
        given = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Lowercase(), *given])
    return backend


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _padding_token(layout: Layout, vocabulary: dict[str, int]) -> int:
    """Return the id that fills up rows; if none is declared any will do, as padding is never attended to."""
    for name in ("config.json", "tokenizer_config.json"):
        file = layout.module / name
        declared = json.loads(file.read_bytes()) if file.is_file() else {}
        token = declared.get("pad_token_id", declared.get("pad_token"))
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            token = vocabulary.get(token)
        # Some configurations say -1 for none.
        if token is not None and int(token) >= 0:
            return int(token)
    return 0


def _unknown_token(backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> int | None:
    token = getattr(backend.model, "unk_token", None)
    if token is None:
        # SentencePiece models name it by number, which the Python side does not show.
        token = next((name for name in ("<unk>", "[UNK]") if name in vocabulary), None)
    return None if token is None else vocabulary.get(token)

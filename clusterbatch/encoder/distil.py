"""Static encoders fitted to an embedding model, to take its place where speed counts more than accuracy.

A text's vector is the mean of its tokens' vectors, so embedding a corpus costs little more than tokenising it.

Legend: N texts, V tokens in the vocabulary, e width of the token embeddings, d of the model's vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import nn

from clusterbatch.encoder.devices import inference_dtype, resolve_device
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.sides import Side
from clusterbatch.encoder.tokens import Tokens
from clusterbatch.errors import UsageError

# Ridge penalty, as a share of the features' mean variance.
_RIDGE = 1e-2
_BATCH_TOKENS = 2048


def distil_static(
    folder: str, texts: Mapping[Side, Sequence[str]], *, max_tokens: int | None = 256, device: str = "cpu"
) -> Encoder:
    """Return a static encoder whose vectors are near those of the model in `folder` for texts like these.

    The means of the texts' token embeddings are mapped to the model's vectors by ridge regression. Map and offset go
    into the (V, d) table, so the result is a plain table of token vectors, averaged. It takes no prompts; what the
    model embeds here has those of its side. A few thousand texts are enough; they are cut to `max_tokens`. The same
    texts give the same encoder.

    Raises UsageError if the model is static already or has a tower for images, or if there are no texts.
    """
    model = load_encoder(folder, packed=True, dtype=inference_dtype("auto", resolve_device(device)), device=device)
    if model.kind != "backbone":
        raise UsageError(f"{folder}: only a transformer can be distilled to a static encoder")
    given = list(chain.from_iterable(texts.values()))
    if not given:
        raise UsageError("there are no texts to fit a static encoder to")
    encoder = load_encoder(folder, "static")
    assert isinstance(encoder.backbone, nn.EmbeddingBag)
    tokens = encoder.prepare(given, max_tokens)
    assert isinstance(tokens, Tokens)
    table_Ve = encoder.backbone.weight.detach()
    with torch.inference_mode():
        means_Ne = encoder.backbone(
            torch.from_numpy(tokens.values.astype(np.int64)), torch.from_numpy(tokens.offsets[:-1])
        )
    wanted_Nd = np.concatenate(
        [
            model.encode(model.prepare(of_side, max_tokens, model.prompts[side]), _BATCH_TOKENS)
            for side, of_side in texts.items()
        ]
    )
    map_ed, offset_d = _ridge(means_Ne.numpy().astype(np.float64), wanted_Nd.astype(np.float64))
    # The mean of mapped vectors is the mapped mean.
    mapped_Vd = table_Ve @ torch.from_numpy(map_ed).float() + torch.from_numpy(offset_d).float()
    encoder.backbone = nn.EmbeddingBag.from_pretrained(mapped_Vd, mode="mean")
    encoder.prompts = dict.fromkeys(encoder.prompts, "")
    return encoder


def _ridge(features_Ne: np.ndarray, wanted_Nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (e, d) and (d,): features @ map + offset is the least-squares fit, with a penalty on the map."""
    mean_e, mean_d = features_Ne.mean(axis=0), wanted_Nd.mean(axis=0)
    centred_Ne = features_Ne - mean_e
    moment_ee = centred_Ne.T @ centred_Ne
    moment_ee += _RIDGE * np.trace(moment_ee) / len(mean_e) * np.eye(len(mean_e))
    map_ed = np.linalg.solve(moment_ee, centred_Ne.T @ (wanted_Nd - mean_d))
    return map_ed, mean_d - mean_e @ map_ed

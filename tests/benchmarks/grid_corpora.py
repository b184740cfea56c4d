"""Corpora of bench_grid, with their held-out queries, and the untrained encoders that it trains on them."""

from __future__ import annotations

import json
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from clusterbatch.corpus.holdout import choose, sketch, sketched
from clusterbatch.corpus.normalise import text_hashes
from clusterbatch.embedding.char_ngrams import NgramSurrogate
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.model import Encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from tests.benchmarks.static_trainer import Corpus, Pairs, encode
from tests.data_folder import require_data_folder

# Files of the data folder, and what is held out. Any other NAME (or NAME-by-query) is of the file pairs/NAME.parquet;
# learning rates were chosen on movies, gsm8k and awsdocs, which are not part of the map.
CORPORA = {
    "code": (["pairs/codepairs.parquet"], "document"),
    "medquad": (["pairs/medquad.parquet"], "document"),
    "questions-by-query": (["eval/squad_dev", "eval/covidqa"], "query"),
    "wordset-by-query": (["pairs/wordset.parquet"], "query"),
    "japanese-by-query": (["pairs_ja.parquet"], "query"),
    "mitre": (["pairs/mitre.parquet"], "document"),
    "proposals": (["pairs/proposals.parquet"], "document"),
    "msdocs": (["pairs/msdocs.parquet"], "document"),
    "factbook": (["pairs/factbook.parquet"], "document"),
    "mixture": (["pairs"], "document"),
    "questions": (["eval/squad_dev", "eval/covidqa"], "document"),
    "japanese": (["pairs_ja.parquet"], "document"),
    "wordset": (["pairs/wordset.parquet"], "document"),
    "tldr": (["pairs/tldr.parquet"], "document"),
    "msdocs-by-query": (["pairs/msdocs.parquet"], "query"),
}
TOKENS = 64
_PAIRS, _QUERIES, _DIMENSIONS = 12_000, 1500, 128


@cache
def static_model(folder: Path) -> Encoder:
    """Write the static model of the study, unless it is there; load it."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_model(load_encoder(resolve_model("all-MiniLM-L6-v2"), "static"), folder)
        vectors = load_file(weights)["embedding.weight"]
        vectors -= vectors.mean(dim=0)
        _, _, directions = torch.linalg.svd(vectors.T @ vectors)
        save_file({"embedding.weight": (vectors @ directions[:_DIMENSIONS].T).contiguous()}, weights)
    return load_encoder(folder, "static")


def first_layers(folder: Path, layers: int) -> str:
    """Write MiniLM without its later layers, unless it is there; return its folder."""
    model = folder / f"minilm-{layers}"
    if not model.exists():
        shutil.copytree(resolve_model("all-MiniLM-L6-v2"), model, symlinks=False)
        described = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**described, "num_hidden_layers": layers}))
        weights = load_file(model / "model.safetensors")
        later = tuple(f"encoder.layer.{number}." for number in range(layers, described["num_hidden_layers"]))
        kept = {name: each.contiguous() for name, each in weights.items() if not name.startswith(later)}
        (model / "model.safetensors").unlink()
        save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    return str(model)


def read_pairs(path: Path) -> pa.Table:
    """Return (query, document, source) of a file, of all files of a folder or of a BEIR collection."""
    columns = ["query", "document", "source"]
    if path.suffix == ".parquet":
        return pq.read_table(path, columns=columns)
    if not (path / "corpus.jsonl").exists():
        return pa.concat_tables([pq.read_table(each, columns=columns) for each in sorted(path.glob("*.parquet"))])
    texts = {}
    for name in ("corpus", "queries"):
        lines = map(json.loads, (path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
        texts[name] = {line["_id"]: f"{line.get('title') or ''} {line['text']}".strip() for line in lines}
    judged = [line.split("\t") for line in (path / "qrels/test.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    found = [(query, document) for query, document, grade in judged if int(grade) > 0]
    queries, documents = (
        [texts[kind][pair[side]] for pair in found] for side, kind in enumerate(("queries", "corpus"))
    )
    return pa.table([queries, documents, [path.name] * len(found)], names=columns)


def load_corpus(folder: Path, name: str) -> Corpus:
    """Return a corpus of the study in `folder`; what was read once is kept there."""
    kept = folder / f"read/{name}.pickle"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps(read_corpus(folder, name)))
    corpus: Corpus = pickle.loads(kept.read_bytes())
    return corpus


def read_corpus(folder: Path, name: str) -> Corpus:
    """Read a corpus, hold queries out and tokenise.

    NAME: of about 12,000 of its pairs. NAME:N: of all of them, N are trained on (all: NAME:all); queries and documents
    to search are the same for every N, and a smaller N trains on some of the pairs of a larger one.
    """
    kind, _, wanted = name.partition(":")
    others = [f"pairs/{kind.removesuffix('-by-query')}.parquet"], "query" if kind.endswith("-by-query") else "document"
    paths, by = CORPORA.get(kind, others)
    table = pa.concat_tables([read_pairs(require_data_folder() / path) for path in paths])
    for side in ("query", "document"):
        table = table.append_column(f"{side}_hash", pa.array(text_hashes(table[side].to_pylist(), len(table))))
    # The first of equal pairs; all pairs of each drawn document. A salt: the hold-out draws by the hash itself.
    keys = np.stack([table[f"{side}_hash"].to_numpy() for side in ("query", "document")])
    first = np.sort(np.unique(keys, axis=1, return_index=True)[1])
    salted = keys[1][first] * np.uint64(0x9E3779B97F4A7C15)
    drawn = salted / 2.0**64 < (1.0 if wanted else _PAIRS / len(first))
    table = table.take(pa.array(first[drawn]))
    held_out = choose([sketch(table, sketched(_QUERIES, by))], _QUERIES, by)
    mask, judged = held_out.mask(table), held_out.judged(table)
    encoder = static_model(folder / "static")

    def tokens(texts: list[str]) -> Any:
        return encoder.tokenizer.encode(texts, TOKENS)

    hashes = table["document_hash"].to_numpy()
    distinct, place = np.unique(hashes, return_index=True)
    tested = table.filter(pa.array(judged))
    query_hashes, query_place = np.unique(tested["query_hash"].to_numpy(), return_index=True)
    relevant = [
        np.searchsorted(
            distinct, np.unique(tested["document_hash"].to_numpy()[tested["query_hash"].to_numpy() == each])
        )
        for each in query_hashes
    ]
    rows = np.flatnonzero(~mask)
    if wanted not in ("", "all"):
        order = np.argsort(table["document_hash"].to_numpy()[rows] * np.uint64(0xC2B2AE3D27D4EB4F), kind="stable")
        rows = np.sort(rows[order[: int(wanted)]])
    trained = table.take(pa.array(rows))
    query, document = trained["query"].to_pylist(), trained["document"].to_pylist()
    query_tokens, document_tokens = tokens(query), tokens(document)
    if name.startswith("japanese"):
        surrogate = NgramSurrogate.fit(document, TOKENS)
        vectors = [surrogate.encode(texts, TOKENS) for texts in (query, document)]
    else:
        weights = untrained_vectors(folder)
        vectors = [encode(weights, each) for each in (query_tokens, document_tokens)]
    return Corpus(
        name,
        Pairs(
            query_tokens,
            document_tokens,
            trained["query_hash"].to_numpy(),
            trained["document_hash"].to_numpy(),
            *[np.ascontiguousarray(each, np.float32) for each in vectors],
        ),
        np.array(trained["source"].to_pylist()),
        tokens(tested["query"].take(pa.array(query_place)).to_pylist()),
        tokens(table["document"].take(pa.array(place)).to_pylist()),
        relevant,
    )


@cache
def untrained_vectors(folder: Path) -> np.ndarray:
    """Return the token vectors of the static model, (V, 128) float32."""
    static_model(folder / "static")
    return load_file(folder / "static/model.safetensors")["embedding.weight"].numpy()

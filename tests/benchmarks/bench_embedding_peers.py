"""Embedding on a CPU, rows/s: number types of this encoder, an older build, OpenVINO, Sentence Transformers.

    python -m tests.benchmarks.bench_embedding_peers [--threads 2] [--documents 2000] [--rounds 4]
        [--older CHECKOUT] [--openvino PYTHON]

Real documents (CLUSTERBATCH_DATA), all-MiniLM-L6-v2, 256 tokens, tokenising included. Each encoder is a process of its
own; a round gives the same documents to all in turn. The peers sort texts by length and use the best batch size of a
sweep; OpenVINO's int8 is NNCF's quantisation, calibrated on 300 documents. --older: a checkout of this project to
compare with. --openvino: the interpreter of an environment with openvino and nncf, which need not be this one's.
Cosines are to Sentence Transformers in float32. One JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODEL, MAX_TOKENS, BATCH_TOKENS = "all-MiniLM-L6-v2", 256, 2048
BATCH_SIZES = (4, 8, 16, 32)
SWEEP_DOCUMENTS, CALIBRATION_DOCUMENTS = 128, 300
REFERENCE = "sentence-transformers float32"
OPENVINO = ("openvino default", "openvino int8")

Encode = Callable[[list[str]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--older", type=Path)
    parser.add_argument("--openvino", help="interpreter with openvino and nncf")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from tests.benchmarks.bench_embedding import real_pairs
    from tests.benchmarks.figures import emit

    texts = real_pairs(options.documents + CALIBRATION_DOCUMENTS)["document"].to_pylist()
    texts, calibration = texts[: options.documents], texts[options.documents :]
    here = Path(__file__).parents[2]
    names = [(f"ours {dtype}", sys.executable, here) for dtype in ("bfloat16", "float32", "int8")]
    if options.older:
        names += [(f"older {dtype}", sys.executable, options.older) for dtype in ("bfloat16", "float32")]
    if options.openvino:
        names += [(name, options.openvino, here) for name in OPENVINO]
    names += [(f"sentence-transformers {dtype}", sys.executable, here) for dtype in ("bfloat16", "float32")]
    peers = {name: Peer(name, interpreter, tree, options.threads) for name, interpreter, tree in names}
    batch = {name: peer.ask(calibration)["batch"] for name, peer in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in peers}
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in peers}
    pieces = [texts[number :: options.rounds] for number in range(options.rounds)]
    for piece in pieces:
        vectors = {}
        for name, peer in peers.items():
            answer = peer.ask(piece)
            times[name].append(answer["seconds"])
            vectors[name] = np.load(answer["vectors"])
        for name, found in vectors.items():
            cosines[name].append((found * vectors[REFERENCE]).sum(axis=1))
    for name, taken in times.items():
        similar = np.concatenate(cosines[name])
        emit(
            f"embedding, rows/s of {name}",
            round(options.documents / sum(taken), 1),
            "rows/s",
            threads=options.threads,
            rounds=[round(len(piece) / each, 1) for piece, each in zip(pieces, taken, strict=True)],
            batch_size=batch[name],
            cosine={"least": round(float(similar.min()), 5), "mean": round(float(similar.mean()), 5)},
        )
    for peer in peers.values():
        peer.close()


class Peer:
    """A process that encodes the texts it is sent; idle between questions."""

    def __init__(self, name: str, interpreter: str, tree: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
        command = [interpreter, str(Path(__file__).resolve()), "--serve", name, "--threads", str(threads)]
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, texts: list[str]) -> dict[str, Any]:
        """Return the seconds of `texts` and the file of their vectors; of the first texts, the best batch size."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(texts) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                found: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return found
        raise RuntimeError("a peer ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(name: str, threads: int) -> None:
    """Prepare an encoder with the texts of the first line, then encode those of each further line."""
    import tempfile

    import torch

    torch.set_num_threads(threads)
    calibration = json.loads(sys.stdin.readline())
    build, _, kind = name.partition(" ")
    with tempfile.TemporaryDirectory() as folder:
        if build in ("ours", "older"):
            batch, encode = None, ours(kind)
        else:
            make = openvino if build == "openvino" else sentence_transformers
            encode_with = make(kind, threads, calibration)
            sample = calibration[:SWEEP_DOCUMENTS]
            sweep = {size: _seconds(lambda size=size: encode_with(sample, size))[0] for size in BATCH_SIZES}
            batch = min(sweep, key=sweep.__getitem__)
            encode = lambda texts: encode_with(texts, batch)  # noqa: E731
        encode(calibration)
        print("answer " + json.dumps({"batch": batch}), flush=True)
        for line in sys.stdin:
            texts = json.loads(line)
            seconds, vectors = _seconds(lambda texts=texts: encode(texts))
            file = Path(folder) / "vectors.npy"
            np.save(file, vectors)
            print("answer " + json.dumps({"seconds": seconds, "vectors": str(file)}), flush=True)


def ours(dtype: str) -> Encode:
    import torch

    from clusterbatch.encoder.resolve import resolve_model

    try:
        from clusterbatch.encoder.load import load_encoder
    except ImportError:  # an older build
        from clusterbatch.encoder.model import load_encoder
    encoder = load_encoder(resolve_model(MODEL), dtype=getattr(torch, dtype), packed=True)
    return lambda texts: encoder.encode(encoder.tokenizer.encode(texts, MAX_TOKENS), BATCH_TOKENS)


def sentence_transformers(dtype: str, threads: int, calibration: list[str]) -> Callable[[list[str], int], np.ndarray]:
    import torch
    from sentence_transformers import SentenceTransformer

    from clusterbatch.encoder.resolve import resolve_model

    model = SentenceTransformer(resolve_model(MODEL), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    model.max_seq_length = MAX_TOKENS

    def encode(texts: list[str], batch: int) -> np.ndarray:
        vectors = model.encode(texts, batch_size=batch, convert_to_tensor=True).float()
        return torch.nn.functional.normalize(vectors).numpy()

    return encode


def openvino(kind: str, threads: int, calibration: list[str]) -> Callable[[list[str], int], np.ndarray]:
    """Compile the backbone with its pooling; texts of a batch are neighbours by length, padded to the longest."""
    import nncf
    import openvino as ov
    import torch
    from transformers import AutoModel, AutoTokenizer

    from clusterbatch.encoder.resolve import resolve_model

    folder = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None].to(states.dtype)
            return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))

    def inputs(texts: list[str]) -> dict[str, np.ndarray]:
        found = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="np")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    example = {name: torch.from_numpy(each) for name, each in inputs(["one text", "and a second text"]).items()}
    with torch.inference_mode():
        model = ov.convert_model(Pooled(), example_input=example)
    if kind == "int8":
        data = nncf.Dataset(calibration, lambda text: inputs([text]))
        model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration))
    compiled = ov.compile_model(
        model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    )
    precision = compiled.get_property("INFERENCE_PRECISION_HINT")
    print(f"openvino {ov.__version__}, {kind}: other products in {precision.get_type_name()}", file=sys.stderr)

    def encode(texts: list[str], batch: int) -> np.ndarray:
        order = np.argsort([-len(text) for text in texts], kind="stable")
        found = [
            compiled(inputs([texts[row] for row in order[start : start + batch]]))[0].copy()
            for start in range(0, len(texts), batch)
        ]
        vectors = np.empty((len(texts), found[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(found)
        return vectors

    return encode


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    main()

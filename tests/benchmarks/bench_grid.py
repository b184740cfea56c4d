"""When do clustered batches gain? Batch sizes x cluster sizes on several corpora, held out by document and by query.

    python -m tests.benchmarks.bench_grid FOLDER [--corpora code,japanese-by-query] [--sizes 32,256] [key=value ...]

Each corpus of CLUSTERBATCH_DATA is one `compare` of jobs/compare_sizes.yaml in a workspace below FOLDER; size after
size, so that the first sizes of all corpora come first. What is finished is only read: an interrupted study continues
with the same command. The model is small, so that two cores train hundreds of them: the first 128 principal components
of MiniLM's token vectors, averaged. Its vectors also cluster the documents; those of Japanese ones are of character
n-grams. Everything runs in this process; several processes can take different corpora.

JSON lines: of each corpus, size and arm the gain over `source` with its interval. With --predict nothing is trained:
what `predict` says of the finished cells of `cluster`, and how its ranks agree with the measured ones. A corpus left
out is foretold by a linear fit to the cells of the others.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.experiments.compare.grid import CELLS, compare_sizes, finished_sizes, write_grid
from clusterbatch.experiments.predict.stage import predict
from clusterbatch.runtime import InProcessExecutor
from clusterbatch.runtime.executor import using
from clusterbatch.store import Folder
from tests.benchmarks.figures import emit
from tests.data_folder import require_data_folder

# Files of the data folder, and what is held out.
CORPORA = {
    "code": (["pairs/codepairs.parquet"], "document"),
    "medquad": (["pairs/medquad.parquet"], "document"),
    "japanese": (["pairs_ja.parquet"], "document"),
    "japanese-by-query": (["pairs_ja.parquet"], "query"),
    "proposals": (["pairs/proposals.parquet"], "document"),
    "questions": (["eval/squad_dev", "eval/covidqa"], "document"),
    "questions-by-query": (["eval/squad_dev", "eval/covidqa"], "query"),
    "wordset": (["pairs/wordset.parquet"], "document"),
    "wordset-by-query": (["pairs/wordset.parquet"], "query"),
    "msdocs": (["pairs/msdocs.parquet"], "document"),
    "msdocs-by-query": (["pairs/msdocs.parquet"], "query"),
    "factbook": (["pairs/factbook.parquet"], "document"),
    "tldr": (["pairs/tldr.parquet"], "document"),
    "scitldr-by-query": (["pairs/scitldr.parquet"], "query"),
    "mitre": (["pairs/mitre.parquet"], "document"),
}
# Set beforehand, the same for all corpora and arms; `compare.learning_rates=[...]` tunes them instead.
RATES = {16: 0.002, 32: 0.002, 64: 0.002, 128: 0.005, 256: 0.005}
_DIMENSIONS = 128
_JOB = Path(__file__).parents[2] / "jobs/compare_sizes.yaml"


def static_model(folder: Path) -> Path:
    """Write the static model of the study, unless it is there; return its folder."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoder = load_encoder(resolve_model("all-MiniLM-L6-v2"), "static")
        save_model(encoder, folder)
        vectors = load_file(weights)["embedding.weight"]
        vectors -= vectors.mean(dim=0)
        _, _, directions = torch.linalg.svd(vectors.T @ vectors)
        save_file({"embedding.weight": (vectors @ directions[:_DIMENSIONS].T).contiguous()}, weights)
    return folder


def configuration(folder: Path, corpus: str, size: int, overrides: list[str]) -> RunConfig:
    """Return the configuration of one corpus of the study."""
    paths, held_out_by = CORPORA[corpus]
    model = static_model(folder / "static")
    words = [
        f"workspace={folder / corpus}",
        f"corpus.paths=[{','.join(str(require_data_folder() / path) for path in paths)}]",
        f"embed.model={'char-ngrams' if corpus.startswith('japanese') else model}",
        f"train.model={model}",
        f"compare.batch_sizes=[{size}]",
        "compare.learning_rates=[]",
        f"train.learning_rate={RATES[size]}",
        "train.epochs=2",
        "train.max_document_tokens=64",
        "compare.points=1",
        "compare.seeds=2",
        "evaluate.path=[]",
        "evaluate.metrics=[NDCG@10]",
        "evaluate.max_document_tokens=64",
        "embed.max_tokens=64",
        f"evaluate.holdout_by={held_out_by}",
        "train.device=cpu",
        "embed.device=cpu",
        "cluster.device=cpu",
    ]
    return load_config(str(_JOB), [*words, *overrides])


def foretold(config: RunConfig, size: int) -> list[float]:
    """Return what `predict` says of clusters of four batches of `size`, as means over the sources by their rows.

    By how much a batch of a cluster is harder than one of the source, in nats; how much more of its negatives are near
    copies, as a share; and whether only queries are held out.
    """
    found = predict(with_changes(config, {"batches.size": size, "predict.sizes": [4 * size], "predict.rows": 60_000}))
    figures, rows = [], []
    for source in found["sources"].values():
        cluster = source["clusters"].get(str(4 * size), source["source"])
        figures.append([cluster[key] - source["source"][key] for key in ("difficulty", "copies")])
        rows.append(source["rows"])
    harder, copies = np.average(figures, axis=0, weights=rows).tolist()
    return [harder, copies / (size - 1), float(config.evaluate.holdout_by == "query")]


def report_prediction(folder: Path, overrides: list[str]) -> None:
    """Print the measured gain and the predicted figures of every finished cell, and their rank correlations."""
    known: list[tuple[str, float, list[float]]] = []
    for corpus in CORPORA:
        for size in RATES:
            config = configuration(folder, corpus, size, overrides)
            if not finished_sizes(config):
                continue
            with using(InProcessExecutor()):
                write_grid(config)
                features = foretold(config, size)
            cells = Folder(f"{config.workspace}/compare/report").read_json(CELLS)["cells"]
            cell = next(cell for cell in cells if cell["arm"] == "cluster")
            known.append((CORPORA[corpus][0][0], cell["gain"], features))
            details = dict(zip(("harder", "copies", "by_query"), features, strict=True))
            emit("grid, predicted", cell["gain"], case=f"{corpus}, batch {size}", error=cell["error"], **details)
    corpora, gains = np.array([name for name, _, _ in known]), np.array([gain for _, gain, _ in known])
    figures = np.array([each for _, _, each in known])
    left_out = np.empty(len(gains))
    for name in set(corpora.tolist()):
        others = corpora != name
        design = np.column_stack([np.ones(others.sum()), figures[others]])
        fitted = np.linalg.lstsq(design, gains[others], rcond=None)[0]
        left_out[~others] = np.column_stack([np.ones((~others).sum()), figures[~others]]) @ fitted
    predictors = {"harder": figures[:, 0], "fewer copies": -figures[:, 1], "a fit to the other corpora": left_out}
    for name, values in predictors.items():
        rho = float(spearmanr(values, gains).statistic)
        emit("grid, rank correlation of predicted and measured gain", rho, "Spearman", case=name, cells=len(gains))
    emit("grid, sign foretold by a fit to the other corpora", float(np.mean(np.sign(left_out) == np.sign(gains))))
    error = float(np.sqrt(np.mean((left_out - gains) ** 2)))
    emit("grid, error of a fit to the other corpora", error, "NDCG@10", peer=float(gains.std()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--corpora", default=",".join(CORPORA))
    parser.add_argument("--sizes", default="32,256,64,128,16")
    parser.add_argument("--predict", action="store_true", help="train nothing, predict the finished cells")
    options = parser.parse_args()
    if options.predict:
        report_prediction(options.folder.resolve(), options.overrides)
        return
    for size in map(int, options.sizes.split(",")):
        for corpus in options.corpora.split(","):
            config = configuration(options.folder.resolve(), corpus, size, options.overrides)
            begun = time.monotonic()
            with using(InProcessExecutor()):
                page = compare_sizes(config)
            # The trained models of the runs, which nothing reads any more.
            Folder(config.workspace).remove(f"compare/batch={size}/runs")
            found = Folder(page.rpartition("/")[0]).read_json(CELLS)
            for cell in found["cells"]:
                if cell["gain"] is not None:
                    details = {key: cell[key] for key in ("low", "high", "learning_rate", "hardness")}
                    case = f"{corpus}, batch {cell['batch']}, {cell['arm']}"
                    emit(
                        "grid, gain over source",
                        cell["gain"],
                        found["metric"],
                        case=case,
                        mean=cell["value"],
                        **details,
                    )
            emit("grid, seconds", time.monotonic() - begun, "s", case=f"{corpus}, batch {size}")


if __name__ == "__main__":
    main()

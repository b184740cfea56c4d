"""The scale model against real runs.

    python -m tests.benchmarks.bench_capacity [--rows 800 2400 12000] [--surrogate NAME] [--save FILE]

Runs the pipeline at three sizes on this machine. Fixed cost and rate of each stage come from the first two; the third,
at least five times the second, is predicted before it is looked at. Prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clusterbatch.cli import main as clusterbatch
from clusterbatch.config import RunConfig, load_config
from clusterbatch.config.compare import PricesConfig
from clusterbatch.experiments.capacity.calibrate import fit, matrix_flops, measure, save
from clusterbatch.experiments.capacity.workload import model_of
from clusterbatch.store.workspace import STAGE_ARTIFACTS, Workspace
from tests.benchmarks.figures import emit, machine
from tests.data_folder import require_data_folder

WORDS = [
    "embed.max_tokens=64",
    "corpus.row_group_rows=256",
    "cluster.mean_size=256",
    "cluster.shard_bytes=1048576",
    "batches.size=128",
    "train.epochs=4",
    "train.learning_rate=0.005",
    "train.max_document_tokens=64",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs=3, default=[800, 2400, 12_000])
    parser.add_argument("--encoder", choices=["static", "backbone"], default="static")
    parser.add_argument("--surrogate", default="all-MiniLM-L6-v2", help="embed.model")
    parser.add_argument("--save", metavar="FILE", help="write the coefficients there")
    options = parser.parse_args()
    pairs = real_pairs()
    with tempfile.TemporaryDirectory() as folder:
        words = [*WORDS, f"train.encoder={options.encoder}", f"embed.model={options.surrogate}"]
        configs = [prepare(Path(folder) / str(rows), pairs.slice(0, rows), words) for rows in options.rows]
        for config in configs[:2]:
            run(config)
        flops = matrix_flops()
        found = [measure(config) for config in configs[:2]]
        coefficients = fit(*found, flops, machine=f"{machine()['cpu']}, {machine()['cores']} cores")
        if options.save:
            save(coefficients, options.save)
        predicted = {
            estimate.stage: estimate for estimate in model_of(configs[2]).estimate(coefficients, PricesConfig())
        }
        run(configs[2])
        found.append(measure(configs[2]))
        for each, stage in product(found, STAGE_ARTIFACTS):
            case = f"{stage}, {each.model.workload.rows:,} rows"
            emit("seconds of all workers", each.worker_seconds[stage], "s", case=case, wall=each.seconds[stage])
        measured = found[2].seconds
        for stage, place in zip(STAGE_ARTIFACTS, folders(configs[2]), strict=True):
            # All that stays: of training also checkpoints and the model, which no manifest lists.
            sizes = [path.stat().st_size for path in Path(place).rglob("*") if path.is_file()]
            compare(stage, "seconds", predicted[stage].seconds, measured[stage], options)
            compare(stage, "objects", predicted[stage].objects, len(sizes), options)
            compare(stage, "bytes", predicted[stage].stored_bytes, sum(sizes), options)
        total = sum(estimate.seconds for estimate in predicted.values())
        compare("all stages", "seconds", total, sum(measured[stage] for stage in STAGE_ARTIFACTS), options)


def folders(config: RunConfig) -> list[str]:
    """Where each stage's artifact lies, in the order of STAGE_ARTIFACTS."""
    workspace = Workspace(config)
    artifacts = [
        workspace.corpus,
        workspace.embeddings(),
        workspace.clusters(),
        workspace.train(),
        workspace.evaluation(),
    ]
    return [artifact.folder.uri for artifact in artifacts]


def real_pairs() -> pa.Table:
    """Pairs of the data folder's largest sources, mixed."""
    data = require_data_folder()
    names = ["msdocs", "proposals", "medquad"]
    tables = [pq.read_table(data / "pairs" / f"{name}.parquet", columns=["query", "document"]) for name in names]
    rows = min(table.num_rows for table in tables)
    mixed = pa.concat_tables(
        [
            table.slice(0, rows).append_column("source", pa.array([name] * rows))
            for name, table in zip(names, tables, strict=True)
        ]
    )
    return mixed.take(pa.array([source * rows + row for row in range(rows) for source in range(len(names))]))


def prepare(folder: Path, pairs: pa.Table, words: list[str]) -> RunConfig:
    """A corpus of these pairs, and a collection of the same size made of them."""
    (folder / "pairs").mkdir(parents=True)
    (folder / "test" / "qrels").mkdir(parents=True)
    pq.write_table(pairs, folder / "pairs" / "pairs.parquet")
    texts = list(zip(pairs["query"].to_pylist(), pairs["document"].to_pylist(), strict=True))
    documents = [json.dumps({"_id": f"d{row}", "title": "", "text": text}) for row, (_, text) in enumerate(texts)]
    queries = [json.dumps({"_id": f"q{row}", "text": text}) for row, (text, _) in enumerate(texts[:200])]
    judgements = ["query-id\tcorpus-id\tscore", *(f"q{row}\td{row}\t1" for row in range(len(queries)))]
    (folder / "test" / "corpus.jsonl").write_text("\n".join(documents))
    (folder / "test" / "queries.jsonl").write_text("\n".join(queries))
    (folder / "test" / "qrels" / "test.tsv").write_text("\n".join(judgements))
    places = [f"workspace={folder}/run", f"corpus.paths={folder}/pairs", f"evaluate.path={folder}/test"]
    return load_config(None, [*words, *places])


def run(config: RunConfig) -> None:
    path = Path(config.workspace).parent / "run.yaml"
    path.write_text(config.model_dump_json())
    assert clusterbatch(["run", str(path), "--json"]) == 0


def compare(stage: str, unit: str, predicted: float, measured: float, options: argparse.Namespace) -> None:
    """The prediction against what was measured afterwards."""
    sizes = {"fitted_on": options.rows[:2], "rows": options.rows[2]}
    emit("cost model, prediction against measurement", predicted, unit, case=stage, peer=measured, **sizes)


if __name__ == "__main__":
    main()

"""Semantic duplicates on real pairs: their cost in the stage `cluster`, and what MinHash finds that they do not.

    python -m tests.benchmarks.bench_duplicates FOLDER [--corpora medquad,...] [--threshold 0.95] [key=value ...]

Corpora and surrogate are those of bench_grid; workspaces lie below FOLDER, and corpus and vectors are
made once. JSON lines of each corpus: CPU seconds of the stage `cluster` with duplicates and without (peer), in turn;
pairs near in query and document by the surrogate, all of the corpus and those in one cluster; near copies by MinHash
(corpus.near_threshold) and how many of each the other finds too, with some examples that only one of them finds.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa

from clusterbatch.clustering.features import unit_length
from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.corpus.ingest import ingest
from clusterbatch.corpus.minhash import PERMUTATIONS, bands, signature
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.embedding.stage import embed
from clusterbatch.embedding.vectors import SIDES, vector_values
from clusterbatch.runtime import InProcessExecutor
from clusterbatch.runtime.executor import using
from clusterbatch.shards.reader import ROWS, ShardReader
from clusterbatch.shards.stage import cluster
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.benchmarks.figures import emit
from tests.benchmarks.grid_corpora import CORPORA, static_model
from tests.data_folder import require_data_folder

_SIZE, _BLOCK, _SHOWN = 32, 1024, 2
Pairs = set[tuple[int, int]]


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def configuration(folder: Path, name: str, overrides: list[str]) -> RunConfig:
    """Return the configuration of one corpus, with its workspace below `folder`."""
    paths, held_out_by = CORPORA[name]
    static_model(folder / "static")
    model = folder / "static"
    words = [
        f"workspace={folder / name}",
        f"corpus.paths=[{','.join(str(require_data_folder() / path) for path in paths)}]",
        f"embed.model={'char-ngrams' if name.startswith('japanese') else model}",
        "embed.max_tokens=64",
        "embed.device=cpu",
        f"cluster.mean_size={4 * _SIZE}",
        "cluster.device=cpu",
        f"batches.size={_SIZE}",
        f"train.model={model}",
        "train.max_document_tokens=64",
        f"evaluate.holdout_by={held_out_by}",
    ]
    return load_config(None, [*words, *overrides])


def corpus_of(config: RunConfig) -> tuple[pa.Table, list[np.ndarray]]:
    """Return the corpus, and unit vectors of queries and documents in its order."""
    corpus, embeddings = Workspace(config).corpus, Workspace(config).embeddings()
    rows = pa.concat_tables([read_row_group(corpus, group) for group in row_groups_of(corpus.require())])
    stored = pa.concat_tables([read_parquet(embeddings.folder, part) for part in embeddings.require().parts])
    assert stored["pair_id"].equals(rows["pair_id"])
    sides = [unit_length(vector_values(stored[f"{side}_vector"]).astype(np.float32)) for side in SIDES]
    return rows, sides


def clusters_of(config: RunConfig, pair_ids: list[str]) -> np.ndarray:
    """Return the number of each row's cluster."""
    artifact = Workspace(config).clusters()
    index, manifest = ShardReader(artifact).index, artifact.require()
    parts = {part.details["shard"]: part for part in manifest.parts if part.details.get("content") == ROWS}
    names = {shard: read_parquet(artifact.folder, part, ["pair_id"]) for shard, part in parts.items()}
    number = np.cumsum((np.diff(index.source, prepend=-1) != 0) | (np.diff(index.cluster, prepend=-1) != 0))
    found: dict[str, int] = {}
    for piece in range(len(index)):
        rows = names[int(index.shard[piece])]["pair_id"].slice(int(index.first_row[piece]), int(index.rows[piece]))
        found |= dict.fromkeys(rows.to_pylist(), int(number[piece]))
    return np.array([found[name] for name in pair_ids])


def semantic_pairs(sides: list[np.ndarray], source: np.ndarray, threshold: float) -> Pairs:
    """Return all pairs of rows of one source that are near in query and document, whatever their clusters."""
    found: Pairs = set()
    for name in np.unique(source):
        rows = np.flatnonzero(source == name)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            cosine = np.minimum(*(side[block] @ side[rows[start:]].T for side in sides))
            one, other = np.nonzero(cosine >= threshold)
            later = one < other
            found.update(zip(block[one[later]].tolist(), rows[start + other[later]].tolist(), strict=True))
    return found


def copied_pairs(rows: pa.Table, source: np.ndarray, threshold: float) -> Pairs:
    """Return pairs of rows of one source whose queries and documents are near copies, as ingest finds them."""
    query = np.array([signature(text, b"?") for text in rows["query"].to_pylist()]).reshape(-1, PERMUTATIONS)
    document = np.array([signature(text) for text in rows["document"].to_pylist()]).reshape(-1, PERMUTATIONS)
    together = np.minimum(query, document)
    found: Pairs = set()
    for one, other in _candidates(together, threshold):
        if source[one] == source[other] and (one, other) not in found:
            similar = [float(np.mean(side[one] == side[other])) for side in (query, document)]
            if min(similar) >= threshold:
                found.add((one, other))
    return found


def _candidates(signatures: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    for piece in bands(threshold):
        buckets: dict[bytes, list[int]] = {}
        for row, values in enumerate(signatures[:, piece]):
            buckets.setdefault(values.tobytes(), []).append(row)
        for members in buckets.values():
            yield from combinations(members, 2)


def measure_cost(config: RunConfig, threshold: float, rounds: int) -> tuple[RunConfig, list[float], list[float]]:
    """Return the configuration with duplicates, and CPU seconds of the stage with and without them, round by round."""
    workspaces = [f"{config.workspace}-{name}" for name in ("duplicates", "plain")]
    changes = {"reuse.corpus": config.workspace, "reuse.embeddings": config.workspace}
    plain = with_changes(config, {**changes, "workspace": workspaces[1]})
    sought = with_changes(config, {**changes, "workspace": workspaces[0], "cluster.duplicates.threshold": threshold})
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(rounds):
        for place, each in ((0, sought), (1, plain)) if number % 2 else ((1, plain), (0, sought)):
            begun = cpu_seconds()
            cluster(each, force=True)
            seconds[place].append(cpu_seconds() - begun)
    return sought, *seconds


def report(name: str, config: RunConfig, threshold: float, rounds: int) -> None:
    ingest(config)
    embed(config)
    rows, sides = corpus_of(config)
    source = np.array(rows["source"].to_pylist())
    sought, found, plain = measure_cost(config, threshold, rounds)
    emit(
        "duplicates, CPU seconds of the stage cluster",
        float(np.median(found)),
        "s",
        case=name,
        peer=float(np.median(plain)),
        rows=rows.num_rows,
        rounds=rounds,
    )
    label = clusters_of(sought, rows["pair_id"].to_pylist())
    semantic = semantic_pairs(sides, source, threshold)
    inside = {pair for pair in semantic if label[pair[0]] == label[pair[1]]}
    copies = copied_pairs(rows, source, sought.corpus.near_threshold)
    details = Workspace(sought).clusters().require().details["duplicates"]
    emit(
        "duplicates, pairs near in query and document",
        len(inside),
        case=name,
        peer=float(len(semantic)),
        groups_in_query_or_document=sum(each["groups"] for each in details.values()),
        rows_in_query_or_document=sum(each["rows"] for each in details.values()),
    )
    emit(
        "duplicates, near copies by MinHash",
        len(copies),
        case=name,
        both=len(copies & inside),
        only_semantic=len(inside - copies),
        only_minhash=len(copies - inside),
        of_which_in_other_clusters=len((copies & semantic) - inside),
    )
    for kind, pairs in (("only semantic", inside - copies), ("only MinHash", copies - semantic)):
        for one, other in sorted(pairs)[:: max(1, len(pairs) // _SHOWN)][:_SHOWN]:
            texts = rows.take(pa.array([one, other])).select(list(SIDES)).to_pylist()
            cosines = [round(float(side[one] @ side[other]), 3) for side in sides]
            shown = [{side: text[side][:120] for side in SIDES} for text in texts]
            emit("duplicates, example", min(cosines), case=f"{name}, {kind}", cosines=cosines, pair=shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--corpora", default="medquad,msdocs,mitre")
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.corpora.split(","):
        config = configuration(options.folder.resolve(), name, options.overrides)
        with using(InProcessExecutor()):
            report(name, config, options.threshold, options.rounds)


if __name__ == "__main__":
    main()

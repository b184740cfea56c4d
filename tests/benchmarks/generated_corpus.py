"""A corpus of any size from the sentences of real pairs: every row is a pure function of its number.

    python -m tests.benchmarks.generated_corpus FOLDER --pairs 1e6 [--first 0] [--seed 0]

Documents are sentences of one neighbourhood of a real source, so that they have topics; a query is the beginning of two
of its document's sentences. Lengths follow the real documents' (median 317 characters, 90th percentile 1,404); sources
have Zipf's sizes, the largest a fifth of all rows. Of the rows 5 % repeat another row, 2 % repeat it but for their last
sentence, and one in a thousand is bad. Files of 5,000 rows, half Parquet, half gzipped JSON Lines; an existing file is
kept, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.data_folder import data_folder

FILE_ROWS = 5_000
SOURCES = 500
# The exponent for which the largest of 500 sources has a fifth of the rows.
ZIPF = 1.127
MEDIAN, SPREAD, LONGEST = 317, math.log(1_404 / 317) / 1.2816, 4_000
REPEATED, NEARLY_REPEATED, BAD = 0.05, 0.02, 0.001
# Sentences of a source that one document may draw from.
NEIGHBOURHOOD = 64
# Purposes of random numbers: independent ones for the same row.
KIND, ORIGIN, SOURCE, PLACE, LENGTH, SENTENCE, LAST = range(7)


class Sentences:
    """Sentences of the real documents in their order, of each source a range; and the first words of each."""

    def __init__(self, folder: Path) -> None:
        texts: list[str] = []
        self.ranges: list[tuple[int, int]] = []
        for file in sorted((folder / "pairs").glob("*.parquet")):
            table = pq.read_table(file, columns=["document", "source"])
            for source in sorted(table["source"].unique().to_pylist()):
                first = len(texts)
                for document in table.filter(pc.equal(table["source"], source))["document"].to_pylist():
                    texts += [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", document) if len(part) > 20]
                if len(texts) - first >= NEIGHBOURHOOD:
                    self.ranges.append((first, len(texts) - first))
                else:
                    del texts[first:]
        self.texts = pa.array(texts, pa.string())
        self.heads = pa.array([" ".join(text.split()[:5]) for text in texts], pa.string())
        self.mean_length = float(np.mean([len(text) for text in texts]))


def uniform(rows: np.ndarray, purpose: int, seed: int, position: np.ndarray | int = 0) -> np.ndarray:
    """Return (n,) float64 in [0, 1), by SplitMix64 (Steele 2014) of row, purpose, position and seed."""
    mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64((purpose + 1) * 0xD1B54A32D192ED03 % 2**64)
    mixed += np.asarray(position).astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7)
    mixed += np.uint64(seed * 0x2545F4914F6CDD1D % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed ^ (mixed >> np.uint64(31))) / 2.0**64


def rows_of(numbers: np.ndarray, sentences: Sentences, seed: int) -> pa.Table:
    """Return the rows with these numbers: query, document, source; kind says which are repeated, nearly so, or bad."""
    kind = uniform(numbers, KIND, seed)
    repeated = kind < REPEATED
    nearly = ~repeated & (kind < REPEATED + NEARLY_REPEATED)
    # What a row repeats is an earlier row, so that a corpus and a longer one have the same rows to begin with.
    earlier = (uniform(numbers, ORIGIN, seed) * numbers).astype(np.int64)
    origin = np.where(repeated | nearly, earlier, numbers)
    source = _source(uniform(origin, SOURCE, seed))
    first, count = np.asarray(sentences.ranges).T[:, source % len(sentences.ranges)]
    start = (uniform(origin, PLACE, seed) * (count - NEIGHBOURHOOD + 1)).astype(np.int64)
    normal = _normal(uniform(origin, LENGTH, seed))
    characters = np.minimum(LONGEST, MEDIAN * np.exp(SPREAD * normal))
    length = np.maximum(1, np.rint(characters / sentences.mean_length)).astype(np.int64)
    # Two at least where a last one is to be replaced.
    length = np.where(nearly, np.maximum(2, length), length)
    offsets = np.concatenate([[0], np.cumsum(length)])
    row = np.repeat(np.arange(len(numbers)), length)
    position = np.arange(offsets[-1]) - offsets[row]
    chosen = uniform(origin[row], SENTENCE, seed, position)
    last = nearly[row] & (position == length[row] - 1)
    chosen = np.where(last, uniform(numbers[row], LAST, seed), chosen)
    index = first[row] + start[row] + (chosen * NEIGHBOURHOOD).astype(np.int64)
    documents = _joined(sentences.texts, index, offsets)
    heads = np.stack([index[offsets[:-1]], index[offsets[:-1] + np.minimum(1, length - 1)]], axis=1)
    queries = _joined(sentences.heads, heads.reshape(-1), np.arange(len(numbers) + 1) * 2)
    names = pa.array([f"source-{number:03d}" for number in range(SOURCES)])
    return pa.table({"query": queries, "document": documents, "source": names.take(pa.array(source))})


def _joined(texts: pa.Array, index: np.ndarray, offsets: np.ndarray) -> pa.Array:
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts.take(pa.array(index)))
    return pc.binary_join(lists, " ")


def _source(shares: np.ndarray) -> np.ndarray:
    weights = np.arange(1, SOURCES + 1) ** -ZIPF
    return np.searchsorted(np.cumsum(weights) / weights.sum(), shares, side="right").clip(max=SOURCES - 1)


def _normal(shares: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri

    return np.asarray(ndtri(np.clip(shares, 1e-12, 1 - 1e-12)))


def _is_bad(numbers: np.ndarray, seed: int) -> np.ndarray:
    return uniform(numbers, KIND, seed) >= 1 - BAD


def write_file(number: int, folder: Path, first: int, end: int, seed: int) -> None:
    """Write a file of the rows `first` to `end`, unless it exists. Bad rows are null, empty, or no pair at all."""
    path = folder / f"pairs-{number:05d}{'.jsonl.gz' if number % 2 else '.parquet'}"
    if path.exists():
        return
    numbers = np.arange(number * FILE_ROWS, min((number + 1) * FILE_ROWS, end - first)) + first
    table = rows_of(numbers, _sentences(), seed)
    bad = np.flatnonzero(_is_bad(numbers, seed))
    unfinished = path.with_name(f".{path.name}.unfinished")
    if path.suffix == ".parquet":
        replaced = table["document"].to_pylist()
        for place in bad:
            replaced[place] = (None, "", "  \n")[place % 3]
        table = table.set_column(1, "document", pa.array(replaced, pa.string()))
        pq.write_table(table, unfinished, compression="zstd")
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in table.to_pylist()]
        for place in bad:
            lines[place] = ('{"query": "no document"}', '{"query": 7, "document": []}', '{"query": "cut')[place % 3]
        unfinished.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 3))
    unfinished.rename(path)


_loaded: list[Sentences] = []


def _sentences() -> Sentences:
    if not _loaded:
        folder = data_folder()
        assert folder is not None, "set CLUSTERBATCH_DATA to a folder with pairs/*.parquet"
        _loaded.append(Sentences(Path(folder)))
    return _loaded[0]


def write_corpus(folder: Path, pairs: int, *, first: int = 0, seed: int = 0, processes: int = 2) -> None:
    """Write the rows `first` to `first + pairs` as files of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = range(-(-pairs // FILE_ROWS))
    write = partial(write_file, folder=folder, first=first, end=first + pairs, seed=seed)
    _sentences()  # Before the processes are forked: they share it.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        for _ in pool.map(write, files, chunksize=4):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=float, required=True)
    parser.add_argument("--first", type=float, default=0, help="number of the first row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_corpus(options.folder, int(options.pairs), first=int(options.first), seed=options.seed)


if __name__ == "__main__":
    main()

"""Real pairs without a network: (summary, body) of the docstrings of the Python packages that are installed here.

Source code is parsed, never imported or run. Each package is one source. The summary, a docstring's first paragraph,
asks for the body, its rest, as a title asks for its text.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from clusterbatch.corpus.normalise import keyed_hash, normalise, text_hash

# Tests and vendored copies say little or say it twice.
_SKIPPED = re.compile(r"(^|/)(_?tests?|testing|_?vendor(ed)?|third_?party|site-packages)(/|$)")
_LARGEST_FILE = 2 * 2**20
_LEAST_WORDS = 4
# No source gives more than this share of the sample, so that there are at least as many sources.
_LEAST_SOURCES = 8
# Only the packages with most code are read: their sources are large enough to cluster, and reading all takes a minute.
_MOST_SOURCES = 12


@dataclass(frozen=True)
class MinedPair:
    """source: the package; query: the summary line of a docstring; document: its body."""

    source: str
    query: str
    document: str


def mine(pairs: int, seed: int) -> list[MinedPair]:
    """At most `pairs` distinct pairs, balanced over the packages; no query and no document occurs twice.

    Deterministic for one set of installed packages. Small packages give all they have, large ones equal shares.
    """
    most = max(1, pairs // _LEAST_SOURCES)
    packages = _largest_packages()
    # Forking a process that has threads (Ray, Arrow) is unsafe; parsing is slow enough to pay for fresh ones.
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), get_context("spawn")) as pool:
        futures = {name: pool.submit(_mine_package, name, files, most, seed) for name, files in packages.items()}
        mined = {name: futures[name].result() for name in sorted(packages)}
    distinct = _distinct(mined)
    quotas = equal_shares({name: len(found) for name, found in distinct.items()}, pairs)
    return [pair for name, found in distinct.items() for pair in found[: quotas[name]]]


def docstring_pairs(code: bytes) -> Iterator[tuple[str, str]]:
    """(summary, body) of each docstring in one file of source code; nothing where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in (tree, *_definitions(tree.body)):
        docstring = ast.get_docstring(node)
        if docstring:
            pair = split_docstring(docstring)
            if pair:
                yield pair


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Summary (first paragraph, on one line) and body (the rest); None where either says too little."""
    first, _, rest = docstring.strip().partition("\n\n")
    summary, body = " ".join(first.split()), rest.strip()
    if len(summary.split()) < _LEAST_WORDS or not body or normalise(summary) == normalise(body):
        return None
    try:
        (summary + body).encode()
    except UnicodeEncodeError:  # an escape such as \ud800 in the source: not text
        return None
    return summary, body


def equal_shares(available: dict[str, int], total: int) -> dict[str, int]:
    """How many each gives so that together they give `total` (or all there is) and the largest share is smallest."""
    shares: dict[str, int] = {}
    left = total
    for position, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[name] = min(available[name], left // (len(available) - position))
        left -= shares[name]
    return shares


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield statement
        elif isinstance(statement, ast.ClassDef):
            yield statement
            yield from _definitions(statement.body)
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _definitions(statement.body)


def _largest_packages() -> dict[str, list[str]]:
    """Paths of the source files of the installed distributions with most code, by name in lower case, largest first."""
    packages: dict[str, list[str]] = {}
    size: dict[str, int] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if not name or name in packages or name == "clusterbatch":
            continue
        files = [file for file in distribution.files or [] if file.suffix == ".py" and not _SKIPPED.search(str(file))]
        packages[name] = sorted(str(file.locate()) for file in files)
        # As the installer recorded it: asking the file system for each file takes longer.
        size[name] = sum(file.size or 0 for file in files)
    largest = sorted(packages, key=lambda name: (-size[name], name))[:_MOST_SOURCES]
    return {name: packages[name] for name in largest if packages[name]}


def _mine_package(name: str, files: list[str], most: int, seed: int) -> list[MinedPair]:
    # Files in an order of their own for each seed: a package that has more than enough is sampled, not cut off.
    # Only the end of the path counts, so that two installations in different folders agree.
    root = os.path.commonpath(files) if files else ""
    ordered = sorted(files, key=lambda file: (keyed_hash(seed, os.path.relpath(file, root)), file))
    return list(islice(_pairs_of_files(name, ordered), most))


def _pairs_of_files(name: str, files: Sequence[str]) -> Iterator[MinedPair]:
    seen: set[int] = set()
    for file in files:
        try:
            if os.path.getsize(file) > _LARGEST_FILE:
                continue
            code = Path(file).read_bytes()
        except OSError:  # listed by the installer, removed since
            continue
        if b'"""' not in code and b"'''" not in code:
            continue
        for summary, body in docstring_pairs(code):
            hashes = {text_hash(summary), text_hash(body)}
            if not hashes & seen:
                seen |= hashes
                yield MinedPair(name, summary, body)


def _distinct(mined: dict[str, list[MinedPair]]) -> dict[str, list[MinedPair]]:
    """Over all packages too, each query and each document stays only where it comes first."""
    seen: set[int] = set()
    distinct: dict[str, list[MinedPair]] = {}
    for name, pairs in mined.items():
        distinct[name] = []
        for pair in pairs:
            hashes = {text_hash(pair.query), text_hash(pair.document)}
            if not hashes & seen:
                seen |= hashes
                distinct[name].append(pair)
    return distinct

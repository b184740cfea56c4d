"""CONTRIBUTING.md's three examples, run as they stand in the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clusterbatch.batches.plan import BatchPlan
from clusterbatch.batches.strategies import STRATEGIES
from clusterbatch.config import BatchesConfig, EmbedConfig, RunConfig
from clusterbatch.corpus.readers import dispatch, formats
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.embedder import UnitEmbedder
from clusterbatch.embedding.stage import embed
from clusterbatch.store.workspace import Workspace
from tests.batches.indexes import make_index, row_ids
from tests.corpus.reading import read
from tests.encoder.corpora import commit_corpus, corpus_table

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def run_example(heading: str, monkeypatch: pytest.MonkeyPatch, **tables: dict[str, Any]) -> dict[str, Any]:
    """Runs the code below a heading; the entry that it adds to each of `tables` goes when the test ends."""
    for entry, table in tables.items():
        assert entry not in table
        monkeypatch.setitem(table, entry, None)
    code = re.search(rf"^### {heading}$.*?^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert code, f"no code below {heading!r}"
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.group(1), f"{PAGE.name}: {heading}", "exec"), namespace)
    return namespace


def test_folders_import_only_from_those_above_them() -> None:
    listed = re.search(
        r"^clusterbatch/$(.*?)^tests/", (PAGE.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert listed
    order = re.findall(r"^  (\w+)/ ", listed[1], re.MULTILINE)
    package = PAGE.parent / "clusterbatch"
    assert set(order) == {path.parent.name for path in package.glob("*/__init__.py")}
    floor = {name: number for number, name in enumerate(order)}
    for path in package.glob("*/**/*.py"):
        folder = path.relative_to(package).parts[0]
        for name in re.findall(r"^\s*from clusterbatch\.(\w+)", path.read_text(), re.MULTILINE):
            assert floor.get(name, 0) <= floor[folder], f"{path.relative_to(package)} imports from {name}"


def test_a_batch_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    run_example("A batch strategy", monkeypatch, small_together=STRATEGIES)
    # Of the first source all but clusters 0 and 2 are smaller than a batch; every cluster lies in two pieces.
    index = make_index([[40, 8, 24, 8, 8, 8], [32]], run_rows=4, pieces=2)
    plan = BatchPlan(
        index, BatchesConfig(size=16, clusters_per_batch=1).model_copy(update={"stratify": "small_together"})
    )
    batches = [plan.batch(step) for step in range(plan.steps_per_epoch)]
    rows = [row_ids(index, batch.piece, batch.row) for batch in batches]
    assert set(np.concatenate(rows)) == set(range(index.total_rows))
    unpacked = [set(index.cluster[batch.piece].tolist()) for batch in batches if not batch.packed.any()]
    assert [len(clusters) > 1 for clusters in unpacked if clusters <= {1, 3, 4, 5}] == [True, True]
    assert all(len(clusters) == 1 for clusters in unpacked if not clusters <= {1, 3, 4, 5})


def test_a_corpus_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_example("A corpus reader", monkeypatch, qa=formats.EXTENSIONS, questions=dispatch.READERS)
    (tmp_path / "faq.qa").write_text(
        "Q: How long is a run?\nA: 64 rows.\nA: no question\nQ: no answer\nQ: What is 群?\nA: Cluster.\nQ: The last?\n"
    )
    found = read(tmp_path / "faq.qa")
    assert found.pairs == [("How long is a run?", "64 rows."), ("What is 群?", "Cluster.")]
    assert {row["source"] for row in found.rows} == {"faq"}
    assert [(reject.row, reject.content) for reject in found.rejects] == [(1, "A: no question"), (3, "Q: The last?")]


def test_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: None) -> None:
    run_example("An encoder", monkeypatch, words=SURROGATES)
    topics = ["bread flour oven", "kernel driver page", "violin sonata key"]
    documents = [f"{topics[row % 3]} number{row}" for row in range(90)]
    config = RunConfig(workspace=str(tmp_path), embed=EmbedConfig(model="words", device="cpu", workers=1))
    commit_corpus(config, corpus_table(documents, [*documents[1:], ""], ["topics"] * 90))
    manifest = embed(config)
    assert (manifest.details["model"], manifest.details["dimensions"], manifest.counts.written) == ("words", 256, 90)
    unit = row_groups_of(Workspace(config).corpus.require())[0]
    vectors = UnitEmbedder(config).embed(unit).vectors["query"].astype(np.float32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
    similarity, topic = vectors @ vectors.T, np.arange(len(vectors)) % 3
    same = topic[:, None] == topic
    assert similarity[same].mean() > similarity[~same].mean() + 0.3

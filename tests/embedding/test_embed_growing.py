"""A corpus that has grown: its new rows alone are embedded; vectors stay with their rows, whatever is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from clusterbatch.config import EmbedConfig, RunConfig
from clusterbatch.corpus.append import Dropping, KnownWorker, dropped_lists, part_items, without_dropped
from clusterbatch.corpus.read import Sorting
from clusterbatch.corpus.row_groups import PAIRS, read_row_group, row_groups_of
from clusterbatch.embedding.embedder import EmbeddedUnit, UnitEmbedder
from clusterbatch.embedding.stage import embed, is_embedded
from clusterbatch.embedding.vectors import SIDES, VectorSource, tasks
from clusterbatch.runtime import Pass, Pool
from clusterbatch.store import Artifact, Counts, Receipt
from clusterbatch.store.tables import read_parquet, write_parquet
from clusterbatch.store.workspace import Workspace
from tests.encoder.corpora import commit_corpus, corpus_table


def _table(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    queries, documents = [f"the fox {n}" for n in numbers], [f"the lazy dog {n} sleeps" for n in numbers]
    return corpus_table(queries, documents, ["site"] * count)


def _grow(config: RunConfig, rows: pa.Table, drop: list[str], folder: Path) -> None:
    """The next version of a corpus, with `rows` more and without the pairs `drop`."""
    corpus = Workspace(config).corpus
    base = corpus.require()
    base = base.model_copy(update={"details": {"sources": {"site": base.counts.written}}})
    version = corpus.next_version(base)
    file = folder / f"drop-{version.number}.txt"
    file.write_text("\n".join(drop))
    known = Artifact(version.folder.child("_exchange"), "known")
    arguments = {
        "corpus": corpus,
        "version": version,
        "dropping": Dropping([str(file)], [], corpus.folder),
        "hashes": [],
        "sorting": Sorting(1, 0, near_threshold=None, near_buckets=1, hashes=False, flush_bytes=2**20, dropped=()),
    }
    receipts = Pass("known", known, "known", KnownWorker, arguments, Pool(1)).run(part_items(base))
    version.base = without_dropped(base, receipts, version.path)
    parts = [write_parquet(version, "part", rows, 64, role=PAIRS)] if rows.num_rows else []
    counts = Counts(read=rows.num_rows, written=rows.num_rows)
    made = Receipt(unit=0, fingerprint=f"v{version.number}", parts=parts, counts=counts)
    details = {"sources": {"site": version.base.counts.written + rows.num_rows}}
    lists = dropped_lists(receipts)
    version.commit(f"v{version.number}", [made], config={}, inputs={}, seconds=0, details=details, extra_parts=lists)


@pytest.fixture
def embedded_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pair_ids that go through a model from now on."""
    found: list[str] = []
    original = UnitEmbedder.embed_prepared

    def counting(self: UnitEmbedder, prepared: object) -> EmbeddedUnit:
        result = original(self, prepared)  # type: ignore[arg-type]
        found.extend(result.rows["pair_id"].to_pylist())
        return result

    monkeypatch.setattr(UnitEmbedder, "embed_prepared", counting)
    return found


def _by_pair(config: RunConfig) -> dict[str, np.ndarray]:
    """Both vectors of every pair that is there, read as clustering reads them; they are those of the pair's rows."""
    workspace = Workspace(config)
    corpus = workspace.corpus.require()
    source, vectors = VectorSource(config, 0), {}
    for task in tasks(corpus, workspace.embeddings().require()):
        for item in task.payload:
            rows, table = read_row_group(workspace.corpus, item.unit, ["pair_id"]), source.read(item, SIDES)
            assert rows.num_rows == item.unit.rows
            assert rows["pair_id"].equals(table["pair_id"])
            for row in table.to_pylist():
                vectors[row["pair_id"]] = np.array([*row["query_vector"], *row["document_vector"]])
    return vectors


def test_rows_embedded_are_rows_new(
    tmp_path: Path, tiny: Callable[[str], Path], in_process: None, embedded_rows: list[str]
) -> None:
    settings = EmbedConfig(model=str(tiny("bert")), device="cpu", max_tokens=16, workers=1)
    config = RunConfig(workspace=str(tmp_path / "ws"), embed=settings)
    first = _table(0, 150)
    commit_corpus(config, first)
    embed(config)
    assert sorted(embedded_rows) == sorted(first["pair_id"].to_pylist())
    before = _by_pair(config)
    artifact = Workspace(config).embeddings()
    files = {part.path: artifact.read_part(part) for part in artifact.require().parts}
    embedded_rows.clear()

    # 70 rows come, 71 go: all of the first unit, and some of the second.
    new, gone = _table(150, 70), first["pair_id"].to_pylist()[:71]
    _grow(config, new, gone, tmp_path)
    assert is_embedded(config, 0)
    second = embed(config)
    assert sorted(embedded_rows) == sorted(new["pair_id"].to_pylist())
    assert second.details["rows"] == 70
    assert (second.version, len(second.parts)) == (2, len(row_groups_of(Workspace(config).corpus.require())))
    found = _by_pair(config)
    assert set(found) == {*before, *embedded_rows} - set(gone)
    assert all(np.array_equal(found[pair], before[pair]) for pair in found if pair in before)
    # The old parts are those that were there.
    assert [part.path for part in second.parts[: len(files)]] == list(files)
    assert all(artifact.read_part(part) == files[part.path] for part in second.parts[: len(files)])
    assert embed(config) == second

    # A version that only loses rows embeds none; a new generation embeds what is left, and loses rows in turn.
    embedded_rows.clear()
    _grow(config, new.slice(0, 0), new["pair_id"].to_pylist()[:5], tmp_path)
    third = embed(config)
    assert (embedded_rows, third.version, third.details["dimensions"]) == ([], 3, 32)
    assert len(_by_pair(config)) == 150 + 70 - 71 - 5
    embed(config, force=True)
    assert len(embedded_rows) == 150 + 70 - 71 - 5
    _grow(config, new.slice(0, 0), new["pair_id"].to_pylist()[5:8], tmp_path)
    embed(config)
    again = _by_pair(config)
    assert len(again) == 150 + 70 - 71 - 8
    assert all(np.allclose(again[pair], found[pair], atol=2e-2) for pair in again)


def test_what_was_embedded_before_a_crash_is_not_embedded_again(
    tmp_path: Path,
    tiny: Callable[[str], Path],
    in_process: None,
    embedded_rows: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = EmbedConfig(model=str(tiny("bert")), device="cpu", max_tokens=16, workers=1)
    config = RunConfig(workspace=str(tmp_path / "ws"), embed=settings)
    commit_corpus(config, _table(0, 64))
    first = embed(config)
    _grow(config, _table(64, 128), [], tmp_path)
    embedded_rows.clear()
    original = Artifact.write_receipt

    def cut_off(self: Artifact, receipt: Receipt) -> None:
        original(self, receipt)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "write_receipt", cut_off)
        with pytest.raises(KeyboardInterrupt):
            embed(config)
    assert Workspace(config).embeddings().require() == first
    assert len(embedded_rows) == 64
    second = embed(config)
    assert (second.version, second.details["rows"]) == (2, 128)
    assert len(embedded_rows) == len(set(embedded_rows)) == 128
    assert len(_by_pair(config)) == 192


def test_a_surrogate_fitted_to_the_corpus_stays_with_it(
    tmp_path: Path, in_process: None, embedded_rows: list[str]
) -> None:
    config = RunConfig(workspace=str(tmp_path / "ws"), embed=EmbedConfig(model="char-ngrams", device="cpu"))
    commit_corpus(config, _table(0, 100))
    embed(config)
    before, folder = _by_pair(config), Workspace(config).embeddings().folder
    [surrogate] = folder.child("surrogate").find("*.safetensors")
    embedded_rows.clear()
    _grow(config, _table(100, 30), [], tmp_path)
    embed(config)
    assert len(embedded_rows) == 30
    assert folder.child("surrogate").find("*.safetensors") == [surrogate]
    found = _by_pair(config)
    assert all(np.array_equal(found[pair], before[pair]) for pair in before)
    assert all(
        read_parquet(folder, part.path).num_rows == part.rows for part in Workspace(config).embeddings().require().parts
    )

"""The command of the study of batch sizes: which runs it makes and in what order, and what a transformer searches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="the study's trainer is compiled (pip install '.[bench]')")

from clusterbatch.encoder.tokens import Tokens
from tests.benchmarks import bench_grid
from tests.benchmarks.grid_report import read_runs
from tests.benchmarks.static_trainer import Corpus

ARMS = ["source", "cluster-4x", "none"]


class MadeUpRuns:
    """Runs without training; corpora have no arm `none`. `left` runs are made before an interruption."""

    def __init__(self) -> None:
        self.left = 1000
        self.made: list[tuple[Any, ...]] = []

    def __call__(self, folder: Path, name: str, temperature: float) -> Any:
        def make(arm: str, batch: int, seed: int, *rest: Any) -> dict[str, Any] | None:
            if arm == "none":
                return None
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.made.append((name, batch, arm, seed, *rest))
            return {"scores": [0.5, 0.25]}

        return SimpleNamespace(run=make, run_backbone=make)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> MadeUpRuns:
    made_up = MadeUpRuns()
    monkeypatch.setattr(bench_grid, "Study", made_up)
    return made_up


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    fixed = ["--corpora", "a,b", "--arms", ",".join(ARMS), "--seeds", "3"]
    monkeypatch.setattr(sys, "argv", ["bench_grid", str(folder), *fixed, *words])
    bench_grid.main()


def test_a_mask_that_a_transformer_would_not_apply_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["bench_grid", str(tmp_path), "--layers", "2", "--arms", "source,cluster-4x-teacher"]
    )
    with pytest.raises(SystemExit):
        bench_grid.main()
    assert "without these masks: cluster-4x-teacher" in capsys.readouterr().err
    assert not runs.made


def test_an_interrupted_study_has_the_same_seeds_of_all_arms_but_one_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: MadeUpRuns
) -> None:
    for made in (1, 3, 4, 1000):
        runs.left = made
        if made < 1000:
            with pytest.raises(KeyboardInterrupt):
                start(monkeypatch, tmp_path, "--sizes", "32,64")
        else:
            start(monkeypatch, tmp_path, "--sizes", "32,64")
        for arms in read_runs(tmp_path).values():
            seeds = [set(arms.get(arm, ())) for arm in ARMS[:2]]
            assert len(seeds[0] ^ seeds[1]) <= 1
    assert len(runs.made) == len(set(runs.made)) == 2 * 2 * 2 * 3
    assert {run[4:] for run in runs.made if run[1] == 64} == {(bench_grid.RATES[64], None)}


@pytest.mark.parametrize("words", [["--layers", "2"], ["--pairs", "640"], ["--temperature", "0.1"]])
def test_a_folder_has_runs_of_one_model_length_and_temperature(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    runs: MadeUpRuns,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
) -> None:
    start(monkeypatch, tmp_path, "--sizes", "32")
    made = list(runs.made)
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path, "--sizes", "64", *words)
    assert f"{words[0].strip('-')} {'0.05' if 'temperature' in words[0] else 'None'}" in capsys.readouterr().err
    assert runs.made == made
    # The other way round, and from runs that a study without such records has left.
    start(monkeypatch, tmp_path / "other", "--sizes", "32", *words)
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path / "other", "--sizes", "32")
    kept = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    recorded = {"layers", "pairs", "temperature"}
    assert all(recorded <= run.keys() for run in kept)
    early = [{name: value for name, value in run.items() if name not in recorded} for run in kept]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in early))
    runs.made.clear()
    start(monkeypatch, tmp_path, "--sizes", "32")
    assert not runs.made
    if "--temperature" in words:
        with pytest.raises(SystemExit):
            start(monkeypatch, tmp_path, "--sizes", "32", *words)


@pytest.mark.parametrize("words", [["--layers", "2"], ["--layers", "2", "--pairs", "640"], ["--pairs", "640"]])
def test_runs_of_so_many_pairs_see_them_at_every_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: MadeUpRuns, words: list[str]
) -> None:
    start(monkeypatch, tmp_path, "--sizes", "16,64", "--rates", "1e-4,3e-4", *words)
    assert {batch * rest[-1] for _, batch, _, _, *rest in runs.made} == {640 if "--pairs" in words else 6400}
    assert {run[4] for run in runs.made} == {1e-4, 3e-4}
    assert len(runs.made) == len(set(runs.made)) == 2 * 2 * 2 * 3 * 2


def test_a_transformer_searches_relevant_documents_and_some_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against ranking by hand: a document that is not searched counts as if it were not there."""
    monkeypatch.setattr(bench_grid, "_SEARCHED", 12)
    random = np.random.default_rng(0)
    vectors = random.standard_normal((40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    encoded: list[int] = []

    def encode(texts: Tokens, _: int) -> np.ndarray:
        numbers = [int(texts[row][0]) for row in range(len(texts))]
        encoded.extend(numbers)
        return vectors[numbers]

    def tokens(numbers: list[list[int]]) -> Tokens:
        return Tokens(np.concatenate(numbers).astype(np.int32), np.arange(len(numbers) + 1))

    encoder: Any = SimpleNamespace(tokenizer=SimpleNamespace(surrounded=tokens), encode=encode)
    # Texts are the numbers of their vectors: 10 queries, then 30 documents.
    relevant = [random.choice(5, size=1 + query % 2, replace=False) for query in range(10)]
    corpus = Corpus("c", None, None, tokens([[n] for n in range(10)]), tokens([[n] for n in range(10, 40)]), relevant)  # type: ignore[arg-type]
    study = SimpleNamespace(corpus=corpus, ndcg=lambda *sides: bench_grid.Study.ndcg(study, *sides))  # type: ignore[arg-type]
    found = bench_grid.Study.scores_of_some(study, encoder)  # type: ignore[arg-type]
    searched = np.array(encoded[10:]) - 10
    assert len(searched) == len(set(searched.tolist())) == 12
    assert set(np.concatenate(relevant).tolist()) <= set(searched.tolist())
    for query, own in enumerate(relevant):
        ranked = searched[np.argsort(-(vectors[10 + searched] @ vectors[query]))][:10]
        gained = sum(1 / np.log2(rank + 2) for rank, document in enumerate(ranked) if document in own)
        assert found[query] == pytest.approx(gained / sum(1 / np.log2(rank + 2) for rank in range(len(own))))


def test_live_super_batches_are_divided_by_the_model_after_the_first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half is that of the arm without it, so the model that divides is the one that trains on."""
    asked: list[tuple[Any, ...]] = []

    def batches(arm: str, batch: int, seed: int, trained: Any = None) -> np.ndarray | None:
        if arm == "super-99x":
            return None
        if trained is not None:
            assert trained() == "vectors"
        return np.arange(10)[:, None] + (100 if arm.endswith("@trained") else 0) + 1000 * seed

    study: Any = object.__new__(bench_grid.Study)
    study.arms = SimpleNamespace(batches=batches)
    monkeypatch.setattr(study, "_vectors", lambda *given: asked.append(given) or "vectors")
    assert study._batches("super-99x@live", 16, 1, 0.1, None, None) is None
    found = study._batches("super-4x@live", 16, 1, 0.1, None, 8)
    assert found[:, 0].tolist() == [1000, 1001, 1002, 1003, 1104, 1105, 1106, 1107]
    [(seen, *rest)] = asked
    assert seen[:, 0].tolist() == [1000, 1001, 1002, 1003]
    assert rest == [8, 0.1, None, 1]


def test_a_masked_transformer_gets_the_vectors_that_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Step:
        def __init__(self, encoder: Any, config: Any, steps: int, world: Any) -> None:
            seen.append(config.mask)

        def run(self, batch: Any) -> Any:
            seen.append((batch.query_vector, batch.document_vector))
            return SimpleNamespace(loss=0.0)

    monkeypatch.setattr(bench_grid, "TrainingStep", Step)
    encoder: Any = SimpleNamespace(tokenizer=SimpleNamespace(surrounded=Tokens.from_lists))
    for name, value in (("load_encoder", lambda *_: encoder), ("first_layers", lambda *_: ""), ("finish", lambda _: 0)):
        monkeypatch.setattr(bench_grid, name, value)
    texts, hashes = Tokens.from_lists([[n] for n in range(6)]), np.arange(6, dtype=np.uint64)
    study: Any = object.__new__(bench_grid.Study)
    study.folder, study.temperature = Path(), 0.05
    study.corpus = SimpleNamespace(
        pairs=SimpleNamespace(query=texts, document=texts, query_hash=hashes, document_hash=hashes)
    )
    near = np.arange(6.0)[:, None], 10 + np.arange(6.0)[:, None]
    batches = np.array([[4, 1], [0, 5]])
    study._train_backbone(batches, 2, 1e-3, 2, 0, near)
    mask, *vectors = seen
    assert mask == bench_grid.MASKS["masked"]
    for rows, (queries, documents) in zip(batches, vectors, strict=True):
        assert queries[:, 0].tolist() == rows.tolist()
        assert documents[:, 0].tolist() == (10 + rows).tolist()
    seen.clear()
    study._train_backbone(batches, 2, 1e-3, 2, 0)
    assert seen[0] == bench_grid.MaskConfig()
    assert seen[1:] == [(None, None), (None, None)]

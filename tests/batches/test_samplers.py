import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from clusterbatch.batches.samplers import (
    ClusterBatchSampler,
    SentenceTransformersSampler,
    label_rows,
)
from clusterbatch.config import BatchesConfig
from clusterbatch.errors import DataError, UsageError
from clusterbatch.store import Folder
from tests.clustering.synthetic import build_shards

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"
RANDOM = np.random.default_rng(0)
CLUSTERS = RANDOM.integers(0, 12, 1000)
SOURCES = np.where(RANDOM.random(1000) < 0.3, "web", "news")
CONFIG = BatchesConfig(size=32, clusters_per_batch=1)


def batches_of(sampler: ClusterBatchSampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_row_comes_and_full_batches_are_of_one_cluster_and_source() -> None:
    sampler = ClusterBatchSampler(CLUSTERS, CONFIG, sources=SOURCES)
    batches = batches_of(sampler, 0)
    assert len(batches) == len(sampler)
    counts = np.bincount(np.concatenate(batches), minlength=1000)
    assert counts.min() == 1
    assert (counts - 1).sum() == sum(sampler.plan.batch(step).repeated for step in range(len(sampler))) < 2 * 32
    pure = 0
    for batch in batches:
        assert len(set(batch)) == 32
        assert len(set(SOURCES[batch])) == 1
        pure += len(set(CLUSTERS[batch])) == 1
    sizes = np.unique(np.char.add(SOURCES, CLUSTERS.astype(str)), return_counts=True)[1]
    narrow = ((sizes >= 32) & (sizes < 48)).sum()
    assert pure >= (sizes // 32).sum() - narrow


def test_epochs_differ_and_come_again_the_same() -> None:
    sampler, other = (ClusterBatchSampler(CLUSTERS.astype(str), CONFIG) for _ in range(2))
    first, second = batches_of(sampler, 0), batches_of(sampler, 1)
    assert {tuple(sorted(batch)) for batch in first}.isdisjoint(tuple(sorted(batch)) for batch in second)
    assert batches_of(other, 1) == second
    assert batches_of(other, 0) == first


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_global_batch(world_size: int) -> None:
    whole = list(ClusterBatchSampler(CLUSTERS, CONFIG))
    ranks = [list(ClusterBatchSampler(CLUSTERS, CONFIG, rank=r, world_size=world_size)) for r in range(world_size)]
    for batch, *slices in zip(whole, *ranks, strict=True):
        assert [row for part in slices for row in part] == batch
        lengths = [len(part) for part in slices]
        assert max(lengths) - min(lengths) <= 1


def test_resumes_in_the_middle_of_an_epoch_with_another_number_of_ranks() -> None:
    sampler = ClusterBatchSampler(CLUSTERS, CONFIG)
    expected = batches_of(sampler, 1)[5:] + batches_of(sampler, 2)
    ranks = [ClusterBatchSampler(CLUSTERS, CONFIG, rank=rank, world_size=2) for rank in range(2)]
    state = sampler.state(len(sampler) + 5)
    seen: list[list[list[int]]] = [[], []]
    for rank, resumed in enumerate(ranks):
        assert resumed.resume(state) == 1
        for epoch in (1, 2):
            resumed.set_epoch(epoch)
            seen[rank] += list(resumed)
    assert [left + right for left, right in zip(*seen, strict=True)] == expected
    with pytest.raises(UsageError, match="other labels"):
        ClusterBatchSampler(CLUSTERS, BatchesConfig(size=64)).resume(state)


def test_a_data_loader_takes_it() -> None:
    loader = DataLoader(torch.arange(1000), batch_sampler=ClusterBatchSampler(CLUSTERS, CONFIG))
    assert torch.cat(list(loader)).unique().numel() == 1000


def test_labels_from_a_workspace_are_those_of_the_shards(tmp_path: Path) -> None:
    artifact, _ = build_shards(Folder(str(tmp_path)), {"a": [100, 220], "b": [300]}, shard_rows=150)
    sources, clusters = label_rows(artifact, ["b-0-7", "a-1-219", "a-0-0"])
    assert sources.tolist() == ["b", "a", "a"]
    assert clusters.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="1 of 2 rows are not there, as 'nobody'"):
        label_rows(artifact, ["a-0-1", "nobody"])


def test_processes_of_sentence_transformers_get_slices_of_one_global_batch() -> None:
    accelerate = pytest.importorskip("accelerate.data_loader")
    build = SentenceTransformersSampler(CLUSTERS, devices=2, clusters_per_batch=1)
    plan_batches = list(ClusterBatchSampler(CLUSTERS, BatchesConfig(size=64, clusters_per_batch=1, seed=3)))
    sampler = build(range(1000), batch_size=32, drop_last=False, valid_label_columns=None, generator=None, seed=3)
    processes = [accelerate.BatchSamplerShard(sampler, 2, process) for process in range(2)]
    for batch, *slices in zip(plan_batches, *processes, strict=True):
        assert slices[0] + slices[1] == batch


class Trainer:
    """The methods of transformers' Trainer that make loaders."""

    def __init__(self, sampler: SentenceTransformersSampler) -> None:
        self._sampler = sampler

    def get_train_dataloader(self, rows: int) -> list[list[int]]:
        return list(self._sampler(range(rows), batch_size=50, drop_last=False, seed=1))

    def get_eval_dataloader(self, rows: int) -> list[list[int]]:
        return list(self._sampler(range(rows), batch_size=50, drop_last=False, seed=1))

    get_test_dataloader = get_eval_dataloader


@pytest.mark.parametrize("rows", [20, 1000, 5000])
def test_a_dataset_to_evaluate_on_needs_no_labels_whenever_it_comes(rows: int) -> None:
    build = SentenceTransformersSampler(CLUSTERS)
    expected = list(build(range(1000), batch_size=50, seed=1))
    for trainer in (Trainer(build), Trainer(pickle.loads(pickle.dumps(build)))):
        for _ in range(2):
            in_order = [list(range(start, min(start + 50, rows))) for start in range(0, rows, 50)]
            assert trainer.get_eval_dataloader(rows) == trainer.get_test_dataloader(rows) == in_order
            assert trainer.get_train_dataloader(1000) == expected


def test_labels_must_match_the_dataset() -> None:
    with pytest.raises(UsageError, match="1000 cluster labels for a training dataset of 7 rows"):
        Trainer(SentenceTransformersSampler(CLUSTERS)).get_train_dataloader(7)
    with pytest.raises(UsageError, match="expected one of each per row"):
        ClusterBatchSampler(CLUSTERS, CONFIG, sources=["a"])


@pytest.mark.parametrize(
    ("clusters", "words"),
    [
        (["a", None, "b"] * 20, "clusters: expected integers or strings, not a mixture, and none missing"),
        # As a column of pandas with a missing label.
        ([1, 2, np.nan] * 20, "clusters: expected integers or strings, not a mixture, and none missing"),
        (np.array([1, 2, np.nan] * 20, object), "clusters: expected integers or strings, .* and none missing"),
        (np.zeros((60, 1)), r"clusters: labels of shape \(60, 1\), expected one per row"),
    ],
)
def test_labels_that_cannot_be_compared_are_refused(clusters: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ClusterBatchSampler(clusters, CONFIG)


def test_what_makes_no_batches_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="a batch of 4 pairs leaves some of 8 ranks without any"):
        ClusterBatchSampler(CLUSTERS, BatchesConfig(size=4), rank=1, world_size=8)
    for key in ("size", "clusters_per_bach"):
        with pytest.raises(
            UsageError, match=rf"^{key}: not a key that a sampler takes \(it takes .*clusters_per_batch"
        ):
            SentenceTransformersSampler(CLUSTERS, **{key: 2})


def test_merged_clusters_are_neighbours_of_the_same_source() -> None:
    # Two sources whose labels alternate: neither has two consecutive ones.
    sources, number = np.repeat(["a", "b"], 64), np.tile(np.arange(8), 16)
    clusters = 2 * number + (sources == "b")
    config = BatchesConfig(size=8, clusters_per_batch=1, merged_clusters=2)
    sampler = ClusterBatchSampler(clusters, config, sources=sources)
    assert [stratum.group_rows.tolist() for stratum in sampler.plan.strata] == [[16] * 4] * 2
    for batch in sampler:
        assert len(set(sources[batch])) == 1
        assert len(set(number[batch] // 2)) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Pairs in 6 clusters, and a Sentence Transformers model with small random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    words = [f"w{number}" for number in range(300)]
    random = np.random.default_rng(0)
    clusters = random.integers(0, 6, 400)
    subject = [f"w{50 * cluster + random.integers(50)}" for cluster in clusters]
    table = {
        "query": [f"{word} w1" for word in subject],
        "document": [f"w2 {word}" for word in subject],
        "cluster": clusters,
    }
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)]).save(str(folder / "model"))
    return str(folder / "pairs.parquet"), str(folder / "model")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_torch_example_learns(tiny: tuple[str, str]) -> None:
    losses = example("torch_batches").main(*tiny, size=32, epochs=5)
    assert len(losses) == 5 * 13
    assert np.mean(losses[-13:]) < 0.8 * np.mean(losses[:13])


def test_the_sentence_transformers_example_trains_on_the_planned_batches_and_resumes(
    tiny: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    seen: list[int] = []
    forward = MultipleNegativesRankingLoss.forward

    def spy(self: object, features: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        seen.append(int(features[0]["input_ids"].sum()))
        return forward(self, features, labels)

    monkeypatch.setattr(MultipleNegativesRankingLoss, "forward", spy)
    # Before training, on as many rows: the labels say nothing about them.
    untrained: list[list[int]] = []

    class Evaluated(SentenceTransformerTrainer):
        def train(self, **words: object) -> object:
            if not untrained:
                self.evaluate(self.train_dataset.select(range(399, -1, -1)))
                untrained.append(seen.copy())
                seen.clear()
            return super().train(**words)

    script = example("sentence_transformers_batches")
    monkeypatch.setattr(script, "SentenceTransformerTrainer", Evaluated)
    arguments = {
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2,
        "save_steps": 16,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    trainer = script.main(*tiny, str(tmp_path), **arguments)
    assert trainer.state.global_step == 26
    evaluated = len(seen)
    trainer.evaluate(trainer.train_dataset.select(range(40)))
    # 40 rows in batches of 8, transformers' default; the training dataset's labels say nothing about them.
    assert len(seen) == evaluated + 5
    rows = pq.read_table(tiny[0])
    numbers = np.array([[int(word[1:]) for word in text.split()] for text in rows["query"].to_pylist()]).sum(axis=1)
    assert untrained == [numbers[::-1].reshape(50, 8).sum(axis=1).tolist()]
    del seen[evaluated:]
    sampler = ClusterBatchSampler(rows["cluster"].to_numpy(), BatchesConfig(size=32, seed=42))
    expected = [numbers[batch].sum() for epoch in range(2) for batch in batches_of(sampler, epoch)]
    assert seen == expected
    SentenceTransformer(str(tmp_path))

    seen.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert seen == expected[16:]

"""What arms are charged: their own training, and of the shared stages those that they need, whoever did them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, with_changes
from clusterbatch.experiments.compare.costs import cost_of, extra_cost, shared_costs, worker_seconds
from clusterbatch.shards.stage import cluster
from clusterbatch.store import Artifact, Manifest, Receipt
from clusterbatch.store.traffic import Traffic
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace

TRIAL = {"seconds_training": 360.0, "device": "cpu", "traffic": Traffic(reads=10).model_dump()}
PRICES = {"cpu_hour": 1.0, "gpu_hour": 100.0, "million_reads": 1e6}


def _arm(layout: str, embeddings: bool, clusters: bool) -> dict[str, Any]:
    return {"layout": layout, "uses_embeddings": embeddings, "uses_clusters": clusters}


def _details(**changes: Any) -> dict[str, Any]:
    traffic = {name: Traffic(reads=reads).model_dump() for name, reads in (("embed", 1), ("mine", 2), ("cluster", 4))}
    return {
        "arms": {
            "random": _arm("plain", False, False),
            "cluster": _arm("plain", True, True),
            "random-mined": _arm("mined", True, False),
            "tas-balanced": _arm("mined", True, True),
        },
        "worker_seconds": {
            "embed": 3600.0,
            "mine": {"mined": 7200.0},
            "cluster": {"plain": 1800.0, "mined": 1800.0},
        },
        "traffic": {
            "embed": traffic["embed"],
            "mine": {"mined": traffic["mine"]},
            "cluster": dict.fromkeys(("plain", "mined"), traffic["cluster"]),
        },
        "embed_device": None,
        **changes,
    }


def _config(**changes: Any) -> RunConfig:
    return with_changes(RunConfig(workspace="here"), {"compare.prices": PRICES, **changes})


@pytest.mark.parametrize(
    ("arm", "hours", "reads"),
    [("random", 0.1, 10), ("cluster", 1.6, 15), ("random-mined", 3.1, 13), ("tas-balanced", 3.6, 17)],
)
def test_an_arm_pays_for_the_stages_that_it_needs_and_no_other(arm: str, hours: float, reads: int) -> None:
    found = cost_of(_config(), _details(), arm, [TRIAL])
    assert found.hours == pytest.approx(hours)
    assert found.shared_seconds == pytest.approx(3600 * hours - 360)
    assert found.traffic.reads == reads
    assert found.price == pytest.approx(hours + reads)
    assert found.training_price == pytest.approx(0.1 + 10)


def test_an_arm_with_a_teacher_pays_for_its_scores_and_for_the_clusters_they_are_of() -> None:
    details = _details()
    details["arms"]["random"] |= {"uses_scores": True, "uses_embeddings": True}
    details["worker_seconds"]["score"] = {"plain": 7200.0}
    details["traffic"]["score"] = {"plain": Traffic(reads=8).model_dump()}
    found = cost_of(_config(), details, "random", [TRIAL])
    assert (round(found.hours, 6), found.traffic.reads) == (0.1 + 1.0 + 0.5 + 2.0, 10 + 1 + 4 + 8)
    assert cost_of(_config(), details, "cluster", [TRIAL]).hours == pytest.approx(1.6)


def test_each_stage_has_the_price_of_what_it_ran_on() -> None:
    on_gpu = cost_of(_config(), _details(embed_device="cuda"), "random-mined", [TRIAL])
    assert on_gpu.price == pytest.approx(0.1 + 100 + 2 + 13)
    # Training on a GPU, and embeddings that do not say: as if they were made on one. Mining never is.
    trained = cost_of(_config(), _details(), "random-mined", [{**TRIAL, "device": "cuda"}])
    assert trained.price == pytest.approx(10 + 100 + 2 + 13)


def test_what_an_arm_costs_beyond_another_follows_the_prices() -> None:
    def extra(**prices: float) -> float:
        config = _config(**{"compare.prices": prices})
        details = _details(embed_device="cuda")
        return extra_cost(*(cost_of(config, details, name, [TRIAL]) for name in ("cluster", "random")))

    # Of .1 hours of training, one of embedding on a GPU, half a one of clustering.
    assert extra(cpu_hour=1.0, gpu_hour=100.0) == pytest.approx(100.5 / 0.1)
    # The same price for every hour: the ratio is that of the hours, as where all ran on one kind of machine.
    assert extra(cpu_hour=3.0, gpu_hour=3.0) == pytest.approx(15)
    assert extra(cpu_hour=0.0, gpu_hour=0.0) == pytest.approx(15)
    # Without prices: worker hours.
    assert extra() == pytest.approx(15)
    assert extra(cpu_hour=0.0, gpu_hour=0.0, million_reads=1.0) == pytest.approx(0.5)


def test_without_prices_there_are_hours_and_requests_but_no_money() -> None:
    config = RunConfig(workspace="here")
    found = cost_of(config, _details(embed_device="cuda"), "cluster", [TRIAL])
    assert (found.price, found.training_price) == (None, None)
    assert (found.hours, found.gpu_hours) == (pytest.approx(1.6), pytest.approx(1.0))
    assert found.traffic.reads == 15
    priced = cost_of(
        _config(**{"compare.prices": {"gpu_hour": 2.0}}), _details(embed_device="cuda"), "cluster", [TRIAL]
    )
    # A price that is unset counts as nothing once another is given.
    assert (priced.price, priced.training_price) == (pytest.approx(2.0), 0.0)


def test_a_comparison_without_seconds_of_workers_keeps_its_price() -> None:
    details = _details(seconds={"embed": 1800.0, "cluster": {"plain": 600.0}})
    del details["worker_seconds"], details["embed_device"]
    config = _config(**{"embed.workers": 2, "cluster.workers": 3})
    assert cost_of(config, details, "cluster", [TRIAL]).hours == pytest.approx(0.1 + 1 + 0.5)


def _manifest(**values: Any) -> Manifest:
    known = {"kind": "made", "fingerprint": "f", "created": "2026-01-01", "counts": {}, "parts": []}
    return Manifest.model_validate({**known, **values})


def test_seconds_are_those_of_the_workers_that_made_it() -> None:
    # Resumed at the end: the last session saw little of the work.
    assert worker_seconds(_manifest(seconds=5.0, worker_seconds=100.0), 2) == 100.0
    # Much beside the units, one after the other.
    assert worker_seconds(_manifest(seconds=50.0, worker_seconds=10.0), 2) == 50.0
    # From before: by as many workers as made it, where that is known, not as many as are configured now.
    assert worker_seconds(_manifest(seconds=5.0), 2) == 10.0
    assert worker_seconds(_manifest(seconds=5.0, config={"workers": 8}), 2) == 40.0


@pytest.fixture
def receipts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Receipt]]:
    """Of every artifact that is committed, by its kind; each unit has taken ten seconds more than it did."""
    seen: dict[str, list[Receipt]] = {}
    original = Artifact.commit

    def commit(self: Artifact, fingerprint: str, given: Iterable[Receipt], **options: Any) -> Manifest:
        seen[self.kind] = list(given)
        for receipt in seen[self.kind]:
            receipt.seconds += 10.0
        return original(self, fingerprint, seen[self.kind], **options)

    monkeypatch.setattr(Artifact, "commit", commit)
    return seen


@pytest.mark.usefixtures("in_process")
def test_shared_stages_are_counted_with_their_passes_and_with_mining(
    tmp_path: Path, receipts: dict[str, list[Receipt]]
) -> None:
    settings = {
        "mine": {"negatives": 1, "first": 1, "last": 20, "workers": 3},
        "cluster": {"mean_size": 80, "device": "cpu"},
    }
    mined = embedded_workspace(str(tmp_path / "mined"), {"forum": 300}, settings=settings)
    plain = with_changes(
        mined,
        {
            "workspace": f"{tmp_path}/plain",
            "mine.negatives": 0,
            "reuse.corpus": mined.workspace,
            "reuse.embeddings": mined.workspace,
        },
    )
    layouts = {"plain": plain, "mined": mined}
    receipts.clear()
    clusters = {"plain": cluster(plain)}
    passes = [receipt for of_kind in receipts.values() for receipt in of_kind]
    assert {"clusters", "clustering pass sample", "clustering pass fit", "clustering pass assign"} <= set(receipts)
    clusters["mined"] = cluster(mined)
    found = shared_costs(mined, mined, layouts, clusters, {})
    seconds = found["worker_seconds"]
    assert seconds["cluster"]["plain"] == pytest.approx(sum(receipt.seconds for receipt in passes), abs=0.01)
    # The search alone is in the receipts; clusters of mined rows do not pay for it again.
    made = Workspace(mined).mined().require()
    assert seconds["mine"] == {"mined": max(made.worker_seconds, 3 * made.seconds)}
    assert seconds["mine"]["mined"] >= 10.0 * len(receipts["mined neighbours"])
    assert found["traffic"]["mine"] == {"mined": made.traffic.model_dump()}
    assert found["traffic"]["mine"]["mined"]["reads"] > 0


def test_embeddings_of_several_versions_and_of_a_sample(tmp_path: Path) -> None:
    config = RunConfig(workspace=str(tmp_path))
    embeddings = Workspace(config).embeddings()

    def commit(artifact: Artifact, identity: str, seconds: float) -> Manifest:
        receipt = Receipt(unit=0, fingerprint=identity, seconds=seconds)
        options = {"config": {"device": "cuda:0", "workers": 4}, "inputs": {}, "details": {}}
        return artifact.commit(identity, [receipt], seconds=1.0, **options)

    first = commit(embeddings, "one", 40.0)
    commit(embeddings.next_version(first), "two", 2.0)
    found = shared_costs(config, config, {}, {}, {})
    # The rows of both versions are embedded, the first one's were not for nothing.
    assert found["worker_seconds"]["embed"] == 42.0
    assert found["embed_device"] == "cuda"
    home = RunConfig(workspace=f"{tmp_path}/sample")
    commit(Workspace(home).embeddings(), "sample", 0.5)
    sampled = with_changes(config, {"reuse.embeddings": str(tmp_path), "compare.sample": 0.5})
    assert shared_costs(sampled, home, {}, {}, {})["worker_seconds"]["embed"] == 21.0

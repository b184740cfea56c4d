"""Output of `inspect` for workspaces in every state, running ones among them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from clusterbatch.cli import main
from clusterbatch.config import load_config
from clusterbatch.pipeline.inspect_workspace import inspect_workspace
from clusterbatch.pipeline.rounds import Round, write_round
from clusterbatch.shards.statistics import STATISTICS
from clusterbatch.store import Artifact, Counts, Receipt
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace
from clusterbatch.training.metrics import MetricsLog


def receipt(artifact: Artifact, unit: int, rows: int = 10) -> Receipt:
    part = artifact.write_part(f"unit-{unit}", "bin", b"x" * rows, rows)
    done = Receipt(unit=unit, fingerprint="f", parts=[part], counts=Counts(read=rows, written=rows))
    artifact.write_receipt(done)
    return done


def commit(artifact: Artifact, receipts: list[Receipt]) -> None:
    artifact.commit("f", receipts, config={}, inputs={}, seconds=1.5)


def test_every_stage_in_its_own_state(tmp_path: Path) -> None:
    config = load_config(None, [f"workspace={tmp_path}"])
    workspace = Workspace(config)
    commit(workspace.corpus, [receipt(workspace.corpus, 0), receipt(workspace.corpus, 1)])
    for unit in range(3):
        receipt(workspace.embeddings(), unit)
    for name in ("sample", "fit"):
        done = Artifact(workspace.clusters().folder.child("_exchange", name), name)
        commit(done, [receipt(done, 0)])
    receipt(Artifact(workspace.clusters().folder.child("_exchange", "assign"), "assign"), 0)
    log = MetricsLog(workspace.train().folder, 0)
    for step in range(1500):
        log.add({"step": step, "loss": 2 - step / 1500})
    log.cut(1500)
    commit(workspace.embeddings(1), [])

    rows = {(row["stage"], row["generation"]): row for row in inspect_workspace(config)}
    assert rows["ingest", None]["state"] == "done"
    assert rows["ingest", None]["written"] == rows["ingest", None]["bytes"] == 20
    assert rows["embed", 0]["state"] == "3 units done, last write 0 s ago"
    assert rows["cluster", 0]["state"] == "1 units of pass assign done, last write 0 s ago"
    assert rows["train", 0]["state"] == "step 1,500 done, loss 1.0007, last write 0 s ago"
    assert rows["evaluate", 0]["state"] == "not begun"
    assert rows["embed", 1]["state"] == "done"
    assert ("ingest", 1) not in rows
    json.dumps(list(rows.values()))


def test_sources_clusters_checkpoints_and_the_live_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"workspace={tmp_path}"])
    workspace = Workspace(config)
    corpus, clusters, train = workspace.corpus, workspace.clusters(), workspace.train()
    corpus.commit("f", [], config={}, inputs={}, seconds=0.0, details={"sources": {"site/wiki": 20, "faq": 7}})
    by_source = {"site/wiki": {"rows": 20, "clusters": 3}, "faq": {"rows": 7, "clusters": 1}}
    clusters.commit("f", [], config={}, inputs={}, seconds=0.0, details={"sources": by_source})
    commit(train, [receipt(train, 0)])
    train.folder.write("checkpoints/step=00000001/model.safetensors", b"x" * 90)
    # A second generation trained on the clusters of the first one; all of the third has been cleaned away.
    for generation, on in ((1, 0), (2, 2)):
        found = Round(generation=generation, base=0, clusters=on, when="always", drift={}, promoted=generation == 1)
        write_round(workspace, found)
    commit(workspace.train(1), [])
    workspace.model.write_json("generation.json", {"generation": 1, "files": []})

    rows = {(row["stage"], row["generation"]): row for row in inspect_workspace(config)}
    assert rows["ingest", None]["sources"] == {"site/wiki": 20, "faq": 7}
    assert rows["cluster", 0]["sources"] == {"site/wiki": 3, "faq": 1}
    assert (rows["train", 0]["bytes"], rows["train", 0]["checkpoint_bytes"]) == (100, 90)
    assert [rows["train", generation]["live"] for generation in range(3)] == [False, True, False]
    assert {rows[stage, 1]["state"] for stage in ("embed", "cluster")} == {"not needed: clusters of generation 0"}
    assert {rows[stage, 2]["state"] for stage in ("embed", "cluster", "train", "evaluate")} == {"cleaned away"}
    assert main(["inspect", f"workspace={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    for expected in ("site/wiki", "live: generation 1"):
        assert expected in shown


def cluster_row(rows: int, cosine: float) -> dict[str, object]:
    example = {"pair_id": "p1", "query": "[bold]what[/bold]", "document": "a river", "cosine": cosine}
    return {
        "source": "site/wiki",
        "cluster": 3,
        "rows": rows,
        "mean_cosine": cosine,
        "duplicate_share": 0.25,
        "mean_characters": 80.0,
        "terms": ["river", "stone"],
        "neighbours": [{"cluster": 2, "cosine": 0.5}],
        "near": [example],
        "far": [example],
        "remarks": ["its rows have little in common"],
    }


def test_one_cluster_of_the_newest_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(load_config(None, [f"workspace={tmp_path}"]))
    for generation, row in enumerate((cluster_row(10, 0.75), cluster_row(20, float("nan")))):
        clusters = workspace.clusters(generation)
        part = write_parquet(clusters, STATISTICS, pa.Table.from_pylist([row]), content=STATISTICS)
        clusters.commit("f", [], config={}, inputs={}, seconds=0.0, extra_parts=[part])
    # The third has not come to its clusters yet.
    commit(workspace.embeddings(2), [])
    command = ["inspect", f"workspace={tmp_path}", "--cluster"]

    assert main([*command, "site/wiki/3"]) == 0
    shown = capsys.readouterr().out
    for expected in ("site/wiki/3: 20 rows", "river, stone", "little in common", "neighbour: 2", "[bold]what[/bold]"):
        assert expected in shown
    assert main([*command, "site/wiki/3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_cosine"] is None
    for name, message in (("wiki", "SOURCE/ID"), ("site/wiki/4", "no such cluster"), ("other/3", "no such source")):
        assert main([*command, name]) == 2
        assert message in capsys.readouterr().err

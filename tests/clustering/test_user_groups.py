"""The user's own clusters: their sums add up over units and tasks, and rows without a label share one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from clusterbatch.clustering import user_groups as labels
from clusterbatch.clustering.cells import partitions_of
from clusterbatch.clustering.embedded_corpus import EmbeddedRows
from clusterbatch.clustering.model import StoredParts
from clusterbatch.clustering.user_groups import LabelFitWorker, LabelSumsWorker
from clusterbatch.config import RunConfig
from clusterbatch.corpus.partitions import Partitions
from clusterbatch.corpus.row_groups import row_groups_of
from clusterbatch.embedding.vectors import TaskUnit, vector_values
from clusterbatch.runtime import WorkItem
from clusterbatch.store import Artifact, Folder
from clusterbatch.store.tables import read_parquet
from clusterbatch.store.workspace import Workspace
from tests.clustering.embedded import embedded_workspace


def test_sums_do_not_depend_on_how_units_are_grouped_into_tasks(tmp_path: Path) -> None:
    config = embedded_workspace(
        str(tmp_path),
        {"forum": 600, "wiki": 200},
        optional=["group"],
        settings={"cluster": {"column": "group"}},
        row_group_rows=100,
    )
    workspace = Workspace(config)
    corpus, embeddings = workspace.corpus.require(), workspace.embeddings().require()
    items = [TaskUnit(unit, part) for unit, part in zip(row_groups_of(corpus), embeddings.parts, strict=True)]
    partitions = partitions_of(config, corpus)
    tables = [
        _fitted(tmp_path / str(size), config, partitions, [items[i : i + size] for i in range(0, len(items), size)])
        for size in (1, 4, len(items))
    ]
    for group in range(2):
        expected = tables[0][group]
        assert expected["label"].to_pylist() == [f"user-{number}" for number in range(3)]
        for other in tables[1:]:
            assert other[group]["rows"].to_pylist() == expected["rows"].to_pylist()
            found, wanted = (vector_values(table["centroid"]) for table in (other[group], expected))
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    documents = pa.concat_tables([read_parquet(workspace.embeddings().folder, part.path) for part in embeddings.parts])
    rows = pa.concat_tables([read_parquet(workspace.corpus.folder, part.path) for part in corpus.parts])
    chosen = np.array(
        [
            source == "wiki" and label == "user-1"
            for source, label in zip(rows["source"].to_pylist(), rows["group"].to_pylist(), strict=True)
        ]
    )
    mean = vector_values(documents["document_vector"])[chosen].astype(np.float64).sum(axis=0)
    place = tables[0][1]["label"].to_pylist().index("user-1")
    assert tables[0][1]["rows"][place].as_py() == chosen.sum()
    np.testing.assert_allclose(vector_values(tables[0][1]["centroid"])[place], mean / np.linalg.norm(mean), atol=1e-3)


def _fitted(folder: Path, config: RunConfig, partitions: Partitions, tasks: list[list[TaskUnit]]) -> list[pa.Table]:
    sums, fits = Artifact(Folder(str(folder / "sums")), "sums"), Artifact(Folder(str(folder / "fits")), "fits")
    worker = LabelSumsWorker(EmbeddedRows(config, 0, partitions))
    items = [WorkItem(number, sum(unit.unit.rows for unit in task), task) for number, task in enumerate(tasks)]
    parts = [part for item in items for part in worker.process(item, sums).parts]
    fitter = LabelFitWorker(StoredParts(sums, parts), partitions)
    fitted = [
        fitter.process(WorkItem(number, 0, range(number, number + 1)), fits).parts[0]
        for number in range(len(partitions.names))
    ]
    # The same when they are read together.
    [together] = fitter.process(WorkItem(0, 0, range(len(partitions.names))), fits).parts
    assert read_parquet(fits.folder, together) == pa.concat_tables([read_parquet(fits.folder, part) for part in fitted])
    return [read_parquet(fits.folder, part.path).sort_by("label") for part in fitted]


def test_sums_by_key_grow_as_keys_come() -> None:
    sums = labels._Sums()
    sums.add(["b", None, "b"], np.array([1, 2, 3]), np.array([[1.0, 0], [0, 1], [2, 0]]))
    sums.add(["a", None], np.array([4, 5]), np.array([[0, 7.0], [1, 1]]))
    assert sums.keys == ["b", None, "a"]
    assert sums.rows.tolist() == [4, 7, 4]
    assert sums.sums.tolist() == [[3, 0], [1, 2], [0, 7]]

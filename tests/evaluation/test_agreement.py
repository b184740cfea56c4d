"""The measures agree with other programs to 1e-6 on identical runs over real collections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clusterbatch.evaluation.bm25 import LexicalIndex
from clusterbatch.evaluation.metrics import parse_metric, per_query
from clusterbatch.search.topk import descending_ids
from tests.evaluation.parity import COLLECTIONS, made_up_run, measured, open_collection

BM25 = {"covidqa": 0.643, "cranfield": 0.333, "squad_dev": 0.856}


@pytest.fixture(scope="module")
def _interpreted_ranx() -> Iterator[None]:
    """Compile nothing: numba would take half a minute for every length of ids, the arithmetic takes seconds."""
    numba = pytest.importorskip("numba", reason="install ranx to compare with it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", True)
        pytest.importorskip("ranx", reason="install ranx to compare with it")
        yield


@pytest.mark.data
@pytest.mark.usefixtures("_interpreted_ranx")
@pytest.mark.parametrize("name", COLLECTIONS)
def test_agrees_with_pytrec_eval_and_ranx(name, data_folder: Path):
    collection = open_collection(data_folder, name)
    judgements = collection.read_judgements()
    values = measured(judgements, made_up_run(collection, judgements))
    assert set(values["ranx"]) == set(values["clusterbatch"])
    for program in ("pytrec_eval", "ranx"):
        for measure, theirs in values[program].items():
            ours = values["clusterbatch"][measure]
            np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=f"{name} {measure} {program}")


@pytest.mark.data
@pytest.mark.parametrize(("name", "reported"), BM25.items())
def test_bm25_finds_what_others_report(name, reported, data_folder: Path):
    collection = open_collection(data_folder, name)
    judgements = collection.read_judgements()
    queries = collection.read_queries(judgements)
    ids, texts = collection.read_documents(0, collection.documents_bytes())
    order = descending_ids(ids)
    found = LexicalIndex([texts[row] for row in order]).search(list(queries.values()), 10)
    answers = {
        query: [ids[order[number]] for number in numbers if number >= 0]
        for query, numbers in zip(queries, found.documents.tolist(), strict=True)
    }
    values = per_query([parse_metric("NDCG@10")], judgements, answers)["NDCG@10"]
    assert values.mean() == pytest.approx(reported, abs=0.001)

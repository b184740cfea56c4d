"""The measures agree with other programs to 1e-6 on identical runs over real collections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.lexical import LexicalIndex
from clusterbatch.evaluation.metrics import parse_metric, per_query
from clusterbatch.evaluation.search import descending_ids
from clusterbatch.store import Folder

COLLECTIONS = ["covidqa", "cranfield", "jaquad_dev", "mix_dev", "squad_dev"]
# This project's name, trec_eval's, ranx's.
MEASURES = [
    ("NDCG@10", "ndcg_cut_10", "ndcg@10"),
    ("Recall@100", "recall_100", "recall@100"),
    ("MAP@100", "map_cut_100", "map@100"),
    ("HitRate@10", "success_10", "hit_rate@10"),
    ("MRR@10", None, "mrr@10"),
]
BM25 = {"covidqa": 0.643, "cranfield": 0.333, "squad_dev": 0.856}


def open_collection(data_folder: Path, name: str) -> Collection:
    return Collection(name, Folder(str(data_folder / "eval" / name)))


def made_up_run(collection: Collection, judgements) -> dict[str, dict[str, float]]:
    """100 answers a query, judged documents among them at random places; some scores equal, some queries unanswered."""
    rng = np.random.default_rng(0)
    ids, _ = collection.read_documents(0, collection.documents_bytes())
    run = {}
    for query, grades in judgements.items():
        names = list(dict.fromkeys([*(ids[n] for n in rng.integers(0, len(ids), 100)), *grades]))
        rng.shuffle(names)
        scores = rng.integers(0, 60, len(names)) / 8
        # trec_eval's order: of equal scores the larger id first.
        ranked = sorted(zip(names, scores.tolist(), strict=True), key=lambda it: (it[1], it[0].encode()), reverse=True)
        run[query] = dict(ranked[:100])
    return {query: answers for number, (query, answers) in enumerate(run.items()) if number % 50}


@pytest.mark.data
@pytest.mark.parametrize("name", COLLECTIONS)
def test_agrees_with_pytrec_eval_and_ranx(name, data_folder: Path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    ranx = pytest.importorskip("ranx", reason="install ranx to compare with it")
    collection = open_collection(data_folder, name)
    judgements = collection.read_judgements()
    run = made_up_run(collection, judgements)
    answers = {query: list(scores) for query, scores in run.items()}
    ours = per_query([parse_metric(measure) for measure, _, _ in MEASURES], judgements, answers)
    wanted = {"ndcg_cut.10", "recall.100", "map_cut.100", "success.10"}
    trec = pytrec_eval.RelevanceEvaluator(judgements, wanted).evaluate(run)
    # ranx knows no tie-break: it gets the order as scores.
    ordered = {query: {d: float(-rank) for rank, d in enumerate(names)} for query, names in answers.items()}
    unanswered = {query: {"(none)": 0.0} for query in judgements if query not in run}
    names = [of_ranx for _, _, of_ranx in MEASURES]
    other = ranx.evaluate(ranx.Qrels(judgements), ranx.Run({**ordered, **unanswered}), names, return_mean=False)
    for measure, of_trec, of_ranx in MEASURES:
        if of_trec:
            theirs = [trec.get(query, {}).get(of_trec, 0.0) for query in judgements]
            np.testing.assert_allclose(ours[measure], theirs, atol=1e-6, err_msg=f"{name} {measure} pytrec_eval")
        # ranx orders by query id.
        by_query = dict(zip(sorted(judgements), other[of_ranx], strict=True))
        theirs = [by_query[query] for query in judgements]
        np.testing.assert_allclose(ours[measure], theirs, atol=1e-6, err_msg=f"{name} {measure} ranx")


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

"""The same run measured by this project, by pytrec_eval (which BEIR uses) and by ranx."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clusterbatch.evaluation.collection import Collection
from clusterbatch.evaluation.metrics import parse_metric, per_query
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

Judgements = Mapping[str, Mapping[str, int]]


def open_collection(data_folder: Path, name: str) -> Collection:
    return Collection(name, Folder(str(data_folder / "eval" / name)))


def made_up_run(collection: Collection, judgements: Judgements) -> dict[str, dict[str, float]]:
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


def measured(judgements: Judgements, run: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, np.ndarray]]:
    """(Q,) values by program and measure, unanswered queries filled with 0, in the order of the judgements."""
    import pytrec_eval
    import ranx

    answers = {query: list(scores) for query, scores in run.items()}
    ours = per_query([parse_metric(measure) for measure, _, _ in MEASURES], judgements, answers)
    wanted = {"ndcg_cut.10", "recall.100", "map_cut.100", "success.10"}
    trec = pytrec_eval.RelevanceEvaluator(judgements, wanted).evaluate(run)
    # ranx knows no tie-break: it gets the order as scores. It orders its values by query id.
    ordered = {query: {d: float(-rank) for rank, d in enumerate(names)} for query, names in answers.items()}
    unanswered = {query: {"(none)": 0.0} for query in judgements if query not in run}
    names = [of_ranx for _, _, of_ranx in MEASURES]
    other = ranx.evaluate(ranx.Qrels(judgements), ranx.Run({**ordered, **unanswered}), names, return_mean=False)
    place = {query: number for number, query in enumerate(sorted(judgements))}
    order = [place[query] for query in judgements]
    return {
        "clusterbatch": ours,
        "pytrec_eval": {
            measure: np.array([trec.get(query, {}).get(of_trec, 0.0) for query in judgements])
            for measure, of_trec, _ in MEASURES
            if of_trec
        },
        "ranx": {measure: np.asarray(other[of_ranx])[order] for measure, _, of_ranx in MEASURES},
    }

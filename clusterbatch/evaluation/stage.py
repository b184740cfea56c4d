"""The evaluation stage: every model on every collection, by exact search over document ranges on Ray.

Two steps. Work items embed a range of documents each, by every model, and leave every query's best of it on storage.
Then the driver merges block of queries after block of queries, so what it holds is bounded, and writes runs and scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clusterbatch.config import DOCSTRINGS, RunConfig, fingerprint
from clusterbatch.corpus.write_holdout import HOLDOUT
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.collection import DOCUMENTS, Collection, open_collections
from clusterbatch.evaluation.metrics import Grades, Metric, parse_metric, per_query
from clusterbatch.evaluation.models import EvaluatedModel, evaluated_models, identities
from clusterbatch.evaluation.results import Answers, merge_block, run_lines, scores_table
from clusterbatch.evaluation.search_worker import CANDIDATES, SearchWorker, ShardTask
from clusterbatch.runtime import Pass, Pool, WorkItem, ray_session
from clusterbatch.runtime.resources import gpus_for
from clusterbatch.store import Artifact, Folder, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace

# Candidates (query, document, score) that the driver merges at once.
_MERGED_AT_ONCE = 4_000_000


def evaluate(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Measures the models on the collections of `evaluate.path`.

    Manifest.details: `table` with one row per collection, model and metric ({collection, model, metric, value, queries,
    documents}); `collections` with what each holds. Parts: `scores-*.parquet` (a value per query) and `run-*.trec`.

    Raises UsageError where no collection is given, DataError where one is damaged or no model has been trained.
    """
    watch = Stopwatch()
    metrics = [parse_metric(name) for name in dict.fromkeys(config.evaluate.metrics)]
    collections = configured_collections(config)
    models = evaluated_models(config, generation)
    inputs = {collection.name: collection.identity() for collection in collections}
    identity = fingerprint("evaluation", config.evaluate, config.embed.batch_tokens, identities(models), inputs)
    artifact = Workspace(config).evaluation(generation)
    if not force and artifact.is_done(identity):
        return artifact.require()
    done = artifact.begin(identity, force)
    items, numbers = _items(config, models, collections)
    with ray_session(config.ray):
        pool = Pool(config.evaluate.workers, gpus=gpus_for(config.evaluate.device, config.evaluate.workers))
        search = Pass("evaluate", artifact, identity, SearchWorker, {"config": config}, pool, "KiB of documents")
        finished = search.run(items, done=done)
    parts: list[Part] = []
    table: list[dict[str, Any]] = []
    described: dict[str, dict[str, int]] = {}
    for collection in collections:
        dense, lexical = ([finished[number] for number in of_kind] for of_kind in numbers[collection.name])
        judgements = collection.read_judgements()
        described[collection.name] = summary = _summary(judgements, dense)
        for model in models:
            candidates = [
                part
                for receipt in (lexical if model.is_lexical else dense)
                for part in receipt.parts
                if part.details["model"] == model.label
            ]
            sums = _merge(artifact, model, collection, judgements, candidates, metrics, config.evaluate.top_k, parts)
            table += [
                {
                    "collection": collection.name,
                    "model": model.label,
                    "metric": metric.name,
                    "value": sums[metric.name] / summary["queries"],
                    "queries": summary["queries"],
                    "documents": summary["documents"],
                }
                for metric in metrics
            ]
    manifest = artifact.commit(
        identity,
        # The candidates have served; the manifest names what stays.
        [receipt.model_copy(update={"parts": []}) for receipt in finished],
        config={"evaluate": config.evaluate.identity()},
        inputs=inputs,
        seconds=watch.seconds,
        details={"table": table, "collections": described, "models": [model.label for model in models]},
        extra_parts=parts,
    )
    artifact.folder.remove(CANDIDATES)
    return manifest


def configured_collections(config: RunConfig) -> list[Collection]:
    """The collections of `evaluate.path` (the built-in sample's is called `sample`), else what ingest held out."""
    if not config.evaluate.path:
        held_out = Workspace(config).corpus.folder.child(HOLDOUT)
        if not held_out.exists(DOCUMENTS):
            raise UsageError("evaluate.path: give at least one collection in BEIR layout (ingest has held out none)")
        return [Collection(HOLDOUT, held_out, config.evaluate.split)]
    own = Collection("sample", Workspace(config).sample.folder.child("collection"), config.evaluate.split)
    given = [Folder(path, config.storage) for path in config.evaluate.path if path != DOCSTRINGS]
    collections = open_collections(given, config.evaluate.split)
    return [own, *collections] if DOCSTRINGS in config.evaluate.path else collections


def _items(
    config: RunConfig, models: Sequence[EvaluatedModel], collections: Sequence[Collection]
) -> tuple[list[WorkItem], dict[str, tuple[list[int], list[int]]]]:
    """Return all work items, and by collection the numbers of its document ranges and of the reference."""
    dense = tuple(model for model in models if not model.is_lexical)
    lexical = tuple(model for model in models if model.is_lexical)
    items: list[WorkItem] = []
    numbers: dict[str, tuple[list[int], list[int]]] = {}
    for collection in collections:
        ranges = collection.document_ranges(config.evaluate.unit_bytes)
        block = max(64, min(4096, _MERGED_AT_ONCE // (config.evaluate.top_k * max(1, len(ranges)))))
        tasks = [ShardTask(dense, collection, start, end, block) for start, end in ranges]
        if lexical:
            tasks.append(ShardTask(lexical, collection, 0, collection.documents_bytes(), block, lexical=True))
        first = len(items)
        # How many documents a range holds is not known before it is read; progress counts its size.
        items += [WorkItem(first + n, (task.end - task.start) // 1024, task) for n, task in enumerate(tasks)]
        numbers[collection.name] = (
            list(range(first, first + len(ranges))),
            list(range(first + len(ranges), first + len(tasks))),
        )
    return items, numbers


def _summary(judgements: Mapping[str, Grades], receipts: Sequence[Receipt]) -> dict[str, int]:
    judged = {document for grades in judgements.values() for document in grades}
    return {
        "queries": len(judgements),
        "documents": sum(receipt.counts.written for receipt in receipts),
        # Judged, but not in corpus.jsonl: no search can find them, and they count against every model.
        "judged_documents_missing": len(judged) - sum(receipt.details["judged"] for receipt in receipts),
    }


def _merge(
    artifact: Artifact,
    model: EvaluatedModel,
    collection: Collection,
    judgements: Mapping[str, Grades],
    candidates: Sequence[Part],
    metrics: Sequence[Metric],
    top_k: int,
    parts: list[Part],
) -> dict[str, float]:
    """Sums over the queries by metric; appends the run files and scores of this model and collection to `parts`."""
    queries = list(judgements)
    sums = {metric.name: 0.0 for metric in metrics}
    labels: dict[str, Any] = {"collection": collection.name, "model": model.label}
    stem = f"{collection.name}.{model.label}".replace("/", "_")
    first = block = 0
    while first < len(queries):
        pieces = [part for part in candidates if part.details["block"] == block]
        answers: Answers = merge_block(artifact, pieces, queries[first:], top_k, collection.name)
        judged = {query: judgements[query] for query in answers}
        values = per_query(metrics, judged, {query: [name for name, _ in best] for query, best in answers.items()})
        run = run_lines(answers, model.label).encode()
        parts.append(artifact.write_part(f"run-{stem}-{block:04d}", "trec", run, run.count(b"\n"), **labels))
        scores = scores_table(collection.name, model.label, values, list(answers))
        parts.append(write_parquet(artifact, f"scores-{stem}-{block:04d}", scores, **labels))
        for metric in metrics:
            sums[metric.name] += float(values[metric.name].sum())
        first, block = first + len(answers), block + 1
    return sums

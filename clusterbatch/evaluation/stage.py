"""The evaluation stage: every model on every collection, by exact search over document ranges on Ray.

Two steps. Work items embed some ranges of documents each, by every model, and leave every query's best of them on
storage. Then the driver merges one block of queries after the other, in bounded memory, and writes runs and scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clusterbatch.config import DOCSTRINGS, RunConfig, fingerprint
from clusterbatch.corpus.write_holdout import HOLDOUT
from clusterbatch.errors import UsageError
from clusterbatch.evaluation.collection import DOCUMENTS, Collection, open_collections, search_items
from clusterbatch.evaluation.metrics import Grades, Metric, parse_metrics, per_query
from clusterbatch.evaluation.models import AFTER, EvaluatedModel, check_room, evaluated_models, identities
from clusterbatch.evaluation.results import Answers, merge_block, run_lines, scores_table
from clusterbatch.evaluation.search_worker import CANDIDATES, SearchWorker, ShardTask
from clusterbatch.runtime import Pass, Pool, WorkItem, ray_session
from clusterbatch.runtime.resources import gpus_for
from clusterbatch.store import Artifact, Folder, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.details import EvaluationDetails
from clusterbatch.store.tables import write_parquet
from clusterbatch.store.workspace import Workspace


def evaluate(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Measure the models on the collections of `evaluate.path`.

    Manifest.details: `table` with one row per collection, model and metric ({collection, model, metric, value, queries,
    documents}); `collections` with what each holds. Parts: `scores-*.parquet` (a value per query) and `run-*.trec`.

    Raises UsageError if no collection is given, DataError if one is damaged or no model has been trained.
    """
    watch = Stopwatch()
    metrics = parse_metrics(config.evaluate.metrics)
    collections = configured_collections(config)
    models = evaluated_models(config, generation)
    inputs = {collection.name: collection.identity() for collection in collections}
    identity = _identity(config, models, inputs)
    artifact = Workspace(config).evaluation(generation)
    if not force and artifact.is_done(identity):
        # Left by a crash between the commit and the removal.
        artifact.remove(CANDIDATES)
        return artifact.require()
    check_room(models, config)
    if AFTER in (model.label for model in models):
        trained = Workspace(config).train(generation)
        trained.check_parts(trained.require())
    items, numbers = _items(config, models, collections)
    done = _same_ranges(artifact.begin(identity, force), items)
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
        # The candidates are removed; the manifest names the parts that stay.
        [receipt.model_copy(update={"parts": []}) for receipt in finished],
        config={"evaluate": config.evaluate.identity()},
        inputs=inputs,
        seconds=watch.seconds,
        details=EvaluationDetails(
            table=table,
            collections=described,
            models=[model.label for model in models],
            dtypes=sorted({name for receipt in finished for name in receipt.details.get("dtypes", [])}),
        ),
        extra_parts=parts,
    )
    artifact.remove(CANDIDATES)
    return manifest


def planned_fingerprint(config: RunConfig, trained: str) -> str:
    """Return the fingerprint of the first generation's evaluation if it is done as `config` says.

    trained: that of the training. Raises UsageError or DataError if a model or a collection cannot be read.
    """
    inputs = {collection.name: collection.identity() for collection in configured_collections(config)}
    return _identity(config, evaluated_models(config, 0, trained), inputs)


def _identity(config: RunConfig, models: Sequence[EvaluatedModel], inputs: Mapping[str, str]) -> str:
    return fingerprint("evaluation", config.evaluate, config.embed.batch_tokens, identities(models), inputs)


def configured_collections(config: RunConfig) -> list[Collection]:
    """Return the collections of `evaluate.path` (the sample's is called `sample`), otherwise what ingest held out."""
    if not config.evaluate.path:
        held_out = Workspace(config).corpus.folder.child(HOLDOUT)
        collection = Collection(HOLDOUT, held_out, config.evaluate.split)
        if not held_out.exists(DOCUMENTS):
            corpus = Workspace(config).corpus
            if (ingested := corpus.manifest()) is not None:
                corpus.check_parts(ingested)
            reason = ": no source has two different documents" if config.evaluate.holdout else ""
            raise UsageError(
                f"evaluate.path: give at least one collection in BEIR layout (ingest has held out none{reason})"
            )
        # Its first line names the columns. Without the file, the check of the collection names the split.
        judgements = collection.judgements_file
        if held_out.exists(judgements) and held_out.read(judgements).count(b"\n") < 2:
            raise UsageError(
                f"evaluate.path: give at least one collection in BEIR layout (what ingest has held out is too little "
                f"for the split {config.evaluate.split})"
            )
        return [collection]
    given = [Folder(path, config.storage) for path in config.evaluate.path if path != DOCSTRINGS]
    if DOCSTRINGS not in config.evaluate.path:
        return open_collections(given, config.evaluate.split)
    own = Collection("sample", Workspace(config).sample.folder.child("collection"), config.evaluate.split)
    return [own, *open_collections(given, config.evaluate.split, [own.name])]


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
        size, block = search_items(len(ranges), config.evaluate.top_k)
        groups = [tuple(ranges[start : start + size]) for start in range(0, len(ranges), size)]
        tasks = [ShardTask(dense, collection, group, block) for group in groups]
        if lexical:
            whole = ((0, collection.documents_bytes()),)
            tasks.append(ShardTask(lexical, collection, whole, block, lexical=True))
        first = len(items)
        # The number of documents in a range is not known before it is read; progress counts bytes.
        items += [WorkItem(first + n, _bytes(task) // 1024, task) for n, task in enumerate(tasks)]
        numbers[collection.name] = (
            list(range(first, first + len(groups))),
            list(range(first + len(groups), first + len(tasks))),
        )
    return items, numbers


def _bytes(task: ShardTask) -> int:
    return sum(end - start for start, end in task.ranges)


def _same_ranges(done: Mapping[int, Receipt], items: Sequence[WorkItem]) -> dict[int, Receipt]:
    """Return the receipts that cover the ranges of their items: earlier versions cut collections differently."""
    ranges = {item.number: [list(pair) for pair in item.payload.ranges] for item in items}
    return {number: receipt for number, receipt in done.items() if receipt.details.get("ranges") == ranges.get(number)}


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
    """Return sums over the queries by metric; append the run files and scores of this model and collection to `parts`.

    candidates: one part per item, a row group per block of queries.
    """
    queries = list(judgements)
    sums = {metric.name: 0.0 for metric in metrics}
    labels: dict[str, Any] = {"collection": collection.name, "model": model.label}
    stem = f"{collection.name}.{model.label}".replace("/", "_")
    first = 0
    for block, rows in enumerate(candidates[0].details["row_groups"]):
        of_block = queries[first : first + rows // top_k]
        answers: Answers = merge_block(artifact, candidates, block, of_block, collection.name)
        first += len(of_block)
        judged = {query: judgements[query] for query in answers}
        values = per_query(metrics, judged, {query: [name for name, _ in best] for query, best in answers.items()})
        run = run_lines(answers, model.label).encode()
        parts.append(artifact.write_part(f"run-{stem}-{block:04d}", "trec", run, run.count(b"\n"), **labels))
        scores = scores_table(collection.name, model.label, values, list(answers))
        parts.append(write_parquet(artifact, f"scores-{stem}-{block:04d}", scores, **labels))
        for metric in metrics:
            sums[metric.name] += float(values[metric.name].sum())
    return sums

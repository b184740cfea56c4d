"""Tasks of MTEB (Massive Text Embedding Benchmark, arXiv 2210.07316) on this project's models.

MTEB loads its data and computes its scores itself; here an encoder is wrapped in its calling convention. The package is
not required; tasks that it has to download need a network.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clusterbatch.config import RunConfig, fingerprint
from clusterbatch.encoder.model import Encoder
from clusterbatch.errors import ClusterbatchError, InfrastructureError, UsageError, first_line
from clusterbatch.evaluation.models import EvaluatedModel, check_room, evaluated_models, identities, load
from clusterbatch.runtime import Pass, Pool, Result, WorkItem, ray_session
from clusterbatch.runtime.resources import gpus_for
from clusterbatch.search.topk import check_finite
from clusterbatch.store import Artifact, Manifest, Stopwatch
from clusterbatch.store.details import MtebDetails
from clusterbatch.store.workspace import Workspace


def evaluate_mteb(config: RunConfig, *, generation: int = 0, force: bool = False) -> Manifest:
    """Run the tasks of `evaluate.mteb` on the models of `evaluate.models` (but BM25), each a unit of work.

    Manifest.details: `table` with one row per task and model, {task, model, metric, value}, of the task's main score.

    Raises UsageError if mteb is not installed or has no such task, InfrastructureError if one cannot be loaded.
    """
    watch = Stopwatch()
    for task in config.evaluate.mteb:
        load_task(task)
    models = [model for model in evaluated_models(config, generation) if not model.is_lexical]
    identity = fingerprint("mteb", config.evaluate.mteb, identities(models), _settings(config))
    artifact = Workspace(config).mteb(generation)
    if artifact.is_done(identity) and not force:
        return artifact.require()
    check_room(models, config)
    done = artifact.begin(identity, force)
    jobs = [(task, model) for task in config.evaluate.mteb for model in models]
    items = [WorkItem(number, 1, job) for number, job in enumerate(jobs)]
    with ray_session(config.ray):
        pool = Pool(config.evaluate.workers, gpus=gpus_for(config.evaluate.device, config.evaluate.workers))
        receipts = Pass("mteb", artifact, identity, MtebWorker, {"config": config}, pool, "tasks").run(items, done=done)
    return artifact.commit(
        identity,
        receipts,
        config={"mteb": config.evaluate.mteb},
        inputs={model.label: model.version for model in models},
        seconds=watch.seconds,
        details=MtebDetails(table=[receipt.details["row"] for receipt in receipts]),
    )


def load_task(name: str) -> Any:
    """MTEB's task of that name, nothing downloaded yet."""
    try:
        mteb = importlib.import_module("mteb")
    except ImportError:
        raise UsageError("evaluate.mteb: the package mteb is not installed (pip install mteb)") from None
    try:
        return mteb.get_task(name)
    except (KeyError, ValueError) as error:
        raise UsageError(f"evaluate.mteb: mteb knows no task {name!r} ({first_line(error)})") from None


class MtebWorker:
    """Run one task on one model at a time."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def process(self, item: WorkItem, output: Artifact) -> Result:
        name, model = item.payload
        row = {"task": name, "model": model.label, **self._score(load_task(name), model)}
        return Result(details={"row": row})

    def _score(self, task: Any, model: EvaluatedModel) -> dict[str, Any]:
        settings = self._config.evaluate
        wrapped = MtebEncoder(
            load(model, self._config),
            model.label,
            model.version,
            settings.max_query_tokens,
            settings.max_document_tokens,
            self._config.embed.batch_tokens,
        )
        mteb = importlib.import_module("mteb")
        try:
            # Its own cache knows models by name only, and ours are called `after` everywhere.
            result = mteb.evaluate(wrapped, task, cache=None, co2_tracker=False, show_progress_bar=False)
        except ClusterbatchError:
            raise
        except (OSError, ConnectionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InfrastructureError(
                f"evaluate.mteb: task {task.metadata.name} cannot be loaded ({reason})"
            ) from error
        return {"metric": task.metadata.main_score, "value": float(result.task_results[0].get_score())}


class MtebEncoder:
    """An encoder as MTEB expects a model (its EncoderProtocol): texts in batches of dictionaries, unit vectors out.

    Queries get the model's query prompt and limit, everything else is a document; prompts of MTEB's own are not used.
    """

    def __init__(
        self,
        encoder: Encoder,
        name: str,
        version: str,
        max_query_tokens: int,
        max_document_tokens: int,
        batch_tokens: int,
    ) -> None:
        self._encoder, self._name, self._version = encoder, name, version
        self._limits = {"query": max_query_tokens, "document": max_document_tokens}
        self._batch_tokens = batch_tokens

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **options: Any,
    ) -> np.ndarray:
        """Return (N, d) float32. Raises DataError if a vector is not finite."""
        kind = "query" if getattr(prompt_type, "value", prompt_type) == "query" else "document"
        texts = [text for batch in inputs for text in batch["text"]]
        prepared = self._encoder.prepare(texts, self._limits[kind], self._encoder.prompts[kind])
        vectors = self._encoder.encode(prepared, self._batch_tokens)
        check_finite(torch.from_numpy(vectors), kind)
        return vectors

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """(N, M) cosines: vectors have length 1."""
        found: np.ndarray = np.atleast_2d(np.asarray(embeddings1)) @ np.atleast_2d(np.asarray(embeddings2)).T
        return found

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """(N,) cosines."""
        found: np.ndarray = (np.asarray(embeddings1) * np.asarray(embeddings2)).sum(-1)
        return found

    @property
    def mteb_model_meta(self) -> Any:
        meta = importlib.import_module("mteb.models.model_meta").ModelMeta
        return meta.create_empty({"name": f"clusterbatch/{self._name}", "revision": self._version})


def _settings(config: RunConfig) -> list[Any]:
    """Return what decides vectors beside the model; `auto` is left out, as in the fingerprint of an evaluation."""
    settings = config.evaluate
    dtype = [] if settings.dtype == "auto" else [settings.dtype]
    return [settings.max_query_tokens, settings.max_document_tokens, config.embed.batch_tokens, *dtype]

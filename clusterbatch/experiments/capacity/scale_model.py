"""A scale model of the pipeline: time, money, memory, objects and requests of each stage, by arithmetic alone.

Time is fixed + serial x work + work / (rate x workers). Work follows from the sizes (characters, FLOP, rows); the other
three are measured (calibrate.py). Objects and requests follow from how the stages cut their work. Memory is an upper
estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from clusterbatch.batches.strategies import STRATEGIES
from clusterbatch.config import RunConfig
from clusterbatch.config.compare import PricesConfig
from clusterbatch.config.stages import CHARACTER_NGRAMS
from clusterbatch.embedding.vectors import task_rows
from clusterbatch.evaluation.collection import search_items
from clusterbatch.experiments.capacity.sizes import RECORD_CHARACTERS, Shape, TeacherShape, Workload
from clusterbatch.store.shuffle import bundle_buckets
from clusterbatch.store.workspace import STAGE_ARTIFACTS

# FLOP per weight and token: forward; forward and backward (Kaplan 2020, arXiv 2001.08361).
_FORWARD, _TRAINING = 2.0, 6.0
# What a process holds that has torch, Arrow and Ray loaded.
_PROCESS_BYTES = 700 * 2**20
# The model of `evaluate.models` that is searched by words: in one item, whatever the size.
BM25 = "bm25"
# Python objects on the driver: a receipt.
_RECEIPT_BYTES = 3_000
# Bytes of the cluster index for one cluster, as arrays.
_INDEX_BYTES = 44
# Rows of a work item of `score`, if clusters are smaller.
_SCORED_ROWS = 1024
# Above so many clusters of one source they are found in two levels.
_FLAT_CLUSTERS = 4096


@dataclass(frozen=True)
class Coefficients:
    """Measured on one kind of machine, by stage.

    fixed: seconds whatever the work, of start-up above all; rate: work per second of one worker; serial: seconds for
    each unit of work that more workers do not shorten, of the driver, none where a stage is not named. Stages that run
    an encoder have its kind behind their name (`train static`). matrix_flops: FLOP/s that one worker reaches in matrix
    products.
    """

    machine: str
    fixed: Mapping[str, float]
    rate: Mapping[str, float]
    matrix_flops: float
    serial: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one stage.

    worker_hours: of all its workers; gpu_hours: the same if they have GPUs, otherwise 0; cost: at `compare.prices`,
    None if nothing has a price; worker_bytes: memory of one worker; driver_bytes: the stage's share of the driver's
    memory; objects: files that stay.
    """

    stage: str
    workers: int
    seconds: float
    worker_hours: float
    gpu_hours: float
    cost: float | None
    worker_bytes: float
    driver_bytes: float
    objects: int
    stored_bytes: float
    puts: int
    gets: int


@dataclass(frozen=True)
class CapacityModel:
    """A configuration on a workload, with the sizes of its models; teacher: None if nothing is scored."""

    config: RunConfig
    workload: Workload
    surrogate: Shape
    trained: Shape
    teacher: TeacherShape | None = None

    @property
    def stages(self) -> list[str]:
        """Return the stages of a run in order."""
        names = list(STAGE_ARTIFACTS)
        place = names.index("train")
        return names if self.teacher is None else [*names[:place], "score", *names[place:]]

    @property
    def units(self) -> int:
        """Row groups of the corpus, in which every later stage reads it."""
        return max(1, math.ceil(self.workload.rows / self.config.corpus.row_group_rows))

    @property
    def corpus_bytes(self) -> float:
        """Bytes of the stored corpus: zstd leaves about 0.4 of English text; ids and hashes are 50 bytes a row."""
        return self.workload.rows * (0.4 * self.workload.characters + 50)

    @property
    def training_bytes(self) -> float:
        """Bytes of the shards: token ids in two bytes, images, hashes, the surrogate's two vectors as float16."""
        content = 2 * self._trained_tokens + self.workload.image_bytes(self._images)
        return self.workload.rows * (content + 24 + 4 * self.surrogate.hidden)

    @property
    def _task_rows(self) -> float:
        """Rows of a task of the clustering passes: whole row groups."""
        unit = max(1, min(self.config.corpus.row_group_rows, self.workload.rows))
        return unit * max(1, math.ceil(task_rows(self.workload.rows) / unit))

    @property
    def _tasks(self) -> int:
        return max(1, math.ceil(self.workload.rows / self._task_rows))

    @property
    def buckets(self) -> int:
        return max(1, math.ceil(self.training_bytes / self.config.cluster.shard_bytes))

    @property
    def clusters_of_source(self) -> float:
        """Mean number of clusters of a source; sources are taken as equal in size."""
        if not STRATEGIES[self.config.batches.stratify].needs_clusters:
            return 1.0
        each = self.workload.rows / self._groups
        wanted = self.config.cluster.clusters or each / (self.config.cluster.mean_size or 4 * self.config.batches.size)
        return max(1.0, min(each, wanted))

    @property
    def clusters(self) -> float:
        return self.clusters_of_source * self._groups

    @property
    def steps(self) -> int:
        train = self.config.train
        return train.steps or (train.epochs or 1) * math.ceil(self.workload.rows / self.config.batches.size)

    def work(self, stage: str) -> float:
        """Return the work that the stage's time follows: characters, FLOP, rows, tokens or FLOP, bytes."""
        rows, trained_rows = self.workload.rows, self.steps * self.config.batches.size
        if stage == "ingest":
            return rows * self.workload.characters
        if stage == "embed":
            longest = self.config.embed.max_tokens or 512
            return self._forward(self.surrogate, self._tokens(longest, longest)) * rows
        if stage == "cluster":
            return float(rows)
        if stage == "score":
            return self._teacher_flops()
        if stage == "evaluate":
            return float(self.workload.evaluation_bytes)
        # Of a static encoder, a step moves rows of the token table.
        if self._trained_kind == "static":
            return self._trained_tokens * trained_rows
        return _TRAINING * self.trained.passed(self._trained_tokens, len(self._images)) * trained_rows

    def _forward(self, shape: Shape, tokens: float) -> float:
        """Return the work of a pair with so many tokens of text: FLOP, or the tokens themselves of a static encoder,
        which has no arithmetic to speak of."""
        return tokens if shape.static else _FORWARD * shape.passed(tokens, len(self._images))

    @property
    def _trained_kind(self) -> str:
        """Kind of the encoder that is trained: a static one may be made of a transformer's token vectors."""
        return "static" if self.config.train.encoder == "static" else self.trained.kind

    def _teacher_flops(self) -> float:
        """Return the FLOP of the teacher; hard negatives of the corpus are not counted."""
        assert self.teacher is not None
        score, rows = self.config.score, self.workload.rows
        longest = score.max_tokens or 512
        tokens = self._tokens(longest, longest)
        if not self.teacher.reads_pairs:
            return self._forward(self.teacher.shape, tokens) * rows
        pairs = rows * (1 + min(score.nearest, self._cluster_rows - 1))
        return self._forward(self.teacher.shape, min(longest, tokens)) * pairs

    @property
    def _cluster_rows(self) -> float:
        return max(1.0, self.workload.rows / self.clusters)

    @property
    def _window_rows(self) -> float:
        """Rows among which `score` looks for the nearest documents: a cluster, or an even part of a large one."""
        return self._cluster_rows / math.ceil(self._cluster_rows / self.config.score.window)

    def _nearest_flops(self) -> float:
        searched = self._window_rows if self.config.score.nearest else 0.0
        return 2.0 * self.surrogate.hidden * self.workload.rows * searched

    def clustering_flops(self) -> float:
        """Return the FLOP of k-means on the sample and of the product of every row with the centroids that it is
        compared to; if neighbours are searched, also of every query with the documents of its source."""
        cluster, k = self.config.cluster, self.clusters_of_source
        searches = int(self.config.mine.is_on) + int(cluster.method == "communities")
        searching = 2.0 * self.surrogate.hidden * searches * self.workload.rows * self._searched_rows
        if k <= 1 or cluster.method == "communities":
            return searching
        compared = k if k <= _FLAT_CLUSTERS else 2 * math.sqrt(k)
        sample = self._sampled_rows
        return searching + 2.0 * self.surrogate.hidden * compared * (self.workload.rows + cluster.iterations * sample)

    @property
    def _sampled_rows(self) -> float:
        """Rows that clusters are fitted to."""
        return min(self.workload.rows, self.clusters * self.config.cluster.sample_per_centroid)

    @property
    def _sample_pieces(self) -> float:
        """Pieces of tasks' files that fits read: each reads a range of sources, from every task."""
        if self.clusters_of_source <= 1:
            return 0.0
        levels = self.config.cluster.levels or (1 if self.clusters_of_source <= _FLAT_CLUSTERS else 2)
        stored = self._sampled_rows * 2.0 * self.surrogate.hidden
        return levels * self._tasks * len(bundle_buckets(np.full(self._groups, stored / self._groups)))

    @property
    def _searched_rows(self) -> float:
        """Documents that a query is scored with: all of its source, or the lists of an approximate index."""
        mine, each = self.config.mine, self.workload.rows / self._groups
        if mine.approximate_above is None or each <= mine.approximate_above:
            return each
        # Two lists for each unit of the square root of the source: first their centroids, then what is in some.
        lists = 2 * math.sqrt(each)
        return min(each, lists + mine.probes * each / lists)

    def workers(self, stage: str) -> int:
        sections = {"ingest": "corpus"}
        workers = getattr(self.config, sections.get(stage, stage)).workers
        # If training's are open, those of a machine without GPUs.
        most = workers[1] if isinstance(workers, tuple) else workers
        return 2 if most is None else most

    def rate_name(self, stage: str) -> str:
        """Return the name of the stage's coefficients."""
        kinds = {"embed": self.surrogate.kind, "train": self._trained_kind, "evaluate": self._trained_kind}
        if self.teacher is not None:
            # The teacher computes what the surrogate does, at its rate.
            kinds["score"] = self.teacher.shape.kind
        name = "embed" if stage == "score" else stage
        return f"{name} {kinds[stage]}" if stage in kinds else name

    def seconds(self, stage: str, coefficients: Coefficients) -> float:
        """Return the stage's wall time."""
        workers, name, work = self.workers(stage), self.rate_name(stage), self.work(stage)
        alone = coefficients.fixed[name] + coefficients.serial.get(name, 0.0) * work
        shared = work / coefficients.rate[name] + self.product_flops(stage) / coefficients.matrix_flops
        return alone + shared / workers

    def product_flops(self, stage: str) -> float:
        """Return the FLOP of the stage's matrix products beside what its rate counts."""
        products = {"cluster": self.clustering_flops, "score": self._nearest_flops, "evaluate": self._search_flops}
        return products[stage]() if stage in products else 0.0

    def _search_flops(self) -> float:
        models = sum(name != BM25 for name in self.config.evaluate.models)
        documents = self.workload.evaluation_bytes / (self.workload.document_characters + RECORD_CHARACTERS)
        return 2.0 * self.trained.hidden * models * self.workload.evaluation_queries * documents

    def estimate(self, coefficients: Coefficients, prices: PricesConfig, on_gpu: bool = False) -> list[StageEstimate]:
        """Return one estimate per stage; on_gpu: embed, score, train and evaluate have GPUs."""
        return [self._stage(stage, coefficients, prices, on_gpu) for stage in self.stages]

    def _stage(self, stage: str, coefficients: Coefficients, prices: PricesConfig, on_gpu: bool) -> StageEstimate:
        workers, seconds = self.workers(stage), self.seconds(stage, coefficients)
        objects, stored, puts, gets = self._storage()[stage]
        worker_bytes, driver_bytes = self._memory()[stage]
        gpu = on_gpu and stage in ("embed", "score", "train", "evaluate")
        # Bytes read are not modelled: a bucket in the workers' region charges none.
        cost = prices.of(seconds * workers, gpu=gpu, reads=gets, writes=puts) if prices.known else None
        worker_hours = seconds * workers / 3600
        return StageEstimate(
            stage=stage,
            workers=workers,
            seconds=seconds,
            worker_hours=worker_hours,
            gpu_hours=worker_hours if gpu else 0.0,
            cost=cost,
            worker_bytes=_PROCESS_BYTES + worker_bytes,
            driver_bytes=driver_bytes,
            objects=round(objects),
            stored_bytes=stored,
            puts=round(puts),
            gets=round(gets),
        )

    def _storage(self) -> dict[str, tuple[float, float, float, float]]:
        """Return (objects that stay, their bytes, PUT requests, GET requests) by stage; every unit puts a receipt."""
        units, buckets, train = self.units, self.buckets, self.config.train
        reads = max(1, math.ceil(self.workload.input_bytes / self.config.corpus.unit_bytes))
        parts = max(1, math.ceil(self.corpus_bytes / self.config.corpus.part_bytes))
        vectors = self.workload.rows * 4.0 * self.surrogate.hidden
        if self.config.embed.model == CHARACTER_NGRAMS:
            # Kept beside them: a weight of each column and its vector, as float32.
            vectors += 4.0 * self.surrogate.vocabulary * (1 + self.surrogate.hidden)
        # Parameters and two moments, in files of at most a gibibyte.
        checkpoint, files = 12.0 * self._parameters, 2 * max(1, math.ceil(6.0 * self._parameters / 2**30))
        checkpoints = self.steps / (train.checkpoint_every or max(1, self.steps // 10))
        # A batch reads whole runs; tokens and vectors lie apart.
        files_of_a_run = 1 if train.mask.surrogate_margin is None else 2
        if self.config.batches.largest_super_batch > 1:
            # Every worker reads the vectors of all rows, and its rows lie in all runs.
            files_of_a_run = 2 * self.workers("train")
        runs = self.steps * self.config.batches.size / self.config.cluster.run_rows
        # Buckets, and fits, look themselves up in every task's file, then read their piece of it.
        pieces = self._tasks * buckets
        return {
            "ingest": (parts, self.corpus_bytes, 2 * reads + 2 * parts + 1, reads + reads * parts),
            "embed": (units, vectors, 2 * units + 1, 3 * units),
            "cluster": (
                3 * buckets + 2,
                self.training_bytes + self.corpus_bytes,
                4 * units + 4 * buckets + 4,
                6 * units + 2 * (pieces + self._sample_pieces),
            ),
            "score": self._scoring(),
            "train": (2 * files + 5, 2 * checkpoint, checkpoints * (files + 2), runs * files_of_a_run),
            "evaluate": self._searching(),
        }

    @property
    def _scored_rows(self) -> float:
        """Rows of a work item of `score`: as many windows as it holds whole, one at least."""
        return self._window_rows * max(1, _SCORED_ROWS // self._window_rows)

    def _scoring(self) -> tuple[float, float, float, float]:
        """Return what `_storage` does for `score`, whose units write scores and a table of their runs."""
        units = math.ceil(self.workload.rows / self._scored_rows)
        # A score and a hash for each document, and some bytes of a row's share in its run.
        each = 24 + 12 * min(self.config.score.nearest, self._cluster_rows - 1)
        return 2 * units, self.workload.rows * each, 3 * units + 1, 4 * units

    def _searching(self) -> tuple[float, float, float, float]:
        """Return what `_storage` does for `evaluate`, whose items leave candidates that the driver merges."""
        evaluate = self.config.evaluate
        lexical = evaluate.models.count(BM25)
        models = len(evaluate.models)
        ranges = math.ceil(self.workload.evaluation_bytes / evaluate.unit_bytes)
        of_item, block = search_items(ranges, evaluate.top_k)
        items, blocks = math.ceil(ranges / of_item), math.ceil(max(1, self.workload.evaluation_queries) / block)
        candidates = items * (models - lexical) + lexical
        # Run file and scores of each model and block of queries.
        stay = 2 * models * blocks + 1
        line = 60.0 * models * evaluate.top_k * self.workload.evaluation_queries
        return stay, line, candidates + items + lexical + stay, 2 * ranges * (1 + lexical) + blocks * candidates

    def _memory(self) -> dict[str, tuple[float, float]]:
        """Return (bytes of one worker beside its process, bytes on the driver) by stage."""
        config, units = self.config, self.units
        text = config.corpus.row_group_rows * self.workload.characters
        vectors = config.corpus.row_group_rows * 8.0 * self.surrogate.hidden
        of_task = self._task_rows * (3 * self.workload.characters + 16.0 * self.surrogate.hidden)
        activations = 20.0 * config.embed.batch_tokens * self.surrogate.hidden
        centroids = 4.0 * self.clusters * self.surrogate.hidden
        # Unset, training takes 2.5 GiB on a CPU.
        activations_of_step = config.train.activation_bytes or 5 * 2**29
        # Weights, gradients and two moments in float32.
        state = 16.0 * self._parameters + activations_of_step + config.batches.prefetch_bytes
        if config.batches.largest_super_batch > 1:
            # Of all its rows two vectors, as they are stored and in float32.
            state += 12.0 * self.surrogate.hidden * config.batches.largest_super_batch * config.batches.size
        return {
            "ingest": (5.0 * max(config.corpus.unit_bytes, config.corpus.part_bytes), _RECEIPT_BYTES * units / 4),
            "embed": (self._weights(self.surrogate) + activations + 3 * text + vectors, _RECEIPT_BYTES * units),
            "cluster": (
                max(centroids + of_task, 3.0 * config.cluster.shard_bytes),
                3.0 * _RECEIPT_BYTES * self._tasks,
            ),
            "score": self._scoring_memory(),
            "train": (state, _INDEX_BYTES * self.clusters),
            "evaluate": (self._weights(self.trained) + 3.0 * config.evaluate.unit_bytes, 0.0),
        }

    def _scoring_memory(self) -> tuple[float, float]:
        """Return what `_memory` does for `score`: texts of a unit, its vectors by both models, and the teacher."""
        if self.teacher is None:
            return 0.0, 0.0
        # At most: a unit may be one window, the largest there is.
        largest = max(_SCORED_ROWS, min(self._cluster_rows, self.config.score.window))
        rows, shape = min(self.workload.rows, largest), self.teacher.shape
        vectors = 8.0 * self.surrogate.hidden + (0.0 if self.teacher.reads_pairs else 8.0 * shape.hidden)
        activations = 20.0 * self.config.score.batch_tokens * shape.hidden
        worker = self._weights(shape) + activations + rows * (3 * self.workload.characters + vectors)
        return worker, _INDEX_BYTES * self.clusters + _RECEIPT_BYTES * self.workload.rows / self._scored_rows

    @staticmethod
    def _weights(shape: Shape) -> float:
        return 4.0 * shape.parameters

    @property
    def _groups(self) -> int:
        return 1 if self.config.cluster.scope == "corpus" else max(1, self.workload.sources)

    @property
    def _images(self) -> list[Literal["query", "document"]]:
        return self.config.corpus.columns.images

    def _tokens(self, longest_query: int, longest_document: int) -> float:
        return self.workload.tokens(longest_query, longest_document, self._images)

    @property
    def _trained_tokens(self) -> float:
        return self._tokens(self.config.train.max_query_tokens, self.config.train.max_document_tokens)

    @property
    def _parameters(self) -> float:
        return self.trained.table if self.config.train.encoder == "static" else self.trained.parameters

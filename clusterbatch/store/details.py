"""Types of the `details` in manifests, receipts and parts, so that type checkers know every key and its value.

A key that is NotRequired is missing in some artifacts, mostly in those of earlier versions of this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, TypeVar, cast

from clusterbatch.store.artifact import Manifest, Part, Receipt

_Details = TypeVar("_Details", bound=Mapping[str, Any])


def details_of(described: Manifest | Receipt | Part, kind: type[_Details]) -> _Details:
    """Return the details as one of the types below; nothing is checked or copied."""
    return cast(_Details, described.details)


def has_vectors(embeddings: Manifest) -> bool:
    """Return whether vectors are stored; otherwise readers embed rows themselves."""
    return details_of(embeddings, EmbeddingsDetails).get("persisted", True)


def given_dimensions(corpus: Manifest) -> int | None:
    """Return the length of the vectors that came with the rows of a corpus; None if none did."""
    return details_of(corpus, CorpusDetails).get("dimensions")


class SampleDetails(TypedDict):
    """Details of the sample that docstrings:// writes."""

    # Pairs by source.
    sources: dict[str, int]
    # Of the collection to test on.
    queries: int
    documents: int


class CorpusDetails(TypedDict):
    """Details of a corpus, or of a comparison's sample of one; numbers are of all its versions."""

    # Rows by source.
    sources: dict[str, int]
    # Rejected rows by reason, the most frequent first.
    rejects: dict[str, int]
    # Length of the vectors that came with the rows; None if none did.
    dimensions: NotRequired[int | None]
    # The others are missing in samples. Input files, and their bytes.
    files: NotRequired[int]
    input_bytes: NotRequired[int]
    # Texts that were cut to the longest allowed.
    cut_texts: NotRequired[int]
    # Fingerprint of the test collections that the corpus must not contain.
    tests: NotRequired[str]


class EmbeddingsDetails(TypedDict):
    """Details of one generation's embeddings."""

    # Fingerprint of the model's files, the name of a surrogate, or that the vectors were imported.
    model: str
    # If false, there are no vectors: readers embed rows themselves.
    persisted: NotRequired[bool]
    # None if there was nothing to embed.
    dimensions: int | None
    # Rows and tokens that this version embedded.
    rows: NotRequired[int]
    tokens: int
    # Share of tokens that the model does not know, by source.
    unknown_share: NotRequired[dict[str, float]]
    # Seconds of all workers by step: prepare, encode, write.
    seconds: NotRequired[dict[str, float]]


class EmbeddedUnit(TypedDict):
    """Details of the receipt of an embedded unit; of a trial, which embeds a sample, the first two."""

    dimensions: int
    # Unknown tokens and tokens by source.
    unknown: dict[str, list[int]]
    tokens: int
    # By step: prepare, encode, write.
    seconds: dict[str, float]


class FitPart(TypedDict):
    """Details of the clusters of one cell or partition, or of the projection in front of them.

    A part that holds those of several has them in a list `cells`, beside their common `content` and `level`.
    """

    # labels: of the user's own clusters, which have no levels.
    content: Literal["centroids", "projection", "labels"]
    # Name of the partition. The key is older than that word.
    group: str
    level: NotRequired[int]
    # Number of the coarse cluster that the cell is.
    coarse: NotRequired[int]
    # Cosine below which rows are set aside.
    outlier_below: NotRequired[float]
    # Of the cell's rows, by clustering.outliers; missing without outliers, or if the cell has no rows.
    low_cosines: NotRequired[list[float]]
    # Missing if the cell has no rows.
    mean_cosine: NotRequired[float]
    rounds: NotRequired[int]
    # Of the part, if it holds several.
    rows: NotRequired[int]


class MinedDetails(TypedDict):
    """Details of mined negatives, and of the receipt of each block of queries."""

    # Negatives found.
    negatives: int
    # Rows whose own document is not among the nearest `mine.consistency`.
    inconsistent: int
    # Rows whose own document is the nearest.
    first: int


class ShardLayout(TypedDict):
    """Fields of shards.layout.ShardSchema."""

    vocabulary: int
    run_rows: int
    surrogate_dimensions: int | None
    surrogate: NotRequired[Literal["float16", "int8"]]
    negatives: bool
    weight: bool
    images: NotRequired[Sequence[str]]
    margins: NotRequired[bool]
    score: NotRequired[bool]
    negative_scores: NotRequired[bool]
    duplicates: NotRequired[bool]


class SemanticDuplicates(TypedDict):
    """Semantic duplicates of one source: groups of two rows or more, rows in them, pairs of near rows, dropped rows."""

    groups: int
    rows: int
    pairs: int
    dropped: int


class ScoresDetails(TypedDict):
    """Details of a teacher's scores."""

    # Fingerprint of the teacher's files.
    teacher: str
    kind: Literal["cross-encoder", "embedding model"]
    # Whether rows have hard negatives.
    negatives: bool
    # Documents scored beside the rows' own, over all rows, and those that score above the row's own.
    candidates: int
    above: int


class ScoredUnit(TypedDict):
    """Details of the receipt of a scored unit."""

    candidates: int
    above: int
    # Texts, or pairs of them, that went through the teacher.
    encoded: int


class ReducedBucket(TypedDict):
    """Details of the receipt of a bucket that became shards."""

    # Entries of the index, shards numbered inside the bucket.
    pieces: list[dict[str, Any]]
    # Fields of the part with facts about the bucket's clusters.
    facts: dict[str, Any]
    # Sum and number of the squared errors of the stored vectors' cosines.
    surrogate_errors: tuple[float, int]
    # By source; only with `cluster.duplicates`.
    duplicates: NotRequired[dict[str, SemanticDuplicates]]
    # Rows of shards.semantic_duplicates.EXAMPLE.
    duplicate_examples: NotRequired[list[dict[str, Any]]]


class SourceClusters(TypedDict):
    """Sizes of one source's clusters; those of largest, smallest and median are in rows."""

    rows: int
    clusters: int
    largest: int
    smallest: int
    median: float
    # Gini coefficient of the sizes.
    gini: float
    # Clusters by the power of two that their rows reach.
    histogram: dict[str, int]
    # None if rows were not clustered by vectors.
    mean_cosine: float | None
    # Clusters with a remark in their statistics.
    remarks: int


class ClustersDetails(TypedDict):
    """Details of one generation's shards and clusters."""

    layout: ShardLayout
    # Settings that the stored tokens follow from, by configuration key.
    tokens: NotRequired[dict[str, Any]]
    # Generation of the embeddings that were clustered; if missing, the clusters' own.
    vectors: NotRequired[int]
    shards: int
    sources: dict[str, SourceClusters]
    # clustering.model.FittedClusters.describe
    fit: dict[str, dict[str, Any]]
    # Root mean square error of the stored vectors' cosines; None if no vectors are stored.
    surrogate_cosine_error: NotRequired[float | None]
    # By source; only with `cluster.duplicates`.
    duplicates: NotRequired[dict[str, SemanticDuplicates]]


class TrainDetails(TypedDict):
    """Details of one generation's training."""

    steps: int
    # Steps of the generations that this one continues from.
    steps_before: NotRequired[int]
    steps_per_epoch: int
    # Address of the model.
    model: str
    # batches.plan_report.plan_report
    plan: dict[str, Any]


class EvaluationDetails(TypedDict):
    """Details of an evaluation on collections."""

    # Rows {collection, model, metric, value, queries, documents}.
    table: list[dict[str, Any]]
    # By collection: queries, documents, judged_documents_missing.
    collections: dict[str, dict[str, int]]
    # Labels of the models.
    models: list[str]
    # Number types that models computed in, mostly one; absent from older evaluations.
    dtypes: NotRequired[list[str]]


class MtebDetails(TypedDict):
    """Details of an evaluation on MTEB tasks."""

    # Rows {task, model, metric, value}.
    table: list[dict[str, Any]]


class StageSeconds(TypedDict):
    """Seconds of all workers of the stages that the arms of a comparison share; all but `embed` by layout."""

    embed: float
    mine: dict[str, float]
    cluster: dict[str, float]
    score: NotRequired[dict[str, float]]


class StageWallSeconds(TypedDict):
    """The same as wall times, in comparisons of earlier versions."""

    embed: float
    cluster: dict[str, float]


class StageTraffic(TypedDict):
    """Fields of store.traffic.Traffic of the shared stages; all but `embed` by layout."""

    embed: dict[str, int]
    mine: dict[str, dict[str, int]]
    cluster: dict[str, dict[str, int]]
    score: NotRequired[dict[str, dict[str, int]]]


class SharedCosts(TypedDict):
    """Seconds and traffic of the shared stages. seconds: only, and then in place of worker_seconds, in earlier ones."""

    worker_seconds: NotRequired[StageSeconds]
    seconds: NotRequired[StageWallSeconds]
    traffic: StageTraffic
    # None if it was left to the machine.
    embed_device: NotRequired[str | None]


class TrialDetails(TypedDict):
    """One trial of a comparison; `steps` is 0 for the untrained model."""

    trial: str
    arm: str
    seed: int
    steps: int
    pairs: int
    # cpu or cuda.
    device: str
    seconds_training: float
    seconds_measuring: float
    # Rows {step, collection, metric, value}.
    curve: list[dict[str, Any]]
    # [step, loss]
    losses: list[list[float]]
    # Shown on the progress line.
    progress: NotRequired[str]
    # Fields of store.traffic.Traffic; only in the manifest.
    traffic: NotRequired[dict[str, int]]


class ArmDetails(TypedDict):
    """One arm of a comparison."""

    stratify: str
    # Pairs a step.
    batch: int
    steps_per_epoch: int
    # Mean share of a batch from its main cluster.
    purity: float
    # None if the clusters keep no vectors.
    hardness: float | None
    clusters_per_batch: int | None
    # Name of the clusters that its batches are drawn from.
    layout: str
    uses_embeddings: bool
    uses_clusters: bool
    # Missing in comparisons of earlier versions.
    uses_scores: NotRequired[bool]
    # Configuration that differs from the job's.
    changes: dict[str, Any]


class ComparisonDetails(SharedCosts):
    """Details of a comparison."""

    # By number.
    trials: dict[str, TrialDetails]
    # Numbers of the trials that the verdict rests on.
    main: list[int]
    steps: int
    arms: dict[str, ArmDetails]
    # By arm: learning_rate, temperature.
    chosen: dict[str, dict[str, float]]
    # Whether these were chosen by trials of their own.
    swept: bool
    # Names of the test collections.
    collections: list[str]
    # Names of arms whose batches were the same, two or more together. Missing in comparisons of earlier versions.
    same_batches: NotRequired[list[list[str]]]


class StreamRun(TypedDict):
    """All months under one policy, with one seed."""

    policy: str
    seed: int
    on_gpu: NotRequired[bool]
    # Rows of experiments.tune.refresh_interval, one a month.
    months: list[dict[str, Any]]


class StreamDetails(TypedDict):
    """Details of a study of refresh intervals."""

    # One per receipt: all policies of the first seed, then those of the next.
    runs: list[StreamRun]

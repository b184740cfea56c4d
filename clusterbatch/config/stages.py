"""Sections `corpus`, `embed`, `mine` and `cluster`: the stages that prepare training data."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clusterbatch.config.base import Device, ModelName, Section, Seed, added, operational


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_off(value: object) -> object:
    # In YAML, and so on the command line, a bare `off` is false.
    return "off" if value is False else value


Paths = Annotated[list[str], BeforeValidator(_as_list)]

# The built-in sample: pairs mined from the docstrings of the installed Python packages.
DOCSTRINGS = "docstrings://"


class ColumnsConfig(Section):
    """Names of the input's columns."""

    query: str = "query"
    """Column with the query's text."""
    document: str = "document"
    """Column with the document's text."""
    source: str | None = None
    """Column with the name of the row's source. Unset: a column named `source` if the file has one, otherwise the
    file's own name. A column named here must exist."""
    pair_id: str | None = None
    """Column with a stable identifier of the pair. Unset: a hash of the pair's content."""
    negatives: Paths = []
    """Texts that do not answer the query: list columns, or several columns with one text each."""
    weight: str | None = None
    """Column with the weight of the pair in the loss. Unset: all pairs weigh 1."""
    group: str | None = None
    """Column with the user's own segment of a row, for example a customer group or a category."""
    document_id: str | None = added(None)
    """Column with the document that a row's text is a part of, for example of a book cut into chunks. Chunks of one
    document of a source are no negatives of each other (`train.mask.same_document`), and are held out together. Every
    row must have one."""
    score: str | None = added(None)
    """Column with a score of the pair by any judge, for example a cross-encoder. No row is left out for it:
    `train.filter` chooses at training. A row may have none."""
    negative_scores: Paths = added([])
    """Scores of the negatives by the same judge: list columns, or several columns with one number each, in the order
    of `negatives`. A negative may have none."""
    vector: str | None = None
    """Column with existing vectors of any length; nothing is embedded then. It holds the document's vector, or the
    row's if there is no `query_vector`."""
    query_vector: str | None = None
    """Column with existing vectors of the queries; needs `vector`."""
    images: list[Literal["query", "document"]] = added([])
    """Sides (query, document) that are images: bytes, data URIs, or addresses (local paths or s3://). The models of
    `embed` and `train` must have an image tower."""

    @model_validator(mode="after")
    def _consistent(self) -> ColumnsConfig:
        if self.negative_scores and not self.negatives:
            raise ValueError("negative_scores are those of negatives; name their columns too")
        if self.query_vector is not None and self.vector is None:
            raise ValueError("query_vector needs vector, the document's")
        if "document" in self.images and self.negatives:
            raise ValueError("negatives that are images are not supported (mine.negatives finds some)")
        return self


class CorpusConfig(Section):
    """Input files, the rules for a valid pair, and the sizes in which the corpus is written."""

    paths: Paths = []
    """Files, folders or glob patterns, local or s3://; `docstrings://` is the built-in sample."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the input's columns."""
    source: str | None = None
    """One source name for all rows; overrides `columns.source`."""
    split: str | None = None
    """Judgements of a BEIR folder or of MS MARCO's files to use as pairs, for example `train` for qrels/train.tsv or
    qrels.train.tsv. Unset: the training split if there is one, otherwise all splits."""
    on_error: Literal["fail", "reject"] = "fail"
    """Treatment of a file that cannot be read: `fail` stops with one line that names it, `reject` lists it among the
    rejects and continues. A file of a collection (BEIR, MS MARCO) always stops the run, because pairs are joined
    from all of its files."""
    encoding: str | None = None
    """Encoding of text files. Unset: UTF-8, or CP932 (Shift_JIS) if the text is Japanese and not UTF-8; collections
    (BEIR, MS MARCO) are read as UTF-8."""
    tsv_quotes: bool = added(False)
    """Allow quoted fields in TSV files, as pandas and spreadsheets write fields with line breaks, tabs or
    quotes. Otherwise a quote is a character like any other."""
    max_characters: int = Field(20_000, ge=16)
    """Length in characters above which a text counts as too long."""
    too_long: Literal["cut", "reject"] = "cut"
    """Treatment of a text that is too long."""
    decontaminate: Annotated[Literal["near", "exact", "off"], BeforeValidator(_as_off)] = "near"
    """Sets aside pairs that copy a test query of `evaluate.path`, or a document that answers one: `near` also finds
    near copies (estimated Jaccard similarity of word triples), `exact` only exact copies, `off` none."""
    near_duplicates: Literal["keep", "set_aside"] = "keep"
    """Treatment of a pair whose query and document both nearly equal those of an earlier pair: `set_aside` moves it
    to corpus/aside/ with its reason, `keep` treats it like any other. The search takes several times as long as the
    rest of ingest."""
    near_threshold: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity from which two texts count as near copies, here and against test collections."""
    row_group_rows: int = Field(1024, ge=64)
    """Rows of one row group, the unit of work of later stages."""
    part_bytes: int = Field(64 * 2**20, ge=2**16)
    """Approximate size in bytes of one file of the corpus; it decides how many buckets rows are sorted into."""
    unit_bytes: int = Field(32 * 2**20, ge=2**12)
    """Bytes of input that one unit of work reads."""
    sample_pairs: int = Field(18_000, ge=100)
    """Number of pairs of the built-in sample."""
    sample_seed: Seed = 0
    """Seed of the built-in sample."""
    workers: int = operational(2, ge=1)
    """Processes that read and write, one CPU core each."""
    delete: Paths = operational([])
    """Files of pair_ids, one per line, whose rows `ingest --append` removes. Each file is applied once, to the rows
    the corpus holds at that time."""
    drop_sources: Paths = operational([])
    """Sources that `ingest --append` removes from the corpus."""

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        if encoding is None:
            return None
        try:
            name = codecs.lookup(encoding).name
            # Some codecs are no encodings of texts: base64, rot13.
            "a".encode(name)
        except (LookupError, UnicodeError):
            raise ValueError(f"unknown encoding {encoding!r}, expected for example utf-8 or cp932") from None
        # Files that are called Shift_JIS mostly have Microsoft's additions.
        return "cp932" if name == "shift_jis" else name


# The surrogate that needs no model: TF-IDF of character n-grams, reduced by a truncated SVD fitted to the corpus.
CHARACTER_NGRAMS = "char-ngrams"


class EmbedConfig(Section):
    """The surrogate: the existing embedding model whose vectors decide clusters and masks."""

    model: ModelName = "all-MiniLM-L6-v2"
    """The embedding model: a local folder, an s3:// folder, a name on the hub, or `char-ngrams`, which needs no model.
    """
    max_tokens: int | None = Field(256, ge=2)
    """Length in tokens to which texts are cut. Unset: the limit in the model's own files."""
    query_prompt: str | None = None
    """Text put before every query. Unset: the prompt in the model's own files."""
    document_prompt: str | None = None
    """Text put before every document. Unset: the prompt in the model's own files."""
    batch_tokens: int = Field(2048, ge=64)
    """Tokens (padding included) that go through the encoder at once. CPUs are fastest while activations stay in their
    caches; a GPU wants as many as its memory holds (65,536 for MiniLM in 24 GB)."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Number type of the computation. `auto`: bfloat16 if the hardware multiplies it, otherwise float32. `int8`:
    products of 8-bit integers, for models built like BERT on CPUs with VNNI instructions; faster than float32, and less
    exact."""
    persist: bool = True
    """Store vectors. If false, each later pass that needs them computes them again."""
    device: Device = operational("auto")
    """`cpu`, `cuda`, or `auto`: the cluster's GPUs if it has any."""
    workers: int = operational(2, ge=1)
    """Processes that embed."""
    cpus_per_worker: float = operational(0.9, gt=0)
    """CPU cores that each worker asks for."""
    gpus_per_worker: float | None = operational(None, gt=0)
    """GPUs that each worker asks for. Unset: one, or a share of one if there are fewer GPUs than workers."""
    tokenizers: int | None = operational(None, ge=0)
    """Processes that read and tokenise ahead of the workers. Unset: none on CPUs, where workers spend a few per cent
    of their time on it; eight for each GPU worker."""


class MineConfig(Section):
    """Search of every query among the documents of its source. Off unless negatives or consistency are set."""

    negatives: int = Field(0, ge=0)
    """Hard negatives to find for each row, appended to those the corpus has; fewer if not enough candidates pass the
    filters."""
    first: int = Field(5, ge=0)
    """First rank (from 0) to take negatives from, in order of score and without documents known to answer the query.
    The highest ranks are often answers that nobody judged."""
    last: int = Field(50, ge=1)
    """Rank at which the range of candidates ends."""
    pick: Literal["hardest", "random", "balanced"] = "random"
    """How negatives are chosen from the range: `hardest` takes the first ranks, `random` any (ANCE, Xiong 2020),
    `balanced` spreads them evenly over the margins to the positive's score (TAS-B, Hofstaetter 2021)."""
    most_of_positive: float | None = Field(0.95, gt=0, le=1)
    """Skips candidates that score above this share of the positive's score (NV-Retriever, Moreira 2024). Unset: no
    limit."""
    margin: float | None = Field(None, ge=0)
    """Skips candidates that score less than this margin below the positive. Unset: no limit."""
    margins: bool = added(False)
    """Stores how far each mined negative scores below its row's own document: the teacher of `train.margin_mse`."""
    consistency: int | None = Field(None, ge=1)
    """Keeps a pair only if its document is among this many best documents of its query (Nomic, Nussbaum 2024: 2).
    Unset: all pairs are kept."""
    approximate_above: int | None = added(None, ge=0)
    """Sources with more rows than this are searched approximately, because the work of an exact search grows with the
    square of the rows. A worker then holds the vectors of one source's documents in memory, 2 bytes per dimension, and
    their texts in a temporary file (in `TMPDIR`). Unset: every search is exact."""
    probes: int = added(32, ge=1)
    """Lists of the approximate index that each query visits; the index has 2 lists per unit of the square root of the
    source's rows."""
    seed: Seed = 0
    """Seed of the random choice among ranks."""
    workers: int = operational(2, ge=1)
    """Processes that search."""
    cpus_per_worker: float = operational(0.9, gt=0)
    """CPU cores that each worker asks for."""

    @model_validator(mode="after")
    def _consistent(self) -> MineConfig:
        if self.last - self.first < max(1, self.negatives):
            raise ValueError("first and last: fewer ranks between them than negatives")
        if self.margins and not self.negatives:
            raise ValueError("margins are those of negatives; set negatives")
        return self

    @property
    def is_on(self) -> bool:
        return self.negatives > 0 or self.consistency is not None


class ScoreConfig(Section):
    """A teacher's scores of pairs, of hard negatives, and of documents that may share a batch with a query.

    Off unless `teacher` is set. Training reads them for masks (`train.mask.teacher_margin`) and for distillation
    (`train.teacher_kl`, `train.margin_mse`).
    """

    teacher: ModelName | None = None
    """The teacher, a cross-encoder with one label or a second embedding model: a local folder, an s3:// folder, or a
    name on the hub. Unset: nothing is scored."""
    nearest: int = Field(10, ge=0)
    """Documents of its own cluster that are scored for each query: those that the surrogate finds nearest, without
    documents known to answer it. Hard negatives are always scored."""
    window: int = Field(16_384, ge=64)
    """Rows of a cluster that are searched together. A larger cluster is cut into windows of its rows, which lie in
    random order; the work per row grows with the window, and not with the corpus."""
    max_tokens: int | None = Field(512, ge=8)
    """Length in tokens to which a text is cut, for a cross-encoder a query and a document together; the model's own
    limit applies if it is shorter. Unset: the model's own limit."""
    batch_tokens: int = Field(2048, ge=64)
    """Tokens (padding included) that go through the teacher at once."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Number type of the computation, as in `embed`; a cross-encoder has no int8."""
    device: Device = operational("auto")
    """`cpu`, `cuda`, or `auto`: the cluster's GPUs if it has any."""
    workers: int = operational(2, ge=1)
    """Processes that score."""
    cpus_per_worker: float = operational(0.9, gt=0)
    """CPU cores that each worker asks for."""
    gpus_per_worker: float | None = operational(None, gt=0)
    """GPUs that each worker asks for. Unset: one, or a share of one if there are fewer GPUs than workers."""

    @property
    def is_on(self) -> bool:
        return self.teacher is not None


class DuplicatesConfig(Section):
    """Rows of one cluster that say nearly the same, by the surrogate (SemDeDup). Off unless a threshold is set."""

    threshold: float | None = Field(None, gt=0, le=1)
    """Cosine of two rows' queries, or of their documents, at which they count as semantic duplicates. Rows that are
    duplicates of one row are one group. Unset: none are looked for."""
    action: Literal["mask", "apart", "drop"] = "mask"
    """`mask`: the loss ignores them as negatives of each other (`train.mask.semantic_duplicates`). `apart`: in addition
    batches have one row of a group at most; only the second (third, ...) rows of a source that do not fill a batch may
    meet the first, and rows beyond the eighth of a group each other. `drop`: a row that is near to an earlier one in
    query and document is set aside, counted and kept beside the outliers; nothing is masked."""

    @model_validator(mode="after")
    def _threshold(self) -> DuplicatesConfig:
        if self.action != "mask" and self.threshold is None:
            raise ValueError(f"action: {self.action} needs a threshold, without which no duplicates are looked for")
        return self


class ClusterConfig(Section):
    """Clusters of each source, and the shards that training reads."""

    method: Literal["kmeans", "communities"] = added("kmeans")
    """`kmeans`: each row belongs to its nearest centroid. `communities`: equal groups of `mean_size` mutual
    neighbours, meant to be small; each source is searched exactly, in time that grows with the square of its rows,
    and one worker cuts its graph."""
    neighbour_ranks: tuple[int, int] = added((30, 130))
    """Communities only: ranks (from 0) whose rows count as a query's neighbours, in order of score and without
    documents known to answer it. The highest ranks are often answers that nobody judged."""
    features: Literal["query", "document", "both", "both_orders"] = "document"
    """Vectors to cluster. `both`: query and document concatenated; `both_orders`: the fit also sees them swapped."""
    dimensions: int | None = Field(None, ge=2)
    """Number of dimensions to cluster in, by `reduction`. Unset: all."""
    reduction: Literal["pca", "random"] = "pca"
    """How dimensions are reduced: `pca` fitted to the sample, or a `random` projection."""
    scope: Literal["source", "corpus"] = "source"
    """`source` clusters each source separately; `corpus` clusters all sources together, under the name "(all)"."""
    column: Literal["group"] | None = None
    """Cluster by this column of the corpus (`corpus.columns.group`) instead of by vectors."""
    clusters: int | None = Field(None, ge=1)
    """Clusters per source (per corpus with `scope: corpus`), fewer if they would have fewer than 16 rows each. Give
    this or `mean_size`."""
    mean_size: int | None = Field(None, ge=1)
    """Mean rows per cluster. Unset, with `clusters` unset too: four global batches. Sources smaller than one and a
    half such clusters are not split."""
    max_size: int | None = Field(None, ge=2)
    """Clusters with more rows are split into equal parts. Unset: no limit."""
    min_size: int | None = Field(None, ge=2)
    """Clusters with fewer rows are merged with their nearest neighbour. Unset: no limit."""
    balanced: bool = False
    """Aim at clusters of equal size, at some cost in cosine."""
    levels: Literal[1, 2] | None = None
    """2: cluster first into about sqrt(clusters) coarse clusters, then each of those. Unset: 2 above 4,096 clusters."""
    seed: Seed = 0
    """Seed of the sample, of k-means and of the order of rows inside a cluster."""
    iterations: int = Field(4, ge=1)
    """Passes over the sample, at most."""
    restarts: int = Field(1, ge=1)
    """Fits of which the best is kept."""
    sample_per_centroid: int = Field(256, ge=8)
    """Rows of the sample per centroid; each source is sampled with at least 16,384 rows, or all of its rows."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number type of the fit's products; the assignment is always computed in float32. `auto`: bfloat16 if the
    hardware multiplies it."""
    drop_outliers: float | None = Field(None, gt=0, le=0.5)
    """Share of each source's rows to set aside: those farthest from their centroid. Unset: none."""
    duplicates: DuplicatesConfig = added(DuplicatesConfig())
    """Semantic duplicates inside clusters."""
    surrogate: Literal["float16", "int8", "none"] = "float16"
    """How the surrogate's vectors are stored for masks and super-batches: as float16, in 8 bits, or not at all."""
    surrogate_dimensions: int | None = Field(None, ge=8)
    """Dimensions to which stored vectors are reduced. Unset: all."""
    run_rows: int = Field(64, ge=1)
    """Consecutive rows of one cluster that training reads as one block."""
    shard_bytes: int = Field(256 * 2**20, ge=2**16)
    """Approximate bytes of tokens and vectors in one shard."""
    workers: int = operational(2, ge=1)
    """Processes that fit, assign and write shards."""
    device: Device = operational("auto")
    """`cpu`, `cuda`, or `auto`: the cluster's GPUs if it has any."""
    cpus_per_worker: float = operational(0.9, gt=0)
    """CPU cores that each worker asks for."""
    gpus_per_worker: float | None = operational(None, gt=0)
    """GPUs that each worker asks for. Unset: one, or a share of one if there are fewer GPUs than workers."""

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.clusters is not None and self.mean_size is not None:
            raise ValueError("give clusters or mean_size, not both")
        if self.column is not None and self.clusters is not None:
            raise ValueError("give clusters or column, not both")
        if self.min_size and self.max_size and 2 * self.min_size > self.max_size:
            raise ValueError("max_size must be at least twice min_size")
        first, last = self.neighbour_ranks
        if not 0 <= first < last:
            raise ValueError(f"neighbour_ranks: expected [first, last) with 0 <= first < last (got {[first, last]})")
        if self.method == "communities":
            for key in ("column", "levels", "dimensions", "balanced"):
                if getattr(self, key):
                    raise ValueError(f"method: communities has no use for {key}")
        return self

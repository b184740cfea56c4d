"""`cluster`: how the corpus is grouped, and how its shards are laid out.

`corpus`: where the pairs come from and what a valid pair is.

`embed`: the surrogate, the existing model whose vectors decide clusters and masks.

`mine`: hard negatives and consistent pairs, found by searching the surrogate's vectors.
"""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clusterbatch.config.base import ModelName, Section, added, operational


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
    document: str = "document"
    # Unset: a column called `source` where a file has one, else the file's own name. Named here, it must be there.
    source: str | None = None
    pair_id: str | None = None
    # Texts that do not answer the query: list columns, or several columns of one text each.
    negatives: Paths = []
    weight: str | None = None
    # The user's own segment of a row (customer group, category).
    group: str | None = None
    # Vectors that the user has already, of any length: nothing is then embedded. The document's, or the row's where the
    # query has none of its own.
    vector: str | None = None
    query_vector: str | None = None
    # Which of query and document are images: bytes, data URIs, or addresses (local, or s3://). The models of `embed`
    # and `train` must then have towers for both.
    images: list[Literal["query", "document"]] = added([])

    @model_validator(mode="after")
    def _consistent(self) -> ColumnsConfig:
        if self.query_vector is not None and self.vector is None:
            raise ValueError("query_vector needs vector, the document's")
        if "document" in self.images and self.negatives:
            raise ValueError("negatives that are images are not supported (mine.negatives finds some)")
        return self


class CorpusConfig(Section):
    paths: Paths = []
    columns: ColumnsConfig = ColumnsConfig()
    # Overrides `columns.source`: one name for all rows.
    source: str | None = None
    # Which judgements of a BEIR folder or of MS MARCO's files are the pairs: `train` for qrels/train.tsv or
    # qrels.train.tsv. Unset: the training ones, else all there are.
    split: str | None = None
    # A file that cannot be read: stop with one line that names it, or list it among the rejects and go on. One of a
    # collection (BEIR, MS MARCO) always stops: pairs are joined from all of its files.
    on_error: Literal["fail", "reject"] = "fail"
    # Of text files. Unset: UTF-8, or CP932 (Shift_JIS) where the text is not UTF-8 but Japanese; collections (BEIR, MS
    # MARCO) are then UTF-8.
    encoding: str | None = None
    max_characters: int = Field(20_000, ge=16)
    # What happens to a text that is longer.
    too_long: Literal["cut", "reject"] = "cut"
    # Pairs with a copy of a test query of `evaluate.path`, or of a document that answers one, are set aside: also near
    # copies (estimated Jaccard similarity of word triples), only exact ones, or none.
    decontaminate: Annotated[Literal["near", "exact", "off"], BeforeValidator(_as_off)] = "near"
    # Pairs whose query and document are both nearly those of an earlier pair: set aside, into corpus/aside/ with their
    # reason, or kept like any other. Looking for them takes several times as long as the rest of ingest.
    near_duplicates: Literal["keep", "set_aside"] = "keep"
    # The similarity from which texts count as near copies, here and against the test collections.
    near_threshold: float = Field(0.8, gt=0, le=1)
    # Rows that later stages read at once, as one unit of work.
    row_group_rows: int = Field(1024, ge=64)
    # Of a file of the corpus, about: decides into how many buckets rows are sorted.
    part_bytes: int = Field(64 * 2**20, ge=2**16)
    # Bytes of input that one unit of work reads.
    unit_bytes: int = Field(32 * 2**20, ge=2**12)
    # The built-in sample only.
    sample_pairs: int = Field(18_000, ge=100)
    sample_seed: int = 0
    # Processes that read and write, one CPU core each.
    workers: int = operational(2, ge=1)
    # What `ingest --append` takes out again: files of pair_ids, one a line, each applied once, to the rows that the
    # corpus then holds; and sources that the corpus is not to have.
    delete: Paths = operational([])
    drop_sources: Paths = operational([])

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        if encoding is None:
            return None
        try:
            name = codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"unknown encoding {encoding!r}, expected for instance utf-8 or cp932") from None
        # Files that are called Shift_JIS mostly have Microsoft's additions.
        return "cp932" if name == "shift_jis" else name


# The surrogate that needs no model: TF-IDF of character n-grams, reduced by a truncated SVD fitted to the corpus.
CHARACTER_NGRAMS = "char-ngrams"


class EmbedConfig(Section):
    # A folder, an s3:// folder, a name on the hub, or char-ngrams.
    model: ModelName = "all-MiniLM-L6-v2"
    # Longer texts are cut. Unset: what the model's own files say.
    max_tokens: int | None = Field(256, ge=2)
    # Put before every text. Unset: the prompts that the model's own files name.
    query_prompt: str | None = None
    document_prompt: str | None = None
    # Tokens (padding included) that go through the backbone at once. CPUs are fastest while the activations stay in
    # their caches; a GPU wants all that its memory holds (65536 for MiniLM in 24 GB).
    batch_tokens: int = Field(2048, ge=64)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Whether vectors are kept, or computed again in each later pass that needs them.
    persist: bool = True
    # auto: the GPUs of the cluster, where it has any.
    device: str = operational("auto")
    workers: int = operational(2, ge=1)
    # What each worker asks of the cluster. GPUs unset: one; where there are fewer GPUs than workers, they share them.
    cpus_per_worker: float = operational(0.9, gt=0)
    gpus_per_worker: float | None = operational(None, gt=0)
    # Processes that read and tokenise ahead of the workers. Unset: none on CPUs, where workers do it themselves at a
    # few per cent of their time; eight for each GPU worker.
    tokenizers: int | None = operational(None, ge=0)


class MineConfig(Section):
    """Every query is searched among the documents of its source. Off unless negatives or consistency are asked for."""

    # Hard negatives of each row, fewer where not so many pass the filters; appended to those the corpus has.
    negatives: int = Field(0, ge=0)
    # Of the documents in order of their score, without those known to answer the query: the ranks (from 0) that are
    # taken from. The first ones are often answers that nobody judged.
    first: int = Field(5, ge=0)
    last: int = Field(50, ge=1)
    # hardest: the first ones; random: any of the range (ANCE, Xiong 2020); balanced: evenly over the range of margins
    # to the positive's score (TAS-B, Hofstaetter 2021).
    pick: Literal["hardest", "random", "balanced"] = "random"
    # Leaves out what scores above this share of the positive's score (NV-Retriever, Moreira 2024), or less than this
    # margin below it; unset: no limit.
    most_of_positive: float | None = Field(0.95, gt=0, le=1)
    margin: float | None = Field(None, ge=0)
    # Keeps with each mined negative how far it scores below its row's own document: the teacher of train.margin_mse.
    margins: bool = added(False)
    # Keeps a pair only if its document is among so many best ones of its query (Nomic, Nussbaum 2024: 2).
    consistency: int | None = Field(None, ge=1)
    # Sources of more rows than this are searched approximately: the work of an exact search grows with their square.
    # A worker then holds the documents of one source at a time in memory, 2 bytes a dimension. Unset: all exactly.
    approximate_above: int | None = added(None, ge=0)
    # Of the lists that faiss cuts such a source into, 2 for each unit of the root of its rows: how many a query sees.
    probes: int = added(32, ge=1)
    # Of the random choice among ranks.
    seed: int = 0
    # Processes that search, each with so many cores.
    workers: int = operational(2, ge=1)
    cpus_per_worker: float = operational(0.9, gt=0)

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


class ClusterConfig(Section):
    # kmeans: rows nearest one centroid. communities: equal groups of `mean_size` mutual neighbours, meant to be small;
    # each source is searched exactly, in time that grows with the square of its rows, and its graph is one worker's.
    method: Literal["kmeans", "communities"] = added("kmeans")
    # Of the documents in order of their score with a query, without those known to answer it: the ranks (from 0) whose
    # rows are the query's neighbours. The first ones are often answers that nobody judged.
    neighbour_ranks: tuple[int, int] = added((30, 130))
    # Vectors that are clustered. both: query and document side by side; both_orders: the fit also sees them swapped.
    features: Literal["query", "document", "both", "both_orders"] = "document"
    # Fewer dimensions to cluster in: by PCA fitted to the sample, or by a random projection. Unset: all.
    dimensions: int | None = Field(None, ge=2)
    reduction: Literal["pca", "random"] = "pca"
    # corpus: all sources are clustered as one, which is then called "(all)" in place of their names.
    scope: Literal["source", "corpus"] = "source"
    # Cluster by this column of the corpus (corpus.columns.group) instead of by vectors.
    column: Literal["group"] | None = None
    # Clusters per source (per corpus with scope: corpus), fewer where they would have less than 16 rows; or mean_size,
    # and each source's rows decide. Neither: four global batches of rows per cluster. Sources of less than one and a
    # half such clusters are not split.
    clusters: int | None = Field(None, ge=1)
    mean_size: int | None = Field(None, ge=1)
    # Larger clusters are split into equal parts, smaller ones merged with their nearest neighbour.
    max_size: int | None = Field(None, ge=2)
    min_size: int | None = Field(None, ge=2)
    # Clusters of about one size, at some cost in cosine.
    balanced: bool = False
    # 2: first into about sqrt(clusters) coarse clusters, then each of those. Unset: 2 above 4,096 clusters.
    levels: Literal[1, 2] | None = None
    seed: int = 0
    # Passes over the fit's sample, at most, and fits of which the best is kept.
    iterations: int = Field(4, ge=1)
    restarts: int = Field(1, ge=1)
    # Of each source at least 16,384 rows, or all.
    sample_per_centroid: int = Field(256, ge=8)
    # Of the fit's products; the assignment is always in float32. auto: bfloat16 where the hardware multiplies it.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Share of each source's rows to leave out: those farthest from their centroid. They are kept aside.
    drop_outliers: float | None = Field(None, gt=0, le=0.5)
    # How the embedding model's vectors are kept for masks: as they are, in 8 bits, or not at all; and reduced to how
    # many dimensions.
    surrogate: Literal["float16", "int8", "none"] = "float16"
    surrogate_dimensions: int | None = Field(None, ge=8)
    run_rows: int = Field(64, ge=1)
    # Tokens and vectors in one shard, about.
    shard_bytes: int = Field(256 * 2**20, ge=2**16)
    workers: int = operational(2, ge=1)
    device: str = operational("auto")
    # What each worker asks of the cluster. GPUs unset: one; where there are fewer GPUs than workers, they share them.
    cpus_per_worker: float = operational(0.9, gt=0)
    gpus_per_worker: float | None = operational(None, gt=0)

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

"""What the project promises, in figures: name of the figure as a benchmark prints it, and its bound."""

from __future__ import annotations

import operator
from typing import NamedTuple

_COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq}


class Promise(NamedTuple):
    of: str
    """`ratio` (ours / peer) or `value` (ours)."""

    sign: str
    bound: float

    def kept(self, value: float, ratio: float | None) -> bool:
        judged = ratio if self.of == "ratio" else value
        assert judged is not None, "a promise about a ratio needs a peer"
        return bool(_COMPARE[self.sign](judged, self.bound))

    def __str__(self) -> str:
        return f"{self.of} {self.sign} {self.bound:g}"


PROMISES = {
    # The encoder and its stage.
    "embedding, rows/s against SentenceTransformer.encode at its defaults": Promise("ratio", ">=", 4.0),
    "embedding, rows/s against SentenceTransformer.encode at its best batch size": Promise("ratio", ">=", 3.0),
    "embedding, least cosine to SentenceTransformer.encode": Promise("value", ">=", 0.999),
    "embedding on a GPU, tokens/s against SentenceTransformer.encode at its best batch size": Promise(
        "ratio", ">=", 2.0
    ),
    "embedding stage, tokens/s against the encoder alone": Promise("ratio", ">=", 0.9),
    # Clustering.
    "k-means fit, seconds against faiss with 25 iterations": Promise("ratio", "<=", 0.25),
    "k-means fit, mean cosine against faiss with 25 iterations": Promise("ratio", ">=", 0.99),
    "k-means fit, mean cosine against faiss with 10 iterations": Promise("ratio", ">=", 1.0),
    "k-means fit, mean cosine against MiniBatchKMeans": Promise("ratio", ">=", 1.0),
    "k-means fit, seconds against MiniBatchKMeans": Promise("ratio", "<=", 1.0),
    "assignment, GFLOP/s against the product alone": Promise("ratio", ">=", 0.8),
    # Batches and training.
    "training, pairs/s against Sentence Transformers' cached loss": Promise("ratio", ">=", 2.0),
    "training, largest difference of the losses": Promise("value", "<=", 0.01),
    "clustered against random batches, difference of pairs/s": Promise("value", "<=", 0.02),
    "clustered batches, share of time spent waiting for data": Promise("value", "<=", 0.03),
    "loader, share of step time lost": Promise("value", "<=", 0.03),
    "loader, bytes read against bytes of the columns": Promise("ratio", "<=", 1.1),
    "plan, violations of coverage": Promise("value", "==", 0),
    "plan, most repeats of a source against what is allowed": Promise("value", "<=", 1.0),
    "plan, seconds of the report on an epoch": Promise("value", "<=", 10),
    "plan, MiB at the peak": Promise("value", "<=", 1024),
    "gradient, largest error against float64 autograd": Promise("value", "<=", 1e-12),
    "gradient in float32, largest error of a parameter against float64": Promise("value", "<=", 1e-4),
    # Memory that does not grow with the corpus.
    "ingest, peak memory at ten times the rows": Promise("ratio", "<=", 1.15),
    "embed, peak memory at ten times the rows": Promise("ratio", "<=", 1.15),
    "cluster, peak memory at ten times the rows": Promise("ratio", "<=", 1.15),
    # Verdicts of comparisons whose truth is known.
    "verdicts, false pays": Promise("value", "<=", 0.05),
    "verdicts, false does not pay": Promise("value", "<=", 0.05),
    # Measures.
    "metrics, largest difference to pytrec_eval": Promise("value", "<=", 1e-6),
    "metrics, largest difference to ranx": Promise("value", "<=", 1e-6),
}

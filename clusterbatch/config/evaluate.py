"""`evaluate`: the test collections and the measures."""

from __future__ import annotations

from pydantic import Field

from clusterbatch.config.base import Section, operational
from clusterbatch.config.corpus import Paths


class EvaluateConfig(Section):
    # Folders in BEIR layout: corpus.jsonl, queries.jsonl, qrels/test.tsv.
    path: Paths = []
    metrics: list[str] = ["nDCG@10", "R@100", "RR@10"]
    # Documents kept for each query in the run file.
    top_k: int = Field(100, ge=1)
    max_query_tokens: int = Field(64, ge=2)
    max_document_tokens: int = Field(256, ge=2)
    workers: int = operational(2, ge=1)
    device: str = operational("auto")

"""`evaluate`: the test collections, the models and the measures."""

from __future__ import annotations

import re

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, operational
from clusterbatch.config.corpus import Paths


class EvaluateConfig(Section):
    # Folders in BEIR layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv; docstrings:// means the sample's own.
    path: Paths = []
    split: str = "test"
    # Where no collection is given: so many documents, with all queries that ask for them, are held out of the corpus as
    # development and test queries. 0: none.
    holdout: int = Field(2000, ge=0)
    # before: train.model as training starts, behind train.prompts; after: the trained model; bm25: word matching, as a
    # reference. Others are a model's folder, a workspace (its model is meant) or a name on the hub.
    models: list[str] = Field(["before", "after"], min_length=1)
    # NDCG@k, MRR@k, Recall@k, Precision@k, MAP@k, HitRate@k, or module:function of (answers, grades).
    metrics: list[str] = Field(["NDCG@10", "Recall@100", "MRR@10"], min_length=1)
    # Names of MTEB tasks to run on the same models (needs the package mteb and, for its data, a network).
    mteb: list[str] = operational([])
    # Documents kept for each query in the run file.
    top_k: int = Field(100, ge=1)
    # BEIR's rule: a document with the query's own id is not an answer to it.
    ignore_identical_ids: bool = True
    # What texts are cut to here, or to the model's own limit where that is shorter; train.max_*_tokens do not count.
    max_query_tokens: int = Field(64, ge=2)
    max_document_tokens: int = Field(256, ge=2)
    # Bytes of corpus.jsonl that one unit of work embeds and searches.
    unit_bytes: int = Field(2 * 2**20, ge=2**10)
    workers: int = operational(2, ge=1)
    device: str = operational("auto")

    @model_validator(mode="after")
    def _depth(self) -> EvaluateConfig:
        for metric in self.metrics:
            cutoff = re.fullmatch(r"\w+@(\d+)", metric)
            if cutoff and int(cutoff[1]) > self.top_k:
                raise ValueError(f"metrics: {metric} looks deeper than top_k ({self.top_k})")
        return self

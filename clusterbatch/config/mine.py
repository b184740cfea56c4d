"""`mine`: hard negatives and consistent pairs, found by searching the surrogate's vectors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clusterbatch.config.base import Section, added, operational


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

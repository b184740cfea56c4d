"""`predict`: what clusters would be like on this corpus, before anything is trained."""

from __future__ import annotations

from pydantic import Field

from clusterbatch.config.base import Address, Section, operational


class PredictConfig(Section):
    # Rows that are embedded; of each source at least 2,048, or all.
    rows: int = Field(20_000, ge=256)
    # Rows per cluster that are tried; those below two batches, or too large for the sample, are left out, and said.
    sizes: list[int] = Field([256, 512, 1024, 2048, 4096, 8192], min_length=1)
    # What the mask would leave out, as train.mask.surrogate_margin with surrogate_relative: above 95 % of the positive.
    mask_share: float = Field(0.95, gt=0, le=1)
    # A file (JSON, local or s3://): `compare` adds what every arm gained, source by source, and what was known of it
    # before; `predict` says what the rows of other corpora foretell, and how far they miss each other. It needs at
    # least 8 rows of the same baseline (compare.baseline) and metric (compare.decide.metric).
    experience: Address | None = operational(None)

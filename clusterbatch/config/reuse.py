"""`reuse`: artifacts that another workspace has already."""

from __future__ import annotations

from clusterbatch.config.base import Address, Section, operational


class ReuseConfig(Section):
    """Workspaces (URIs) whose artifacts are read in place of this one's own, and never written, `--force` or not.

    Results do not depend on where an input lies, and what it is goes into the fingerprint of what is made from it.
    """

    # With the sample, where the corpus is mined from docstrings.
    corpus: Address | None = operational(None)
    embeddings: Address | None = operational(None)
    clusters: Address | None = operational(None)

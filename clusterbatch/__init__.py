"""Contrastive pretraining of text-embedding models on semantically clustered batches, on Ray.

Names listed in `__all__` are the public interface; everything else may move between releases.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clusterbatch.version import __version__

if TYPE_CHECKING:
    from clusterbatch.batches.curriculum import make_plan
    from clusterbatch.batches.samplers import ClusterBatchSampler, SentenceTransformersSampler, label_rows
    from clusterbatch.config import load_config
    from clusterbatch.pipeline.run import run

__all__ = [
    "ClusterBatchSampler",
    "SentenceTransformersSampler",
    "__version__",
    "label_rows",
    "load_config",
    "make_plan",
    "run",
]

# Docstrings are Markdown: what the API reference shows them as.
__docformat__ = "markdown"

# Imported when first used: torch and Ray take seconds, which `clusterbatch --help` need not wait for.
_HOMES = {
    "ClusterBatchSampler": "clusterbatch.batches.samplers",
    "SentenceTransformersSampler": "clusterbatch.batches.samplers",
    "label_rows": "clusterbatch.batches.samplers",
    "load_config": "clusterbatch.config",
    "make_plan": "clusterbatch.batches.curriculum",
    "run": "clusterbatch.pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Contrastive pretraining of text-embedding models on semantically clustered batches, on Ray.

The public names, which can be imported from here and keep their meaning from release to release:

- `clusterbatch.config.load.load_config`: the configuration from a YAML file and overrides
- `clusterbatch.pipeline.run.run`: all stages, as the command `run` does
- `clusterbatch.batches.curriculum.make_plan`: the batch plan over a cluster index
- `clusterbatch.batches.samplers.ClusterBatchSampler`: same-cluster batches for a PyTorch `DataLoader`
- `clusterbatch.batches.samplers.SentenceTransformersSampler`: the same for the trainer of Sentence Transformers
- `clusterbatch.batches.samplers.label_rows`: cluster labels of a workspace for one's own rows

Everything else may move between releases.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clusterbatch.version import __version__ as __version__

if TYPE_CHECKING:
    from clusterbatch.batches.curriculum import make_plan as make_plan
    from clusterbatch.batches.samplers import ClusterBatchSampler as ClusterBatchSampler
    from clusterbatch.batches.samplers import SentenceTransformersSampler as SentenceTransformersSampler
    from clusterbatch.batches.samplers import label_rows as label_rows
    from clusterbatch.config import load_config as load_config
    from clusterbatch.pipeline.run import run as run

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
    return sorted([*globals(), *_HOMES])

"""The README of a trained model: what it is, what it was trained on and how, and how well training went."""

from __future__ import annotations

import json
from typing import Any

import yaml

from clusterbatch.batches.curriculum import Plan
from clusterbatch.config import RunConfig
from clusterbatch.encoder.model import Encoder
from clusterbatch.version import __version__

# Sources that are listed one by one; a corpus may have thousands.
_LISTED = 20


def model_card(
    config: RunConfig, encoder: Encoder, plan: Plan, steps: int, generation: int, last: dict[str, Any] | None
) -> str:
    """Return Markdown with the front matter that model hubs read. `last`: the last step's metrics line, if at hand."""
    front = yaml.safe_dump(
        {
            "library_name": "sentence-transformers",
            "pipeline_tag": "sentence-similarity",
            "base_model": config.train.model,
            "tags": ["sentence-transformers", "feature-extraction", "clusterbatch"],
        },
        sort_keys=False,
    )
    index, train, batches = plan.index, config.train, config.batches
    strategy = {
        "random": "at random",
        "source": "from one source each",
        "cluster": "from one cluster of one source each",
        "random_groups": "from one random group each, of the sizes of clusters (a control)",
    }.get(batches.stratify, batches.stratify)
    settings = json.dumps(
        {"train": train.identity(), "batches": batches.identity(), "cluster": config.cluster.identity()}, indent=1
    )
    figures = ""
    if last is not None:
        wanted = ("loss", "accuracy", "hardness", "mask_rate", "purity", "temperature")
        figures = "At its last step: " + ", ".join(f"{name} {last[name]:.4g}" for name in wanted) + ".\n\n"
    return f"""---
{front}---

# {config.train.model}, pretrained on {index.total_rows:,} pairs

A {encoder.kind} encoder of {encoder.dimensions} dimensions, for cosine similarity between queries and documents.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["what is a batch?"])
documents = model.encode_document(["The rows of one optimizer step.", "A kind of bread."])
print(model.similarity(queries, documents))
```

## Data

{index.total_rows:,} (query, document) pairs of {len(index.sources):,} sources, generation {generation}:

| source | pairs |
|---|---|
{_sources(plan)}

## Training

{steps:,} steps of {batches.size:,} pairs, drawn {strategy}. Contrastive loss (InfoNCE) with the other rows of
the global batch as negatives, directions {", ".join(train.directions)}, starting from `{train.model}`. Texts are cut to
{train.max_query_tokens} (query) and {train.max_document_tokens} (document) tokens.

{figures}Made with clusterbatch {__version__}:

```
clusterbatch run CONFIG.yaml
```

where CONFIG.yaml has these values:

```json
{settings}
```
"""


def _sources(plan: Plan) -> str:
    index = plan.index
    rows = dict.fromkeys(index.sources, 0)
    for number, count in zip(index.source.tolist(), index.rows.tolist(), strict=True):
        rows[index.sources[number]] += count
    ranked = sorted(rows.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"| {name.replace('|', chr(92) + '|')} | {count:,} |" for name, count in ranked[:_LISTED]]
    if len(ranked) > _LISTED:
        lines.append(f"| {len(ranked) - _LISTED:,} more | {sum(count for _, count in ranked[_LISTED:]):,} |")
    return "\n".join(lines)

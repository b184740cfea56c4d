"""A small corpus of two sources, with a test collection of its own: whole runs of it take seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from clusterbatch.config import RunConfig, load_config
from tests.encoder.models import make_static

SUBJECTS = {
    "cooking": "simmer onion butter pepper oven roast flour garlic sauce bake",
    "sailing": "anchor harbour mast rigging tide keel compass deck sail knot",
}


def subjects_config(folder: Path, words: Sequence[str] = ()) -> RunConfig:
    """Writes 320 pairs and 40 judged queries below `folder`; a run's configuration over them, small static encoders."""
    pairs, documents, queries, judgements = [], [], [], ["query-id\tcorpus-id\tscore"]
    for source, line in SUBJECTS.items():
        terms = line.split()
        for number in range(160):
            one, two, three = (terms[(number * step + number // 10) % 10] for step in (1, 3, 7))
            pairs.append(
                {
                    "query": f"{one} {two} note {number}",
                    "document": f"about {one} and {two} with {three}, entry {number}",
                    "source": source,
                }
            )
        for number in range(20):
            name = f"{number:016x}"
            documents.append(
                {"_id": f"{source}-d{name}", "text": f"{terms[number % 10]} {terms[(number * 3) % 10]} page {number}"}
            )
            queries.append({"_id": f"{source}-q{name}", "text": f"{terms[number % 10]} {terms[(number * 3) % 10]}"})
            judgements.append(f"{source}-q{name}\t{source}-d{name}\t1")
    collection = folder / "topics"
    (collection / "qrels").mkdir(parents=True)
    for file, rows in (
        (folder / "pairs.jsonl", pairs),
        (collection / "corpus.jsonl", documents),
        (collection / "queries.jsonl", queries),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (collection / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n")
    vocabulary = " ".join([*SUBJECTS.values(), "note about and with entry page", *map(str, range(160))]).split()
    model = make_static(vocabulary, folder / "model")
    return load_config(
        None,
        [
            f"workspace={folder}/ws",
            f"corpus.paths={folder}/pairs.jsonl",
            f"evaluate.path={collection}",
            "evaluate.top_k=10",
            "evaluate.metrics=[NDCG@10]",
            f"embed.model={model}",
            "embed.max_tokens=16",
            "cluster.mean_size=40",
            "batches.size=32",
            f"train.model={model}",
            "train.learning_rate=0.01",
            *words,
        ],
    )


def copy_workspace(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the workspace of a configuration below `folder`, and return the configuration of the copy."""
    shutil.copytree(config.workspace, folder / "ws")
    return config.model_copy(update={"workspace": str(folder / "ws")})

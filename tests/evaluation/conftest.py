"""A small collection on disk, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from clusterbatch.evaluation.collection import Collection
from clusterbatch.store import Folder

WriteCollection = Callable[..., Collection]


@pytest.fixture
def write_collection(tmp_path: Path) -> WriteCollection:
    """write_collection(name, documents, queries, judgements): texts by id, texts by id, grade by document by query."""

    def write(
        name: str,
        documents: Mapping[str, str],
        queries: Mapping[str, str],
        judgements: Mapping[str, Mapping[str, int]],
        titles: Mapping[str, str] | None = None,
    ) -> Collection:
        folder = tmp_path / name
        (folder / "qrels").mkdir(parents=True)
        lines = [
            json.dumps({"_id": key, "title": (titles or {}).get(key, ""), "text": text}, ensure_ascii=False)
            for key, text in documents.items()
        ]
        (folder / "corpus.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        lines = [json.dumps({"_id": key, "text": text}) for key, text in queries.items()]
        (folder / "queries.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        rows = [f"{query}\t{document}\t{grade}" for query, of in judgements.items() for document, grade in of.items()]
        (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
        return Collection(name, Folder(str(folder)))

    return write

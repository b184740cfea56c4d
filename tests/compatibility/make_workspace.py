"""Make the workspace that test_old_workspace.py reads: `python tests/compatibility/make_workspace.py ARCHIVE.tar.xz`.

The archive in the repository was made by the code of commit f829e31 (run this file with PYTHONPATH set to a checkout of
it) and stays as it is: it stands for the workspaces that users have. A corpus' fingerprint contains the paths and times
of its files, so every path begins with /proc/self/cwd, which is the same in any working directory, and times are fixed.
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

# The working directory, whichever it is.
HERE = Path("/proc/self/cwd")
STEPS, CHECKPOINT_EVERY, CUT_OFF_AT = 8, 2, 6
PAIRS, MORE_PAIRS = 96, 24

_TIME = 1_700_000_000
_COMMON = ["how", "to", "the", "and", "in"]
# Few and short words: the n-gram surrogate keeps 128 numbers for every n-gram that it has seen.
_SUBJECTS = {
    "kitchen": (["fry", "mix"], ["hot", "raw"], ["rice", "tea", "egg", "ham"]),
    "harbour": (["row", "tow"], ["old", "wet"], ["boat", "oar", "net", "rope"]),
}

OVERRIDES = [
    f"workspace={HERE}/workspace",
    "corpus.row_group_rows=64",
    f"evaluate.path={HERE}/topics",
    "evaluate.top_k=10",
    "evaluate.metrics=[NDCG@10]",
    "embed.model=char-ngrams",
    "cluster.mean_size=16",
    "cluster.run_rows=4",
    "batches.size=8",
    f"train.model={HERE}/model",
    "train.learning_rate=0.01",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={CHECKPOINT_EVERY}",
    "train.mask.surrogate_margin=-0.05",
    "train.mask.surrogate_relative=true",
    "refresh.rounds=1",
    "refresh.every_steps=4",
    "refresh.margin=1.0",
    "compare.arms=[random,cluster]",
    "compare.seeds=1",
    "compare.steps=2",
    "compare.points=1",
    # One process on a CPU, and nothing that writes a host's name.
    "embed.device=cpu",
    "embed.tokenizers=0",
    "cluster.device=cpu",
    "cluster.workers=1",
    "train.device=cpu",
    "train.workers=1",
    "train.trackers=[]",
    "evaluate.device=cpu",
]
FIRST_CORPUS = f"corpus.paths=[{HERE}/pairs.jsonl]"
GROWN_CORPUS = f"corpus.paths=[{HERE}/pairs.jsonl,{HERE}/more.jsonl]"


def set_times(folder: Path) -> None:
    """Give the input files the times that they had when the workspace was made."""
    for path in [*folder.glob("*.jsonl"), *folder.glob("topics/**/*")]:
        os.utime(path, (_TIME, _TIME))


def write_inputs(folder: Path) -> None:
    """Write pairs, more pairs to append, a test collection in BEIR layout and a small static model."""
    from tests.encoder.models import make_static

    rows = _pairs()
    _write_lines(folder / "pairs.jsonl", rows[:PAIRS])
    _write_lines(folder / "more.jsonl", rows[PAIRS : PAIRS + MORE_PAIRS])
    judged = rows[PAIRS + MORE_PAIRS :][:12]
    (folder / "topics" / "qrels").mkdir(parents=True)
    _write_lines(
        folder / "topics/corpus.jsonl", [{"_id": f"d{n}", "text": row["document"]} for n, row in enumerate(judged)]
    )
    _write_lines(
        folder / "topics/queries.jsonl", [{"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(judged)]
    )
    judgements = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(len(judged)))]
    (folder / "topics/qrels/test.tsv").write_text("\n".join(judgements) + "\n")
    make_static(sorted({word for row in rows for text in row.values() for word in text.split()}), folder / "model", 8)
    set_times(folder)


def _pairs() -> list[dict[str, str]]:
    rows = []
    for source, (verbs, kinds, things) in _SUBJECTS.items():
        how, to, the, both, within = _COMMON
        for verb, kind, one, two, three in product(verbs, kinds, things, things, things):
            if len({one, two, three}) == 3:
                query = f"{how} {to} {verb} {the} {kind} {one} {both} {two}"
                document = f"{verb} {the} {one} {within} {the} {kind} {three} {both} {the} {two}"
                rows.append({"query": query, "document": document, "source": source})
    random.Random(0).shuffle(rows)
    # Rows whose texts occur once come first.
    first_of_query = {row["query"]: row for row in reversed(rows)}
    unique = list({row["document"]: row for row in first_of_query.values()}.values())
    return [*unique, *(row for row in rows if row not in unique)]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _make(folder: Path) -> None:
    """Run all stages, a round of refresh and a comparison; then the training again, cut off, into `cut-off/`."""
    import pytest

    from clusterbatch.cli import main
    from clusterbatch.store import Folder
    from tests.in_process import run_in_process

    os.chdir(folder)
    write_inputs(folder)
    words = [*OVERRIDES, FIRST_CORPUS]
    with pytest.MonkeyPatch.context() as patch:
        run_in_process(patch)
        for command in ("run", "refresh", "compare"):
            assert main([command, *words]) == 0, command
        finished = folder / "workspace/generation=000/train"
        kept = finished.rename(folder / "finished")
        write = Folder.write

        # Leaves half of a checkpoint, and lines of steps beyond the last whole one.
        def interrupted(self: Folder, name: str, data: bytes | memoryview) -> None:
            if self.uri.endswith(f"checkpoints/step={CUT_OFF_AT:08d}") and name == "manifest.json":
                raise KeyboardInterrupt
            write(self, name, data)

        patch.setattr(Folder, "write", interrupted)
        assert main(["train", *words]) == 130
        finished.rename(folder / "cut-off")
        kept.rename(finished)


def _pack(folder: Path, archive: Path) -> None:
    """Write the folder without its reports, which are rebuilt, and without owners."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and "report" not in name.parts:
                member = tarfile.TarInfo(name.as_posix())
                member.size, member.mtime = path.stat().st_size, _TIME
                with path.open("rb") as file:
                    tar.addfile(member, file)
    archive.write_bytes(target.getvalue())


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as made:
        _make(Path(made))
        _pack(Path(made), target)

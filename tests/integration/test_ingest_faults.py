"""The driver of ingest is killed again and again; what it has done by then is not done twice, and nothing changes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from clusterbatch.config import RunConfig
from clusterbatch.store import Manifest
from tests.corpus.test_ingest import write_lines

_KILLS = 3
_PROGRAM = """
import sys
from clusterbatch.config import RunConfig
from clusterbatch.corpus.ingest import ingest
manifest = ingest(RunConfig.model_validate_json(sys.argv[1]))
"""


def run(config: RunConfig) -> subprocess.Popen[bytes]:
    # A group of its own, so that Ray's processes go with it.
    command = [sys.executable, "-c", _PROGRAM, config.model_dump_json()]
    return subprocess.Popen(command, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def content(workspace: Path) -> dict[str, str]:
    """Digest of the rows of each part, by the part's name without the attempt's own suffix, and all else by bytes."""
    corpus = workspace / "corpus"
    manifest = Manifest.model_validate_json((corpus / "manifest.json").read_bytes())
    digests = {}
    for number, part in enumerate(manifest.parts):
        path = corpus / part.path
        rows = json.dumps(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
        digests[f"{number} {part.path.rsplit('-', 1)[0]}"] = hashlib.sha256(rows).hexdigest()
    return digests


def test_ingest_killed_at_random_moments_gives_the_same_corpus(tmp_path: Path) -> None:
    numbers = random.Random(0)
    for file in range(8):
        rows = [
            {"query": f"query {file} {row}", "document": " ".join(f"w{numbers.randrange(999)}" for _ in range(40))}
            for row in range(250)
        ]
        write_lines(tmp_path / f"in/site-{file}.jsonl", [*rows, "no json", rows[0]])

    def config(name: str) -> RunConfig:
        return RunConfig.model_validate(
            {
                "workspace": str(tmp_path / name),
                "corpus": {"paths": [str(tmp_path / "in")], "unit_bytes": 20_000, "part_bytes": 2**17},
                "evaluate": {"holdout": 200},
                "ray": {"num_cpus": 2, "object_store_memory": 100 * 2**20},
            }
        )

    start = time.monotonic()
    assert run(config("undisturbed")).wait() == 0
    whole = time.monotonic() - start

    killed = 0
    disturbed = config("disturbed")
    for _ in range(_KILLS):
        process = run(disturbed)
        try:
            process.wait(numbers.uniform(0.4, 0.95) * whole)
        except subprocess.TimeoutExpired:
            kill(process)
            killed += 1
    assert run(disturbed).wait() == 0
    assert killed > 0
    assert content(tmp_path / "disturbed") == content(tmp_path / "undisturbed")

"""Memory of a process that embeds or scores does not grow with what was done; freed memory is used again."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.encoder.models import make_model

# Prints the resident bytes after each quarter of the calls, whose texts are of many lengths.
_SCRIPT = """
import sys
import numpy as np
import psutil
import torch
from clusterbatch.config import ScoreConfig, StorageConfig
from clusterbatch.encoder.devices import inference_dtype
from clusterbatch.encoder.load import load_encoder
from clusterbatch.scoring.teacher import load_teacher

torch.set_num_threads(1)
work, folder = sys.argv[1:]
if work == "score":
    teacher = load_teacher(ScoreConfig(teacher=folder), StorageConfig(), "cpu")
else:
    encoder = load_encoder(folder, dtype=inference_dtype("auto", torch.device("cpu")), packed=True)
random = np.random.default_rng(0)
for call in range(100):
    texts = ["river stone " * int(words) for words in random.integers(1, 50, 40)]
    if work == "score":
        rows = np.arange(20)
        teacher.scores(texts[:20], texts[20:], rows, rows)
    else:
        encoder.encode(encoder.prepare(texts, None), 256)
    if call % 25 == 24:
        print(psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("work", ["embed", "score"])
def test_no_compiled_product_is_kept_for_every_length(work: str, tmp_path: Path) -> None:
    folder = make_model("bert", tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, work, folder], check=True, stdout=subprocess.PIPE, text=True)
    resident = [int(line) for line in done.stdout.split()]
    assert max(resident) - resident[0] < 30 * 2**20, [each >> 20 for each in resident]


# Prints the page faults of making tensors that are freed afterwards, twice.
_FAULTS = """
import resource
import torch
from clusterbatch.encoder.devices import keep_freed_memory

keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**21) for _ in range(20)]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    del tensors
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], check=True, stdout=subprocess.PIPE, text=True)
    first, second = (int(line) for line in done.stdout.split())
    assert second < first / 2

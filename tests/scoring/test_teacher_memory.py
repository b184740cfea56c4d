"""Memory of a process that scores does not grow with what it has scored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.encoder.models import make_model

# Prints the resident bytes after each quarter of the calls, whose texts are of many lengths.
_SCRIPT = """
import sys
import numpy as np
import psutil
import torch
from clusterbatch.config import ScoreConfig, StorageConfig
from clusterbatch.scoring.teacher import load_teacher

torch.set_num_threads(1)
teacher = load_teacher(ScoreConfig(teacher=sys.argv[1]), StorageConfig(), "cpu")
random = np.random.default_rng(0)
for call in range(100):
    texts = ["river stone " * int(words) for words in random.integers(1, 50, 40)]
    rows = np.arange(20)
    teacher.scores(texts[:20], texts[20:], rows, rows)
    if call % 25 == 24:
        print(psutil.Process().memory_info().rss)
"""


def test_a_teacher_keeps_no_compiled_product_for_every_length(tmp_path: Path) -> None:
    folder = make_model("bert", tmp_path / "teacher")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, folder], check=True, stdout=subprocess.PIPE, text=True)
    resident = [int(line) for line in done.stdout.split()]
    assert max(resident) - resident[0] < 30 * 2**20, [each >> 20 for each in resident]

"""Memory that was freed between blocks in use goes back to the system when asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clusterbatch.encoder.devices import return_freed_memory

_BLOCK, _BLOCKS = 2**16, 2048


def _resident() -> int:
    """Return the bytes of this process that are in memory and no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be asked")
def test_holes_between_blocks_in_use_are_returned() -> None:
    # Smaller than what malloc maps by itself, so that a hole stays with the process until it is asked for.
    blocks = [bytearray(_BLOCK) for _ in range(_BLOCKS)]
    kept = blocks[::64]
    del blocks
    before = _resident()
    return_freed_memory()
    assert len(kept) == _BLOCKS // 64
    assert before - _resident() > _BLOCK * _BLOCKS // 2

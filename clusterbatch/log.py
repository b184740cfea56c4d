"""What a run says on standard error: lines for people, or one JSON object a line for log collectors.

CLUSTERBATCH_LOG=json chooses the second. Each object then has `time` (UTC, ISO 8601), `level` (info, warning, error),
`message`, what `log_context` added (`run`: the workspace, `stage`, `generation`), and the figures of the message.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

LOG_FORMAT = "CLUSTERBATCH_LOG"
Level = Literal["info", "warning", "error"]

_context: ContextVar[dict[str, str | int] | None] = ContextVar("log_context", default=None)


@contextmanager
def log_context(**fields: str | int) -> Iterator[None]:
    """Adds fields to every line that is said within the block."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def is_structured() -> bool:
    return os.environ.get(LOG_FORMAT, "").lower() == "json"


def say(message: str, *, level: Level = "info", **figures: object) -> None:
    """One line. `figures` are for machines only: the message already tells people what they need."""
    if is_structured():
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "message": message, **(_context.get() or {}), **figures}
        message = json.dumps(line, ensure_ascii=False, default=str)
    print(message, file=sys.stderr, flush=True)

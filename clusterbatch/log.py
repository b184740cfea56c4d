"""Log lines under Python's logger `clusterbatch`: plain for people, or one JSON object per line for log collectors.

The command line installs `StandardErrorHandler`; a program that imports this package configures logging itself, for
example with `logging.getLogger("clusterbatch").setLevel("WARNING")`. CLUSTERBATCH_LOG=json makes the handler write JSON
objects with `time` (UTC, ISO 8601), `level` (info, warning, error), `message`, the fields of `log_context` (`run`: the
workspace, `stage`, `generation`) and the figures of the message.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from clusterbatch.json_text import json_text

LOG_FORMAT = "CLUSTERBATCH_LOG"
Level = Literal["info", "warning", "error"]

logger = logging.getLogger("clusterbatch")
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_context: ContextVar[dict[str, str | int] | None] = ContextVar("log_context", default=None)


@contextmanager
def log_context(**fields: str | int) -> Iterator[None]:
    """Add fields to every line that is logged within the block."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def is_structured() -> bool:
    """Return whether log lines are JSON objects."""
    return os.environ.get(LOG_FORMAT, "").lower() == "json"


def say(message: str, *, level: Level = "info", **figures: object) -> None:
    """Log one line under `clusterbatch`, with the fields of `log_context` and `figures` for the JSON format.

    A thin helper, so that no call has to spell out `extra={"figures": ...}`. `figures` are for machines only:
    the message already tells people what they need.
    """
    logger.log(_LEVELS[level], "%s", message, extra={"figures": {**(_context.get() or {}), **figures}})


def configure_logging() -> None:
    """Send the lines of this package to standard error, once; an existing one is kept."""
    if not any(isinstance(handler, StandardErrorHandler) for handler in logger.handlers):
        logger.addHandler(StandardErrorHandler())
    # Every line is meant to be seen, whatever the root logger's level; and once only.
    logger.setLevel(logging.INFO)
    logger.propagate = False


class StandardErrorHandler(logging.Handler):
    """Write to the current standard error, in the format that CLUSTERBATCH_LOG names."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        formatter = _JSON if is_structured() else _PLAIN
        print(formatter.format(record), file=sys.stderr, flush=True)


class JSONFormatter(logging.Formatter):
    """One JSON object per record, with the fields and figures that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        return json_text(line, ensure_ascii=False, default=str)


_PLAIN, _JSON = logging.Formatter("%(message)s"), JSONFormatter()

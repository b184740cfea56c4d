"""Rendering of HTML and Markdown pages from templates."""

from __future__ import annotations

import math

from jinja2 import Environment, PackageLoader, StrictUndefined

# Amounts below it are not written out: so many zeros say no more than that it is little.
_LITTLE = 1e-4


def amount(value: float) -> str:
    """Return a number with three significant digits, without an exponent."""
    if value == 0:
        return "0"
    if abs(value) < _LITTLE:
        return f"< {_LITTLE:.4f}" if value > 0 else f"> -{_LITTLE:.4f}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def environment() -> Environment:
    """Return the templates' environment. Every value is escaped: corpora hold any text, markup included."""
    loaded = Environment(
        loader=PackageLoader("clusterbatch.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loaded.filters["amount"] = amount
    loaded.filters["count"] = lambda value: f"{value:,}"
    loaded.filters["megabytes"] = lambda value: f"{value / 2**20:,.1f}"
    return loaded

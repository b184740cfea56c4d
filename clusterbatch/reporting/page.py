"""Rendering of HTML and Markdown pages from templates."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment() -> Environment:
    """Return the templates' environment. Every value is escaped: corpora hold any text, markup included."""
    loaded = Environment(
        loader=PackageLoader("clusterbatch.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    loaded.filters["count"] = lambda value: f"{value:,}"
    loaded.filters["megabytes"] = lambda value: f"{value / 2**20:,.1f}"
    return loaded

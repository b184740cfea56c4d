"""Phrases of the reports by language, from the YAML catalogues in `locales/`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import yaml

from clusterbatch.config.experiments import Language


def comparison_phrases(language: Language) -> dict[str, str]:
    """Return the phrases of a comparison's pages."""
    return _catalogue(language)["comparison"]


def workspace_phrases(language: Language) -> dict[str, str]:
    """Return the phrases of a workspace's report: those of a comparison, unless it has its own."""
    return {**_catalogue(language)["comparison"], **_catalogue(language)["workspace"]}


@cache
def _catalogue(language: Language) -> dict[str, dict[str, str]]:
    text = (files("clusterbatch.reporting") / "locales" / f"{language}.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = yaml.safe_load(text)
    return found

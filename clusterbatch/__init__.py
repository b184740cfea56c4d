"""Contrastive pretraining of text-embedding models on semantically clustered batches, on Ray."""

from importlib.metadata import PackageNotFoundError, version

# Docstrings are Markdown: what the API reference shows them as.
__docformat__ = "markdown"

try:
    __version__ = version("clusterbatch")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

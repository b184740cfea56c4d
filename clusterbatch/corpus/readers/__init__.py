"""Readers: one slice of an input file becomes chunks of rows with canonical column names."""

from clusterbatch.corpus.readers.dispatch import read_slice

__all__ = ["read_slice"]

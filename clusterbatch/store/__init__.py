"""Folders addressed by URI, and artifacts in them: directories that are whole or do not exist for readers."""

from clusterbatch.store.artifact import Artifact, Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.folder import Folder

__all__ = ["Artifact", "Counts", "Folder", "Manifest", "Part", "Receipt", "Stopwatch"]

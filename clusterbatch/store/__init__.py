"""Where bytes live: a URI becomes a folder, a folder becomes an artifact that is whole or not there."""

from clusterbatch.store.artifact import Artifact, Counts, Manifest, Part, Receipt, Stopwatch
from clusterbatch.store.folder import Folder

__all__ = ["Artifact", "Counts", "Folder", "Manifest", "Part", "Receipt", "Stopwatch"]

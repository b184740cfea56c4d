"""The tree of a workspace: where each stage's artifact lies."""

from __future__ import annotations

from clusterbatch.config import RunConfig
from clusterbatch.store.artifact import Artifact
from clusterbatch.store.filesystem import Folder


class Workspace:
    """Names the places of one workspace URI; `generation` counts passes of embed, cluster, train."""

    def __init__(self, config: RunConfig) -> None:
        self.root = Folder(config.workspace, config.storage)

    @property
    def corpus(self) -> Artifact:
        return Artifact(self.root.child("corpus"), "corpus")

    @property
    def sample(self) -> Artifact:
        """The built-in sample, when the corpus is mined from docstrings."""
        return Artifact(self.root.child("sample"), "sample")

    def embeddings(self, generation: int = 0) -> Artifact:
        return Artifact(self._generation(generation).child("embeddings"), "embeddings")

    def clusters(self, generation: int = 0) -> Artifact:
        return Artifact(self._generation(generation).child("clusters"), "clusters")

    def train(self, generation: int = 0) -> Artifact:
        return Artifact(self._generation(generation).child("train"), "training run")

    def evaluation(self, generation: int = 0) -> Artifact:
        return Artifact(self._generation(generation).child("evaluation"), "evaluation")

    @property
    def model(self) -> Folder:
        return self.root.child("model")

    @property
    def report(self) -> Folder:
        return self.root.child("report")

    def _generation(self, generation: int) -> Folder:
        return self.root.child(f"generation={generation:03d}")

"""The tree of a workspace: where each stage's artifact lies."""

from __future__ import annotations

from clusterbatch.config import RunConfig
from clusterbatch.store.artifact import Artifact
from clusterbatch.store.filesystem import Folder
from clusterbatch.store.versions import GrowingArtifact


class Workspace:
    """Names the places of one workspace URI; `generation` counts passes of embed, cluster, train.

    Corpus, embeddings and clusters may lie in other workspaces (`reuse`), those of later generations never do.
    """

    def __init__(self, config: RunConfig) -> None:
        self.root = Folder(config.workspace, config.storage)
        self._reuse = config.reuse

    @property
    def corpus(self) -> GrowingArtifact:
        return GrowingArtifact(self._home(self._reuse.corpus).child("corpus"), "corpus")

    @property
    def sample(self) -> Artifact:
        """The built-in sample, when the corpus is mined from docstrings."""
        return Artifact(self._home(self._reuse.corpus).child("sample"), "sample")

    def embeddings(self, generation: int = 0) -> GrowingArtifact:
        home = self._home(self._reuse.embeddings if generation == 0 else None)
        return GrowingArtifact(_generation(home, generation).child("embeddings"), "embeddings")

    def mined(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("mined"), "mined neighbours")

    def clusters(self, generation: int = 0) -> Artifact:
        home = self._home(self._reuse.clusters if generation == 0 else None)
        return Artifact(_generation(home, generation).child("clusters"), "clusters")

    def train(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("train"), "training run")

    def trained_model(self, generation: int = 0) -> Folder:
        """A generation's own model; `model` is a copy of the live one."""
        return self.train(generation).folder.child("model")

    def evaluation(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("evaluation"), "evaluation")

    def mteb(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("mteb"), "MTEB results")

    def refresh(self, generation: int) -> Folder:
        """What a round of refresh decided and found."""
        return _generation(self.root, generation).child("refresh")

    @property
    def model(self) -> Folder:
        return self.root.child("model")

    @property
    def report(self) -> Folder:
        return self.root.child("report")

    def _home(self, reused: str | None) -> Folder:
        return self.root if reused is None else Folder(reused, self.root.storage)


def _generation(root: Folder, generation: int) -> Folder:
    return root.child(f"generation={generation:03d}")

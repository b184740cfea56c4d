"""`model/`: the live model of a workspace, a copy of one generation's.

The tree of a workspace: where each stage's artifact lies.
"""

from __future__ import annotations

from clusterbatch.config import RunConfig
from clusterbatch.store.artifact import Artifact
from clusterbatch.store.folder import Folder
from clusterbatch.store.versions import GrowingArtifact


class Workspace:
    """Names the places of one workspace URI; `generation` counts passes of embed, cluster, train.

    Corpus, embeddings and clusters may lie in other workspaces (`reuse`), those of later generations never do. What
    lies in another one is only read; samples and layouts that lie below this one are its own.
    """

    def __init__(self, config: RunConfig) -> None:
        self.root = Folder(config.workspace, config.storage)
        self._reuse = config.reuse

    @property
    def corpus(self) -> GrowingArtifact:
        home, reused = self._home("corpus")
        return GrowingArtifact(home.child("corpus"), "corpus", reused)

    @property
    def sample(self) -> Artifact:
        """The built-in sample, when the corpus is mined from docstrings."""
        home, reused = self._home("corpus")
        return Artifact(home.child("sample"), "sample", reused)

    def embeddings(self, generation: int = 0) -> GrowingArtifact:
        home, reused = self._home("embeddings", generation)
        return GrowingArtifact(_generation(home, generation).child("embeddings"), "embeddings", reused)

    def mined(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("mined"), "mined neighbours")

    def clusters(self, generation: int = 0) -> Artifact:
        home, reused = self._home("clusters", generation)
        return Artifact(_generation(home, generation).child("clusters"), "clusters", reused)

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

    def _home(self, key: str, generation: int = 0) -> tuple[Folder, str | None]:
        """The workspace where an artifact lies, and the key of `reuse` where that is not this one."""
        place = getattr(self._reuse, key) if generation == 0 else None
        if place is None:
            return self.root, None
        home = Folder(place, self.root.storage)
        own = f"{home.uri}/".startswith(f"{self.root.uri}/")
        return home, None if own else f"reuse.{key}"


def _generation(root: Folder, generation: int) -> Folder:
    return root.child(f"generation={generation:03d}")


# Which generation's model this is; written after its files.
MARK = "generation.json"


def publish(workspace: Workspace, generation: int) -> None:
    """Makes a generation's model the live one.

    Whoever opens the folder meanwhile finds a whole model: each file is replaced in one piece, those with weights, in
    which generations differ, last; what the new model does not have is removed after that.
    """
    source, target = workspace.trained_model(generation), workspace.model
    names = [entry.name for entry in source.find()]
    for name in sorted(names, key=lambda name: (name.endswith(".safetensors"), name)):
        target.write(name, source.read(name))
    target.write_json(MARK, {"generation": generation})
    for entry in target.find():
        if entry.name not in (*names, MARK):
            target.remove(entry.name)


def live_generation(workspace: Workspace) -> int | None:
    """The generation whose model is live; None where none was published."""
    try:
        return int(workspace.model.read_json(MARK)["generation"])
    except FileNotFoundError:
        return None

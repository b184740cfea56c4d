"""The tree of a workspace: where each stage's artifact is, and which model is live."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError, UsageError
from clusterbatch.store.artifact import EXCHANGE, MANIFEST, RECEIPTS, Artifact
from clusterbatch.store.entry import Entry, is_own_name
from clusterbatch.store.folder import Folder, normalise_uri
from clusterbatch.store.growing import GrowingArtifact

# In `model/`: the generation whose model this is, and the files that were published.
MARK = "generation.json"
# In a training run: its model.
MODEL = "model"
# Files of a model that was written before training runs listed theirs.
_EXPORTED = re.compile(
    r"model/(?:\d_(?:Normalize|Pooling)/config\.json|README\.md|model[\w-]*\.safetensors(?:\.index\.json)?|vocab\.\w+"
    r"|(?:config|modules|config_sentence_transformers|sentence_bert_config|\w*tokenizer\w*|\w*processor_config"
    r"|special_tokens_map|added_tokens)\.json|merges\.txt|(?:sentencepiece\.bpe|spiece|tokenizer)\.model)"
)
_GENERATION = re.compile(r"generation=(\d+)")
# Folders of a workspace, besides those of generations.
_PLACES = ("corpus", "sample", "model", "report", "compare", "tune", "predict", "metrics.json", "refresh.json")
# Names of a folder that are looked at for a trace of this product.
_LOOKED_AT = 20


class TrainingRun(Artifact):
    """A training run: checkpoints, metrics, and the model, whose files are parts."""

    def model_files(self) -> set[str]:
        """Return the names of the model's files, relative to its folder."""
        listed = {part.path for part in self.parts_listed() or []}
        listed |= {part.path for receipt in self._receipts() for part in receipt.parts}
        names = {name for name in listed if name.startswith(f"{MODEL}/")}
        found = {f"{MODEL}/{entry.name}" for entry in self.folder.child(MODEL).find()}
        return {name.removeprefix(f"{MODEL}/") for name in (found & names if names else found)}

    def own_files(self, below: str = "") -> list[Entry]:
        own = {entry.name: entry for entry in super().own_files(below)}
        if self.parts_listed() is not None and not any(name.startswith(f"{MODEL}/") for name in own):
            own |= {entry.name: entry for entry in self.folder.find() if _EXPORTED.fullmatch(entry.name)}
        return [entry for name, entry in sorted(own.items()) if name.startswith(f"{below}/" if below else "")]


class Workspace:
    """Places of the artifacts of one workspace URI; `generation` counts passes of embed, cluster, train.

    Corpus, embeddings and clusters may be in other workspaces (`reuse`), those of later generations never are. Other
    workspaces are only read; samples and layouts below this workspace are its own.
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
        """The built-in sample, if the corpus is mined from docstrings."""
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

    def scores(self, generation: int = 0) -> Artifact:
        """A teacher's scores of the rows of a generation's clusters, beside these."""
        home, reused = self._home("clusters", generation)
        return Artifact(_generation(home, generation).child("scores"), "scores", reused)

    def train(self, generation: int = 0) -> TrainingRun:
        return TrainingRun(_generation(self.root, generation).child("train"), "training run")

    def trained_model(self, generation: int = 0) -> Folder:
        """A generation's own model; `model` is a copy of the live one."""
        return self.train(generation).folder.child(MODEL)

    def evaluation(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("evaluation"), "evaluation")

    def mteb(self, generation: int = 0) -> Artifact:
        return Artifact(_generation(self.root, generation).child("mteb"), "MTEB results")

    def refresh(self, generation: int) -> Folder:
        """Decision and findings of a round of refresh."""
        return _generation(self.root, generation).child("refresh")

    @property
    def model(self) -> Folder:
        return self.root.child("model")

    @property
    def report(self) -> Folder:
        return self.root.child("report")

    def generations(self) -> list[int]:
        """Return the numbers of the generations that have a folder here, ascending."""
        return sorted(int(match[1]) for match in map(_GENERATION.fullmatch, self.root.list()) if match)

    def artifacts_of(self, generation: int) -> list[Artifact]:
        """Return a generation's artifacts, finished or not, without those of another workspace."""
        artifacts: list[Artifact] = [
            self.embeddings(generation),
            self.mined(generation),
            self.clusters(generation),
            self.scores(generation),
            self.train(generation),
            self.evaluation(generation),
            self.mteb(generation),
        ]
        inside = f"{_generation(self.root, generation).uri}/"
        return [artifact for artifact in artifacts if artifact.folder.uri.startswith(inside)]

    def _home(self, key: str, generation: int = 0) -> tuple[Folder, str | None]:
        """The workspace of an artifact, and the key of `reuse` if that is not this one."""
        place = getattr(self._reuse, key) if generation == 0 else None
        if place is None:
            return self.root, None
        home = Folder(place, self.root.storage)
        own = f"{home.uri}/".startswith(f"{self.root.uri}/")
        return home, None if own else f"reuse.{key}"


# The stages in order, by name: the artifact of each in a workspace, of a generation (which the corpus has none of).
STAGE_ARTIFACTS: Mapping[str, Callable[[Workspace, int], Artifact]] = {
    "ingest": lambda workspace, _: workspace.corpus,
    "embed": Workspace.embeddings,
    "cluster": Workspace.clusters,
    "train": Workspace.train,
    "evaluate": Workspace.evaluation,
}


def _generation(root: Folder, generation: int) -> Folder:
    return root.child(f"generation={generation:03d}")


def publish(workspace: Workspace, generation: int) -> None:
    """Make a generation's model the live one.

    Whoever opens the folder meanwhile finds a whole model: each file is replaced in one piece, those with weights, in
    which generations differ, last; after that, files of the model before are removed if the new one lacks them.

    Raises DataError if the generation has no model, and UsageError if files of others are in the way; then nothing is
    changed.
    """
    source, target = workspace.trained_model(generation), workspace.model
    names = workspace.train(generation).model_files()
    if not any(name.endswith(".safetensors") for name in names):
        raise DataError(f"{source.uri}: no model here; {target.uri} stays as it is")
    live, own = _published(workspace, source, names)
    in_the_way = sorted({entry.name for entry in target.find()} & names - own)
    if in_the_way:
        raise UsageError(f"{target.uri}/{in_the_way[0]}: not written by this workspace; move it away")
    # Recorded first, so that files left by an interruption are known to be ours.
    target.write_json(MARK, {"generation": live, "files": sorted(own | names)})
    for name in sorted(names, key=lambda name: (name.endswith(".safetensors"), name)):
        target.write(name, source.read(name))
    target.write_json(MARK, {"generation": generation, "files": sorted(own | names)})
    if own - names:
        target.remove_files(sorted(own - names))
        target.write_json(MARK, {"generation": generation, "files": sorted(names)})


def unpublish(workspace: Workspace) -> None:
    """Remove the live model; files of others in its folder stay."""
    workspace.model.remove_files([*_mark(workspace).get("files", []), MARK])


def live_generation(workspace: Workspace) -> int | None:
    """Return the generation whose model is live; None if none was published."""
    live = _mark(workspace).get("generation")
    return None if live is None else int(live)


def is_published(workspace: Workspace, generation: int) -> bool:
    """Return whether a generation is live and nothing of the model before is left in `model/`."""
    mark = _mark(workspace)
    if mark.get("generation") != generation:
        return False
    return "files" not in mark or set(mark["files"]) == workspace.train(generation).model_files()


def _mark(workspace: Workspace) -> dict[str, Any]:
    try:
        mark: dict[str, Any] = workspace.model.read_json(MARK)
    except FileNotFoundError:
        return {}
    return mark


def _published(workspace: Workspace, source: Folder, names: set[str]) -> tuple[int | None, set[str]]:
    """The live generation and the files in `model/` that are known to have been published."""
    mark = _mark(workspace)
    if "files" in mark:
        return mark["generation"], set(mark["files"])
    if mark:
        # Of an older version, which did not list files and left none of others.
        before = workspace.train(mark["generation"]).model_files()
        return mark["generation"], before | names
    # Nothing was published, or an older version was interrupted: its copies are equal to their source.
    found = [entry.name for entry in workspace.model.find() if entry.name in names]
    return None, {name for name in found if workspace.model.read(name) == source.read(name)}


def check_workspace(config: RunConfig) -> None:
    """Raise UsageError if the workspace is a folder of the user's own data, which a run would mix with its files.

    A new workspace must hold nothing in the places of artifacts, and no input may be read from these.
    """
    workspace = Workspace(config)
    root = workspace.root
    for key, paths, folder in (
        ("corpus.paths", config.corpus.paths, root.child("corpus")),
        ("train.model", [config.train.model], workspace.model),
    ):
        for path in paths:
            if _is_address(path) and f"{normalise_uri(path)}/".startswith(f"{folder.uri}/"):
                raise UsageError(
                    f"{key}: {path} is in the workspace's own {folder.uri}, which is replaced; choose another workspace"
                )
    if root.is_local and os.path.exists(root.path()) and not os.path.isdir(root.path()):
        raise UsageError(f"workspace: {root.uri} is a file, not a folder")
    names = root.list()
    if any(map(_GENERATION.fullmatch, names)) or _is_begun(root.child("corpus")) or _has_summary(root):
        foreign = [f"model/{name}" for name in _foreign_model(workspace)] if "model" in names else []
    else:
        foreign = [name for name in _PLACES if name in names and _is_foreign(root, name)]
    if foreign:
        raise UsageError(
            f"workspace: {root.uri} holds {foreign[0]}, which no run has made; choose an empty or another folder"
        )


def _is_address(path: str) -> bool:
    return path.startswith(("/", "s3://", "s3a://", "file://"))


def _is_begun(folder: Folder, depth: int = 3) -> bool:
    """Return whether a folder holds a trace of this product."""
    names = folder.list()[:_LOOKED_AT]
    if any(name in (MANIFEST, RECEIPTS, EXCHANGE, MARK) or is_own_name(name) for name in names):
        return True
    return depth > 1 and any(_is_begun(folder.child(name), depth - 1) for name in names)


def _is_foreign(root: Folder, name: str) -> bool:
    return not _is_begun(root.child(name)) and bool(root.find(name) or root.child(name).find())


def _has_summary(root: Folder) -> bool:
    try:
        summary = root.read_json("metrics.json")
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(summary, dict) and "live_generation" in summary


def _foreign_model(workspace: Workspace) -> list[str]:
    """Files in `model/` if nothing was published there and no training could have been about to."""
    if _mark(workspace) or workspace.trained_model().list():
        return []
    return [entry.name for entry in workspace.model.find()]

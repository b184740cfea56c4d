"""`model/`: the live model of a workspace, a copy of one generation's."""

from __future__ import annotations

from clusterbatch.store.workspace import Workspace

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

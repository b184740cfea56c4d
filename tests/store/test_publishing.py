"""The live model: what is copied, what is removed, and what is never touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from clusterbatch.config import RunConfig
from clusterbatch.errors import DataError, InfrastructureError, UsageError
from clusterbatch.store import Folder
from clusterbatch.store.lease import workspace_lease
from clusterbatch.store.workspace import MARK, Workspace, live_generation, publish


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two trained models; the second has a file less and another more."""
    found = Workspace(RunConfig(workspace=str(tmp_path)))
    for generation, names in enumerate(
        (["config.json", "model.safetensors", "old.txt"], ["model.safetensors", "new.txt"])
    ):
        for name in names:
            found.trained_model(generation).write(name, f"{name} {generation}".encode())
    return found


def _model(workspace: Workspace) -> dict[str, str]:
    return {
        entry.name: workspace.model.read(entry.name).decode() for entry in workspace.model.find() if entry.name != MARK
    }


def _of(workspace: Workspace, generation: int) -> dict[str, str]:
    source = workspace.trained_model(generation)
    return {entry.name: source.read(entry.name).decode() for entry in source.find()}


def test_the_live_model_is_that_of_its_generation(workspace: Workspace) -> None:
    for generation in (0, 1, 0):
        publish(workspace, generation)
        assert _model(workspace) == _of(workspace, generation)
        assert live_generation(workspace) == generation


def test_files_of_others_stay_and_are_not_written_over(workspace: Workspace) -> None:
    workspace.model.write("notes.txt", b"mine")
    publish(workspace, 0)
    publish(workspace, 1)
    assert _model(workspace) == {**_of(workspace, 1), "notes.txt": "mine"}
    workspace.model.write("config.json", b"mine")
    with pytest.raises(UsageError, match=r"model/config\.json: not written by this workspace"):
        publish(workspace, 0)
    assert _model(workspace) == {**_of(workspace, 1), "notes.txt": "mine", "config.json": "mine"}
    assert live_generation(workspace) == 1


@pytest.mark.parametrize("left", [[], ["1_Normalize/config.json"]], ids=["nothing", "no weights"])
def test_a_generation_without_a_model_leaves_the_live_one_alone(workspace: Workspace, left: list[str]) -> None:
    publish(workspace, 1)
    workspace.trained_model(0).remove()
    for name in left:
        workspace.trained_model(0).write(name, b"{}")
    with pytest.raises(DataError, match="no model here"):
        publish(workspace, 0)
    assert _model(workspace) == _of(workspace, 1)
    assert live_generation(workspace) == 1


def test_what_an_older_version_has_published_is_replaced(workspace: Workspace) -> None:
    publish(workspace, 0)
    workspace.model.write_json(MARK, {"generation": 0})
    publish(workspace, 1)
    assert _model(workspace) == _of(workspace, 1)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("writes", range(1, 8))
def test_a_publication_that_is_cut_off_is_finished_by_the_next(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    workspace.model.write("notes.txt", b"mine")
    publish(workspace, 0)
    original, left = Folder.write, writes

    def write(self: Folder, name: str, data: bytes | memoryview) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise _Killed
        original(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", write)
        try:
            publish(workspace, 1)
        except _Killed:
            assert live_generation(workspace) in (0, 1)
    publish(workspace, 0)
    assert _model(workspace) == {**_of(workspace, 0), "notes.txt": "mine"}


@pytest.mark.parametrize("name", ["corpus/pairs.jsonl", "model/model.safetensors", "report/index.html", "metrics.json"])
def test_a_folder_of_other_data_is_not_made_a_workspace(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(UsageError, match=f"workspace: {tmp_path} holds {name.partition('/')[0]}"),
        workspace_lease(RunConfig(workspace=str(tmp_path))),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [name.partition("/")[0]]


@pytest.mark.parametrize("content", ["3", "[]", "null"])
def test_a_summary_of_somebody_else_is_no_summary(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UsageError, match=r"holds metrics\.json"), workspace_lease(RunConfig(workspace=str(tmp_path))):
        pass


def test_a_file_is_no_workspace_and_nothing_is_below_it(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"pairs\.jsonl is a file"), workspace_lease(RunConfig(workspace=str(file))):
        pass
    folder = Folder(str(file))
    with pytest.raises(FileNotFoundError):
        folder.read("metrics.json")
    with pytest.raises(InfrastructureError, match=r"pairs\.jsonl/metrics\.json: "):
        folder.write("metrics.json", b"{}")
    assert file.read_text() == "mine"


@pytest.mark.parametrize("changes", [{"corpus": {"paths": ["corpus"]}}, {"train": {"model": "model"}}])
def test_inputs_are_not_read_from_where_they_would_be_replaced(
    tmp_path: Path, changes: dict[str, dict[str, object]]
) -> None:
    (tmp_path / "model").mkdir()
    [(section, values)] = changes.items()
    placed = {
        key: [f"{tmp_path}/{value[0]}/x.jsonl"] if isinstance(value, list) else f"{tmp_path}/{value}"
        for key, value in values.items()
    }
    config = RunConfig.model_validate({"workspace": str(tmp_path), section: placed})
    with pytest.raises(UsageError, match=r"is in the workspace's own"), workspace_lease(config):
        pass


def test_a_workspace_that_is_begun_or_holds_unrelated_files_is_taken(tmp_path: Path) -> None:
    config = RunConfig(workspace=str(tmp_path))
    (tmp_path / "pairs.jsonl").write_text("mine")
    (tmp_path / "corpus").mkdir()
    with workspace_lease(config):
        pass
    Workspace(config).corpus.write_part("part", "parquet", b"x", 1)
    with workspace_lease(config):
        pass

"""Random histories of a workspace against a simple model of it: the live model, the one to roll back to, user files.

Stages are fakes that write real artifacts of a few bytes in milliseconds, so that hundreds of histories fit in a test.
Runs, rounds, roll-backs, appended rows, cleaning and `--force` follow each other, each possibly killed after any write
or removal; between them, foreign files and empty objects of folders appear anywhere.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from clusterbatch.config import RunConfig, StorageConfig, fingerprint, with_changes
from clusterbatch.errors import OtherWorkError, UsageError
from clusterbatch.pipeline import refresh as refresh_module
from clusterbatch.pipeline import run as run_module
from clusterbatch.pipeline.clean import clean
from clusterbatch.pipeline.refresh import CALL, refresh, rollback
from clusterbatch.pipeline.rounds import rollback_target, rounds, settle
from clusterbatch.pipeline.run import Stage, run_all
from clusterbatch.store import Artifact, Counts, Folder, Part, Receipt
from clusterbatch.store.workspace import MARK, Workspace, live_generation, publish

_STEPS = 10
_FOREIGN = [
    "notes.txt",
    "corpus/mine.parquet",
    "model/mine.md",
    "generation=000/mine",
    "generation=000/train/mine.json",
]
_FOREIGN += [f"generation=000/train/{place}/mine" for place in ("model", "_ray", "metrics", "checkpoints", "_receipts")]
_FOREIGN += ["generation=001/train/checkpoints/step=00000001/mine", "generation=001/train/model/mine"]
_FOREIGN += ["corpus/_receipts/mine.json", "corpus/_exchange/mine", "generation=000/clusters/_exchange/fit/mine"]
_FOREIGN += ["generation=001/mine", "generation=001/train/notes.txt", "generation=002/embeddings/x-20240101.parquet"]


class _Killed(BaseException):
    pass


class _Fakes:
    """Stages of a few bytes. What a training made shows in its weights: configuration and generation it came from."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.promotes = True
        patch.setattr(run_module, "STAGES", self.stages())
        for module in (run_module, refresh_module):
            patch.setattr(module, "lasting_session", _nothing)
        for name in ("check_workers", "check_models", "check_collections"):
            patch.setattr(run_module, name, lambda *arguments, **options: None)
        # The models of these stages cannot be read.
        for name in ("check_models", "check_text_limits"):
            patch.setattr(refresh_module, name, lambda *arguments: None)
        patch.setattr(run_module, "write_report", lambda config: "")
        # It plans the fingerprints that the real stages would leave.
        patch.setattr(run_module, "check_no_other_work", lambda *arguments: None)
        patch.setattr(refresh_module, "train", self.train)
        patch.setattr(refresh_module, "evaluate", self.evaluate)
        patch.setattr(
            refresh_module, "_drift", lambda *arguments: {"drift": 1.0, "mutual_information": 0, "hardness": 0}
        )
        patch.setattr(refresh_module, "wanted", lambda *arguments: (True, False))
        patch.setattr(refresh_module, "new_clusters", self.new_clusters)
        patch.setattr(refresh_module, "_judged", self.judged)

    def stages(self) -> list[Stage]:
        return [
            Stage("ingest", self.ingest, lambda workspace, _: workspace.corpus),
            Stage("embed", self.embed, Workspace.embeddings),
            Stage("cluster", self.cluster, Workspace.clusters),
            Stage("train", self.train, Workspace.train),
            Stage("evaluate", self.evaluate, Workspace.evaluation),
        ]

    def _make(self, artifact: Artifact, identity: str, force: bool, inputs: dict[str, str] | None = None) -> Any:
        manifest = artifact.manifest()
        if manifest is not None and manifest.fingerprint == identity and not force:
            return manifest
        done = artifact.begin(identity, force)
        receipts = list(done.values())
        for unit in {0, 1} - set(done):
            part = artifact.write_part(f"unit-{unit:08d}", "bin", identity.encode(), 1)
            receipts.append(Receipt(unit=unit, fingerprint=identity, parts=[part], counts=Counts(read=1, written=1)))
            artifact.write_receipt(receipts[-1])
        details = {"steps": 1, "vectors": 0, "table": []}
        return artifact.commit(identity, receipts, config={}, inputs=inputs or {}, seconds=0.0, details=details)

    def ingest(self, config: RunConfig, *, generation: int = 0, force: bool = False) -> Any:
        manifest = Workspace(config).corpus.manifest()
        if manifest is not None and manifest.version > 1 and not force:
            return manifest
        return self._make(Workspace(config).corpus, fingerprint("corpus", config.corpus.source), force)

    def append(self, config: RunConfig) -> None:
        corpus = Workspace(config).corpus
        base = corpus.require()
        version = corpus.next_version(base)
        self._make(version, fingerprint("version", base.fingerprint), False)

    def embed(self, config: RunConfig, *, generation: int = 0, force: bool = False) -> Any:
        return self._make(Workspace(config).embeddings(generation), fingerprint("embed", generation), force)

    def cluster(self, config: RunConfig, *, generation: int = 0, force: bool = False) -> Any:
        return self._make(Workspace(config).clusters(generation), fingerprint("cluster", generation), force)

    def new_clusters(
        self, config: RunConfig, workspace: Workspace, clusters: int, generation: int, force: bool, frozen: bool
    ) -> dict[str, Any]:
        embed = self.embed(config, generation=generation)
        return {"embed": embed, "cluster": self.cluster(config, generation=generation)}

    def train(self, config: RunConfig, *, generation: int = 0, force: bool = False, continued: Any = None) -> Any:
        workspace = Workspace(config)
        artifact = workspace.train(generation)
        base = "" if continued is None else weights(workspace.trained_model(continued.base))
        model = f"{base}>{generation}:{config.train.learning_rate if continued is None else ''}"
        identity = fingerprint("train", model)
        if artifact.is_done(identity) and not force:
            return artifact.require()
        artifact.begin(identity, force)
        checkpoint = artifact.folder.child("checkpoints", "step=00000001")
        if checkpoint.exists("manifest.json") and checkpoint.read_json("manifest.json")["run"] != identity:
            if not force:
                raise OtherWorkError("holds checkpoints of another configuration")
            artifact.remove("checkpoints")
        checkpoint.write_json("manifest.json", {"run": identity, "run_fingerprint": identity, "parts": []})
        # Each generation has a file that others lack.
        files = {f"only-{generation % 2}.json": b"{}", "model.safetensors": model.encode()}
        parts = [Part(path=f"model/{name}", rows=0, bytes=len(data), checksum="") for name, data in files.items()]
        artifact.write_receipt(Receipt(unit=2, fingerprint=identity, parts=parts))
        for name, data in files.items():
            workspace.trained_model(generation).write(name, data)
        if continued is None and not live_generation(workspace):
            publish(workspace, generation)
        return self._make(artifact, identity, False)

    def evaluate(self, config: RunConfig, *, generation: int = 0, force: bool = False) -> Any:
        trained = Workspace(config).train(generation).require().fingerprint
        return self._make(Workspace(config).evaluation(generation), fingerprint("evaluate", trained), force)

    def judged(self, config: RunConfig, workspace: Workspace, record: Any, made: Any) -> Any:
        assert made["train"].fingerprint
        return record.model_copy(update={"promoted": self.promotes, "own_value": 1.0, "live_value": 1.0, "steps": 1})


@contextmanager
def _nothing(*arguments: Any) -> Iterator[None]:
    yield


def weights(folder: Folder) -> str:
    return folder.read("model.safetensors").decode()


@dataclass
class _Model:
    """What must be true: lineage of each generation's weights, those that were live in turn, and the user's files.

    `live` is a stack: its top is live, the one below it is what a roll-back returns to.
    """

    weights: dict[int, str] = field(default_factory=dict)
    live: list[int] = field(default_factory=list)
    rounds: int = 0
    rate: float = 0.1
    files: dict[str, bytes] = field(default_factory=dict)
    cleaned: set[int] = field(default_factory=set)

    def trained_first(self, rate: float) -> None:
        self.weights[0], self.rate, self.live = f">0:{rate}", rate, [0]
        self.cleaned.discard(0)

    def round(self, promotes: bool) -> None:
        self.rounds += 1
        self.weights[self.rounds] = f"{self.weights[self.live[-1]]}>{self.rounds}:"
        if promotes:
            self.live.append(self.rounds)


class _History:
    def __init__(self, seed: int, config: RunConfig, patch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        self.config, self.patch = config, patch
        self.workspace = Workspace(config)
        self.fakes = _Fakes(patch)
        self.model = _Model()
        self.log: list[str] = []

    def play(self, steps: int) -> None:
        actions: list[Callable[[], None]] = [self.run, self.refresh, self.refresh, self.refresh, self.rollback]
        actions += [self.clean, self.clean, self.append, self.force, self.strew, self.strew, self.mark]
        self.run()
        for _ in range(steps):
            self.random.choice(actions)()
            self.check()

    def run(self) -> None:
        self._call("run", lambda config: run_all(config))
        if not self.model.live:
            self.model.trained_first(self.config.train.learning_rate)

    def refresh(self) -> None:
        """Rounds to their end; or a call that is killed and left, so that something else comes next."""
        self.fakes.promotes = promotes = self.random.random() < 0.7
        count = self.random.choice([1, 2])
        if self.workspace.root.exists(CALL):
            count = self.workspace.root.read_json(CALL)["last"] - self.model.rounds

        def action(config: RunConfig) -> None:
            refresh(with_changes(config, {"refresh.rounds": max(1, count)}))

        if self.random.random() < 0.4:
            self.log.append(f"refresh {count} {promotes}, left if killed")
            killed = self._attempt(action)
        else:
            self._call(f"refresh {count} {promotes}", action)
            killed = False
        over = sum(record.promoted is not None for record in rounds(self.workspace)) - self.model.rounds
        assert 0 <= over <= count if killed else over == count, "\n".join(self.log)
        for _ in range(over):
            self.model.round(promotes)
        if killed:
            self._call("settle", lambda config: settle(self.workspace))

    def rollback(self) -> None:
        if len(self.model.live) > 1 and self.model.live[-2] in self.model.cleaned:
            with pytest.raises(UsageError, match="removed, so there is no model"):
                rollback(self.config)
            return
        if len(self.model.live) < 2:
            with pytest.raises(UsageError, match="none to roll back to"):
                rollback(self.config)
            return
        wanted = (self.model.live.pop(), self.model.live[-1])
        self.log.append("rollback")
        killed = self._attempt(rollback)
        if killed and rollback_target(self.workspace) is not None and live_generation(self.workspace) == wanted[0]:
            # Before it was written down nothing has happened, after that any command finishes it.
            records = {record.generation: record for record in rounds(self.workspace)}
            if not records[wanted[0]].rolled_back:
                self._call("rollback again", rollback)
                return
        self._call("settle", lambda config: settle(self.workspace))

    def clean(self) -> None:
        keep, before = self.random.choice([1, 1, 2]), self.model.cleaned
        self._call(f"clean {keep}", lambda config: clean(config, keep=keep, dry_run=False))
        numbers = range(self.model.rounds + 1)
        self.model.cleaned = {each for each in numbers if self.workspace.train(each).manifest() is None}
        # The live one and the one before it stay, unless that went when it was neither.
        assert not self.model.cleaned & set(self.model.live[-2:]) - before, "\n".join(self.log)

    def append(self) -> None:
        self._call("append", self.fakes.append)

    def force(self) -> None:
        """Another learning rate: refused, then with --force in place of the first generation."""
        changed = with_changes(self.config, {"train.learning_rate": self.model.rate + self.random.choice([0.1, 0.2])})
        gone = self.workspace.train().manifest() is None
        if not gone:
            with pytest.raises(UsageError, match=r"--force|another configuration"):
                run_all(changed)
        self.config = changed
        self._call("run --force", lambda config: run_all(config, force=True))
        self.model.trained_first(changed.train.learning_rate)

    def strew(self) -> None:
        name = self.random.choice(_FOREIGN)
        self.log.append(f"strew {name}")
        self.model.files[name] = f"mine {len(self.log)}".encode()
        self.workspace.root.write(name, self.model.files[name])

    def mark(self) -> None:
        """As copying tools do: empty objects for folders, empty folders on a disk."""
        name = self.random.choice(["corpus", "model", "model/deep", "generation=000", "generation=001/train/model"])
        self.log.append(f"mark {name}")
        if self.workspace.root.is_local:
            Path(self.workspace.root.path(name)).mkdir(parents=True, exist_ok=True)
        else:
            bucket, _, key = self.workspace.root.path(name).partition("/")
            self.workspace.root.filesystem.call_s3("put_object", Bucket=bucket, Key=f"{key}/", Body=b"")

    def check(self) -> None:
        root, model = self.workspace.root, self.model
        trail = "\n".join(self.log)
        assert live_generation(self.workspace) == model.live[-1], trail
        assert weights(self.workspace.model) == model.weights[model.live[-1]], trail
        inside = f"generation={model.live[-1]:03d}/train/model/"
        own = {entry.name for entry in self.workspace.trained_model(model.live[-1]).find()}
        own -= {name.removeprefix(inside) for name in model.files}
        foreign = {name.removeprefix("model/") for name in model.files if name.startswith("model/")}
        assert {entry.name for entry in self.workspace.model.find()} == own | foreign | {MARK}, trail
        target = rollback_target(self.workspace)
        assert target == (model.live[-2] if len(model.live) > 1 else None), trail
        if target is not None and target not in model.cleaned:
            assert weights(self.workspace.trained_model(target)) == model.weights[target], trail
        over = [record.generation for record in rounds(self.workspace) if record.promoted is not None]
        assert over == list(range(1, model.rounds + 1)), trail
        for name, data in model.files.items():
            assert root.read(name) == data, f"{name}\n{trail}"

    def _call(self, what: str, action: Callable[[RunConfig], Any]) -> None:
        """The action, begun again as often as it is killed; in the end what it leaves is the same."""
        self.log.append(what)
        while self._attempt(action):
            self.log.append(f"{what}, killed")
            if self.workspace.model.exists(MARK) and live_generation(self.workspace) is not None:
                assert weights(self.workspace.model), "\n".join(self.log)

    def _attempt(self, action: Callable[[RunConfig], Any]) -> bool:
        """Whether the action was killed on its way."""
        left = self.random.choice([1_000_000, 1_000_000, self.random.randint(1, 12), self.random.randint(1, 60)])

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise _Killed
                return original(*arguments, **options)

            return counted

        with self.patch.context() as patch:
            for verb in ("write", "remove"):
                patch.setattr(Folder, verb, counting(getattr(Folder, verb)))
            try:
                action(self.config)
            except _Killed:
                return True
        return False


def history_config(folder: Path, workspace: str, storage: StorageConfig | None = None) -> RunConfig:
    """A configuration whose input is in `folder`: it must be there, but no stage reads it."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"query": "a question", "document": "an answer"}\n')
    return RunConfig.model_validate(
        {
            "workspace": workspace,
            "storage": storage or StorageConfig(),
            "corpus": {"paths": [str(pairs)]},
            "train": {"learning_rate": 0.1},
        }
    )


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: small files are what these histories consist of."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 400), marks=pytest.mark.faults)], ids=["some", "many"]
)
def test_on_disk_every_history_ends_as_the_model_says(
    seeds: range, quick_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in seeds:
        play_history(seed, history_config(quick_folder, f"{quick_folder}/{seed}"), monkeypatch)


def play_history(seed: int, config: RunConfig, monkeypatch: pytest.MonkeyPatch, steps: int = _STEPS) -> None:
    with monkeypatch.context() as patch:
        history = _History(seed, config, patch)
        try:
            history.play(steps)
        except Exception as error:
            trail = "\n".join(history.log)
            raise AssertionError(f"history {seed}: {error}\n{trail}") from error

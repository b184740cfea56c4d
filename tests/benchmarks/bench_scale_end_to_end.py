"""The whole pipeline over generated corpora of several sizes, and how each step grows.

    python -m tests.benchmarks.bench_scale_end_to_end [FOLDER] [--pairs 1e5 1e6] [--steps 2000] [--bucket URI]
        [--local] [--until STEP] [--kill]

Every command of the pipeline runs in a process of its own, on two workers of a local Ray, or of this machine without
Ray (--local): ingest with a held-out collection and decontamination, embed (static vectors), cluster (mean size 512,
two levels), train (static encoder, batches of 256), evaluate, append a tenth, one refresh round, report, inspect, clean
(which only lists); --until names the last to run. Printed for each: wall seconds, seconds of the workers' own clocks
(start-up apart), CPU seconds, the most memory that driver and workers held, requests, bytes and objects; then, between
sizes, the exponents e of figure ~ pairs^e. `python -m tests.integration.s3.swift` serves a bucket, whose server's CPU
seconds are not counted.

--kill kills each stage at a random moment, with all its processes, on a second copy, and reports what the resumed run
did again. Figures of steps that ended are kept in FOLDER, so that an interrupted benchmark continues;
without one, everything is in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import yaml

from clusterbatch.config import RunConfig
from clusterbatch.config.load import load_config
from clusterbatch.store.artifact import Artifact
from clusterbatch.store.workspace import Workspace
from tests.benchmarks.figures import emit
from tests.benchmarks.generated_corpus import write_corpus

SECONDS_BETWEEN_LOOKS = 0.5
# What costs, by its name in a step's record.
MEASURES = ("worker_seconds", "cpu_seconds", "driver_bytes", "all_bytes", "requests", "objects")
HOLDOUT = 2_000
STAGES = ("ingest", "embed", "cluster", "train", "evaluate")
STEPS = (*STAGES, "append", "refresh", "report", "inspect", "clean")


class Watched:
    """A command, with what it and its descendants used: CPU seconds, and the most memory at once (PSS).

    CPU seconds are read twice a second, so those of processes that live more briefly are missed.
    """

    def __init__(self, words: list[str], log: Path, kill_after: float | None = None) -> None:
        start = time.perf_counter()
        self.driver_bytes = self.all_bytes = 0
        cpu: dict[tuple[int, float], float] = {}
        with log.open("ab") as output:
            process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
            driver = psutil.Process(process.pid)
            self.killed = False
            while process.poll() is None:
                looked = time.perf_counter()
                held = 0
                for each in _family(driver):
                    try:
                        used = each.memory_full_info().pss
                        times = each.cpu_times()
                        cpu[each.pid, each.create_time()] = times.user + times.system
                    except psutil.Error:
                        continue
                    held += used
                    if each.pid == process.pid:
                        self.driver_bytes = max(self.driver_bytes, used)
                self.all_bytes = max(self.all_bytes, held)
                if kill_after is not None and looked - start > kill_after:
                    for each in _family(driver):
                        try:
                            each.send_signal(signal.SIGKILL)
                        except psutil.Error:
                            continue
                    self.killed = True
                time.sleep(SECONDS_BETWEEN_LOOKS)
        self.seconds = time.perf_counter() - start
        self.cpu_seconds = sum(cpu.values())
        self.code = process.returncode


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def static_model(folder: Path) -> str:
    """Write the static vectors that embed the corpus: MiniLM's token embeddings, averaged."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, StaticEmbedding

    from clusterbatch.encoder.resolve import resolve_model

    if not (folder / "modules.json").exists():
        base = SentenceTransformer(str(resolve_model("all-MiniLM-L6-v2")), device="cpu")
        weights = base[0].auto_model.embeddings.word_embeddings.weight.detach()
        table = StaticEmbedding(base.tokenizer._tokenizer, embedding_weights=weights.numpy())
        SentenceTransformer(modules=[table, Normalize()], device="cpu").save(str(folder))
    return str(folder)


def configuration(folder: Path, workspace: str, steps: int, local: bool) -> dict[str, Any]:
    return {
        "workspace": workspace,
        "corpus": {"paths": [str(folder / "pairs")]},
        "embed": {"model": static_model(folder.parent / "static-model")},
        "cluster": {"mean_size": 512, "levels": 2},
        "batches": {"size": 256},
        "train": {"model": "all-MiniLM-L6-v2", "encoder": "static", "steps": steps, "workers": 2},
        # Of all sizes the same: the search's cost is the product of queries and documents.
        "evaluate": {"holdout": HOLDOUT},
        "refresh": {"every_steps": max(1, steps // 4), "margin": 1.0},
        "ray": {"mode": "local"} if local else {"num_cpus": 2, "object_store_memory": 2**30},
    }


def commands(folder: Path) -> dict[str, list[str]]:
    both = json.dumps([str(folder / "pairs"), str(folder / "more")])
    grown = [f"corpus.paths={both}"]
    return {
        **{stage: [stage] for stage in STAGES},
        "append": ["ingest", "--append", *grown],
        "refresh": ["refresh", *grown],
        "report": ["report", *grown],
        "inspect": ["inspect", *grown],
        "clean": ["clean", *grown],
    }


def measure(
    folder: Path, pairs: int, steps: int, bucket: str | None = None, local: bool = False, until: str = STEPS[-1]
) -> dict[str, dict[str, Any]]:
    """Run what has not run yet of one size; return the records of all its steps."""
    write_corpus(folder / "pairs", pairs)
    write_corpus(folder / "more", pairs // 10, first=pairs)
    workspace = f"{bucket.rstrip('/')}/{folder.name}" if bucket else str(folder / "workspace")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(configuration(folder, workspace, steps, local)))
    config = load_config(str(path))
    kept = folder / "records.json"
    records: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, words in commands(folder).items():
        if name in records or STEPS.index(name) > STEPS.index(until):
            continue
        print(f"{pairs:,} pairs: {name} ...", file=sys.stderr, flush=True)
        done = Watched(_command(words, path), folder / f"{name}.log")
        assert done.code == 0, f"{name} ended with {done.code}: see {folder / f'{name}.log'}"
        records[name] = {
            "seconds": done.seconds,
            "cpu_seconds": done.cpu_seconds,
            "driver_bytes": done.driver_bytes,
            "all_bytes": done.all_bytes,
            **_of_artifact(name, config),
        }
        kept.write_text(json.dumps(records, indent=1))
    return records


def _command(words: list[str], path: Path) -> list[str]:
    options = [word for word in words[1:] if word.startswith("--")]
    overrides = [word for word in words[1:] if not word.startswith("--")]
    return [sys.executable, "-m", "clusterbatch", words[0], str(path), *overrides, *options]


def _artifact(name: str, config: RunConfig) -> Artifact | None:
    workspace = Workspace(config)
    places = {
        "ingest": workspace.corpus,
        "append": workspace.corpus,
        "embed": workspace.embeddings(),
        "cluster": workspace.clusters(),
        "train": workspace.train(),
        "evaluate": workspace.evaluation(),
    }
    return places.get(name)


def _of_artifact(name: str, config: RunConfig) -> dict[str, Any]:
    artifact = _artifact(name, config)
    if artifact is None:
        return {}
    manifest, entries = artifact.require(), list(artifact.folder.find())
    return {
        "worker_seconds": manifest.worker_seconds,
        "requests": manifest.traffic.reads + manifest.traffic.writes,
        "bytes": sum(entry.size for entry in entries),
        "objects": len(entries),
        "moved_bytes": manifest.traffic.bytes_read + manifest.traffic.bytes_written,
        "rows": manifest.counts.written,
        "rejected": manifest.counts.rejected,
        "set_aside": manifest.counts.set_aside,
    }


def resume(
    folder: Path, pairs: int, steps: int, records: dict[str, dict[str, Any]], seed: int, local: bool = False
) -> None:
    """Kill each stage once at a random moment and run it again: what was done twice, by the workers' own clocks."""
    copy = folder / "killed"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    path = copy / "run.yaml"
    path.write_text(yaml.safe_dump(configuration(folder, str(copy / "workspace"), steps, local)))
    config, moments = load_config(str(path)), random.Random(seed)
    for stage in STAGES:
        whole = records[stage]
        moment = moments.uniform(0.3, 0.9)
        first = Watched(_command([stage], path), copy / f"{stage}.log", kill_after=moment * whole["seconds"])
        second = Watched(_command([stage], path), copy / f"{stage}.log")
        assert second.code == 0, f"{stage}: the resumed run ended with {second.code}: see {copy / f'{stage}.log'}"
        found = _of_artifact(stage, config)
        assert found["rows"] == whole["rows"], f"{stage}: {found['rows']} rows, {whole['rows']} without interruption"
        emit(
            "seconds of a killed and resumed stage",
            first.seconds + second.seconds,
            "s",
            case=f"{stage}, {pairs:,} pairs",
            peer=whole["seconds"],
            killed=first.killed,
            killed_at=round(moment, 2),
            cpu_seconds=[round(first.cpu_seconds, 1), round(second.cpu_seconds, 1), round(whole["cpu_seconds"], 1)],
        )


def show(records: dict[int, dict[str, dict[str, Any]]]) -> None:
    for pairs, steps in records.items():
        for name, record in steps.items():
            case = f"{name}, {pairs:,} pairs"
            emit("seconds of a step", record["seconds"], "s", case=case, **{k: v for k, v in record.items() if v})
    sizes = sorted(records)
    for small, large in pairwise(sizes):
        for name, record in records[large].items():
            for measure_name in MEASURES:
                before, after = records[small].get(name, {}).get(measure_name), record.get(measure_name)
                if before and after:
                    emit(
                        f"exponent of {measure_name.replace('_', ' ')}",
                        math.log(after / before) / math.log(large / small),
                        case=f"{name}, {small:,} to {large:,} pairs",
                        figures=[before, after],
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--pairs", type=float, nargs="+", default=[1e5])
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--bucket", help="s3:// address for the workspaces; the pairs stay on disk")
    parser.add_argument("--local", action="store_true", help="without Ray")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1])
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    records = {}
    with tempfile.TemporaryDirectory() as temporary:
        for pairs in map(int, options.pairs):
            folder = (options.folder or Path(temporary)) / f"{pairs}"
            folder.mkdir(parents=True, exist_ok=True)
            records[pairs] = measure(
                folder.resolve(), pairs, options.steps, options.bucket, options.local, options.until
            )
            if options.kill:
                resume(folder.resolve(), pairs, options.steps, records[pairs], options.seed, options.local)
    show(records)


if __name__ == "__main__":
    main()

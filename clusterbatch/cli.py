"""The command line: `clusterbatch COMMAND [CONFIG.yaml] [key=value ...]`, one command per stage."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NoReturn

from clusterbatch import __version__
from clusterbatch.config import RunConfig, load_config
from clusterbatch.console import (
    print_cluster,
    print_comparison,
    print_intervals,
    print_prediction,
    print_quality,
    print_removals,
    print_rounds,
    print_tuning,
    print_workspace,
)
from clusterbatch.errors import ClusterbatchError, UsageError, root_cause
from clusterbatch.log import is_structured, log_context, say
from clusterbatch.store.lease import workspace_lease

# Models and tokenizers found on this machine are used as they are; progress bars of other libraries would break ours.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_STAGES = {
    "ingest": "read and check the corpus",
    "embed": "embed it with the surrogate",
    "cluster": "cluster it and write the shards that training reads",
    "train": "pretrain the model on same-cluster batches",
    "evaluate": "measure the model on the test collections",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 a bug, 2 usage, 3 data, 4 infrastructure, 130 interrupted, 143 terminated."""
    options = _parse(arguments)
    try:
        with _terminable():
            options.action(options)
    except _Terminated:
        say("clusterbatch: terminated; the same command continues where this one stopped", level="error", exit_code=143)
        return 143
    except KeyboardInterrupt:
        say(
            "clusterbatch: interrupted; the same command continues where this one stopped", level="error", exit_code=130
        )
        return 130
    except Exception as error:
        cause = root_cause(error)
        if not isinstance(cause, ClusterbatchError):
            if not is_structured():
                raise
            what = f"clusterbatch: a bug: {type(error).__name__}: {error}"
            say(what, level="error", exit_code=1, traceback=traceback.format_exc())
            return 1
        say(f"clusterbatch: {cause}", level="error", exit_code=cause.exit_code)
        return cause.exit_code
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as orchestrators send it before they kill: to be left like an interrupt."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between the words: argparse by itself takes only those before the first of them."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    unknown = [word for word in left if word.startswith("-") or "words" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if left:
        options.words += left
    return options


class _Parser(argparse.ArgumentParser):
    """A mistake in the words of a command is one object, too, where all lines are."""

    def error(self, message: str) -> NoReturn:
        if is_structured():
            say(f"{self.prog}: {message}", level="error", exit_code=UsageError.exit_code)
            self.exit(UsageError.exit_code)
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clusterbatch",
        description="Pretrain text-embedding models on batches of one semantic cluster each.",
        epilog="Configuration: a YAML file, then dotted overrides such as cluster.mean_size=1024.",
    )
    parser.add_argument("--version", action="version", version=f"clusterbatch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, what in _STAGES.items():
        stage = _with_config(commands, name, what, _stage, stage=name, estimate=True)
        if name == "ingest":
            stage.add_argument(
                "--append", action="store_true", help="add files that the corpus does not have, as its next version"
            )
    _with_config(
        commands,
        "run",
        "all stages, skipping what is done",
        _run,
        force="replace what another configuration made; what matches is kept",
        estimate=True,
    )
    _with_config(commands, "predict", "before any training: will clusters help on this corpus?", _predict)
    _with_config(commands, "tune", "settings by a cheap ranking and short runs; writes the chosen configuration", _tune)
    again = _with_config(commands, "refresh", "the next generations: re-embed, re-cluster, go on training", _refresh)
    again.add_argument("--rollback", action="store_true", help="return to the model that was live before, and stop")
    _with_config(commands, "report", "rebuild a workspace's report", _report)
    what = "batch strategies and seeds on the same data: table, verdict, report"
    compare = _with_config(commands, "compare", what, _compare)
    compare.add_argument("--budget", metavar="15m", help="time it may take; sample and steps are chosen to fit")
    inspect = _with_config(commands, "inspect", "what is in a workspace, or in one cluster", _inspect, force=None)
    inspect.add_argument(
        "--cluster", metavar="SOURCE/ID", help="one cluster: size, terms, neighbours, near and far rows"
    )
    clean = _with_config(
        commands, "clean", "what a workspace no longer needs; removes it with --yes", _clean, force=None
    )
    clean.add_argument(
        "--keep", type=int, default=1, help="finished generations, and checkpoints of each, to keep (default 1)"
    )
    clean.add_argument("--yes", action="store_true", help="remove it; without this it is only listed")
    sample = commands.add_parser("sample", help="write a real corpus mined from installed packages' docstrings")
    sample.add_argument("folder", metavar="DIR", help="where to write it: a local folder or s3://bucket/prefix")
    sample.add_argument("--pairs", type=int, default=18_000, help="at most so many pairs (default 18000)")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(action=_sample)
    return parser


def _with_config(
    commands: Any,
    name: str,
    what: str,
    function: Callable[[RunConfig, argparse.Namespace], None],
    *,
    force: str | None = "make it anew, in place of what is there",
    stage: str | None = None,
    estimate: bool = False,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + "."
    )
    command.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="a file first, overrides after it")
    command.add_argument("--json", action="store_true", help="print one machine-readable summary")
    if force:
        command.add_argument("--force", action="store_true", help=force)
    if estimate:
        command.add_argument("--dry-run", action="store_true", help="only say what time, memory and money it may take")

    def action(options: argparse.Namespace) -> None:
        words: list[str] = list(options.words)
        if getattr(options, "budget", None):
            words.append(f"compare.budget={options.budget}")
        path = words[0] if words and "=" not in words[0] else None
        config = load_config(path, words[1:] if path else words)
        with log_context(run=config.workspace):
            if estimate and options.dry_run:
                _dry_run(config, options)
            else:
                function(config, options)

    command.set_defaults(action=action, stage=stage)
    return command


def _dry_run(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.experiments.capacity.dry_run import dry_run

    dry_run(config, stages=[options.stage] if options.stage else None, as_json=options.json)


def _stage(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.corpus.ingest import ingest
    from clusterbatch.pipeline.run import STAGES, run_stage

    stage = next(stage for stage in STAGES if stage.name == options.stage)
    if getattr(options, "append", False):
        stage = replace(stage, function=partial(ingest, append=True))
    with workspace_lease(config):
        manifest = run_stage(stage, config, force=options.force)
    if options.json:
        print(manifest.model_dump_json(exclude={"parts"}))


def _run(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.pipeline.run import run

    with workspace_lease(config):
        report = run(config, force=options.force)
    _summary(config, report, options)


def _report(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.pipeline.report import write_report

    _summary(config, write_report(config), options)


def _compare(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.evaluation.checks import check_collections
    from clusterbatch.experiments.compare.report import DATA, write_comparison
    from clusterbatch.experiments.compare.stage import compare, comparison_artifact
    from clusterbatch.experiments.predict.experience import remember
    from clusterbatch.experiments.predict.stage import predict
    from clusterbatch.pipeline.report import write_report
    from clusterbatch.store import Folder

    check_collections(config)
    with workspace_lease(config):
        manifest = compare(config, force=options.force)
        if config.predict.experience is not None:
            rows = remember(config, comparison_artifact(config), manifest, predict(config)["sources"])
            say(f"compare   {rows} sources' outcomes are in {config.predict.experience}")
        write_report(config)
        page = write_comparison(config)
    found = Folder(page.rsplit("/", 1)[0], config.storage).read_json(DATA)
    if options.json:
        print(json.dumps({**found, "report": page}))
        return
    print_comparison(found, page)


def _predict(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.experiments.predict.stage import predict

    with workspace_lease(config):
        found = predict(config, force=options.force)
    if options.json:
        print(json.dumps(found))
        return
    print_prediction(found)


def _tune(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.evaluation.checks import check_collections
    from clusterbatch.experiments.tune.refresh_interval import RESULT, tune_refresh
    from clusterbatch.experiments.tune.stage import CHOSEN, tune

    if config.tune.stream is not None:
        with workspace_lease(config):
            found = tune_refresh(config, force=options.force)
        if options.json:
            print(json.dumps(found))
            return
        print_intervals(found, f"{config.workspace}/{RESULT}")
        return
    check_collections(config)
    with workspace_lease(config):
        found = tune(config, force=options.force)
    if options.json:
        print(json.dumps(found))
        return
    print_tuning(found, f"{config.workspace}/{CHOSEN}")


def _refresh(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.pipeline.refresh import refresh, rollback
    from clusterbatch.pipeline.report import write_report
    from clusterbatch.pipeline.summary import workspace_summary

    with workspace_lease(config):
        if options.rollback:
            live, target = rollback(config)
            say(f"refresh   generation {target} is live again, in place of {live}")
        else:
            refresh(config, force=options.force)
        report = write_report(config)
    summary = workspace_summary(config)
    if options.json:
        print(json.dumps({key: summary[key] for key in ("live_generation", "refresh")} | {"report": report}))
        return
    print_rounds(summary["refresh"], summary["live_generation"], report)


def _inspect(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.pipeline.inspect_workspace import inspect_named_cluster, inspect_workspace

    if options.cluster is not None:
        cluster = inspect_named_cluster(config, options.cluster)
        if options.json:
            print(json.dumps(cluster))
        else:
            print_cluster(cluster)
        return
    rows = inspect_workspace(config)
    if options.json:
        print(json.dumps(rows))
        return
    print_workspace(config.workspace, rows)


def _clean(config: RunConfig, options: argparse.Namespace) -> None:
    from clusterbatch.pipeline.clean import clean

    with workspace_lease(config):
        removals = clean(config, options.keep, dry_run=not options.yes)
    if options.json:
        print(json.dumps([asdict(removal) for removal in removals]))
        return
    print_removals(removals, removed=options.yes)


def _summary(config: RunConfig, report: str, options: argparse.Namespace) -> None:
    from clusterbatch.pipeline.report import gains
    from clusterbatch.pipeline.summary import workspace_summary

    summary = workspace_summary(config)
    if options.json:
        print(json.dumps({**summary, "report": report}))
    else:
        print_quality(gains(summary["quality"]), report)


def _sample(options: argparse.Namespace) -> None:
    from clusterbatch.corpus.docstrings import write_sample
    from clusterbatch.store import Folder

    if options.pairs < 100:
        raise UsageError(f"--pairs: at least 100 (got {options.pairs})")
    write_sample(Folder(options.folder), options.pairs, options.seed)
    print(f"sample corpus: {Folder(options.folder).uri}")


if __name__ == "__main__":
    sys.exit(main())

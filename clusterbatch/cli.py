"""The command line: `clusterbatch COMMAND [CONFIG.yaml] [key=value ...]`, one row of a table per command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from clusterbatch import console
from clusterbatch.config import RunConfig, load_config
from clusterbatch.errors import ClusterbatchError, UsageError, root_cause
from clusterbatch.log import configure_logging, is_structured, log_context, say
from clusterbatch.store.details import EvaluationDetails, details_of
from clusterbatch.store.lease import workspace_lease
from clusterbatch.version import __version__

# Models and tokenizers found on this machine are used as they are; progress bars of other libraries would break ours.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass(frozen=True)
class Outcome:
    """Result of a command: what `--json` prints, and how people see it."""

    data: Any
    show: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Option:
    """One option of a command, as argparse takes it."""

    flag: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command that takes a configuration.

    force: help of `--force`; None if the command has no such option. estimate: whether `--dry-run` estimates time and
    cost. exclusive: whether it holds the workspace's lease, so that no other run writes there. collections: whether it
    reads those of `evaluate.path`.
    """

    help: str
    function: Callable[[RunConfig, argparse.Namespace], Outcome]
    force: str | None = "replace the existing result"
    estimate: bool = False
    exclusive: bool = True
    collections: bool = False
    options: tuple[Option, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: a bug; 2: usage; 3: data; 4: infrastructure; 130: interrupted; 141: output closed; 143: terminated.
    """
    configure_logging()
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
    except BrokenPipeError:
        # Whoever read the output has closed it, as `head` does; Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
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
    """SIGTERM, which orchestrators send before they kill: handled like an interrupt."""


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


def _stage(config: RunConfig, options: argparse.Namespace) -> Outcome:
    if options.command == "ingest":
        # Before the imports that working on them takes.
        from clusterbatch.pipeline.check_inputs import check_inputs

        check_inputs(config)
    from clusterbatch.corpus.ingest import ingest
    from clusterbatch.evaluation.checks import check_given_collections
    from clusterbatch.pipeline.run import STAGES, run_stage

    stage = next(stage for stage in STAGES if stage.name == options.command)
    if COMMANDS[stage.name].collections:
        check_given_collections(config)
    if getattr(options, "append", False):
        stage = replace(stage, function=partial(ingest, append=True))
    manifest = run_stage(stage, config, force=options.force)
    data = manifest.model_dump(mode="json", exclude={"parts"})
    if stage.name == "evaluate":
        return Outcome(data, lambda: console.print_scores(details_of(manifest, EvaluationDetails)["table"]))
    return Outcome(data)


def _run(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.pipeline.check_inputs import check_inputs
    from clusterbatch.pipeline.finished import finished_report

    report = finished_report(config)
    if report is None:
        # Before the imports that working on them takes.
        check_inputs(config)
        from clusterbatch.pipeline.run import run

        report = run(config, force=options.force)
    return _summary(config, report)


def _report(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.experiments.compare.stage import comparison_artifact
    from clusterbatch.pipeline.report import write_report

    outcome = _summary(config, write_report(config))
    if comparison_artifact(config).manifest() is not None:
        compared = _comparison_report(config)
        outcome = Outcome({**outcome.data, "comparison": compared.data["report"]}, compared.show)
    if options.output:
        _copy_reports(config, options.output)
    return outcome


def _comparison_report(config: RunConfig) -> Outcome:
    from clusterbatch.experiments.compare.report import DATA, write_comparison
    from clusterbatch.store import Folder

    page = write_comparison(config)
    found = Folder(page.rsplit("/", 1)[0], config.storage).read_json(DATA)
    return Outcome({**found, "report": page}, lambda: console.print_comparison(found, page))


def _copy_reports(config: RunConfig, output: str) -> None:
    """Copy the pages to a local folder, where they keep their places beside each other."""
    from clusterbatch.errors import DataError
    from clusterbatch.store.workspace import Workspace

    for place in ("report", "compare/report"):
        pages = Workspace(config).root.child(*place.split("/"))
        for entry in pages.find():
            target = Path(output, place, entry.name).resolve()
            if not target.is_relative_to(Path(output).resolve()):
                raise DataError(f"{pages.uri}: {entry.name!r} would be written outside {output}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(pages.read(entry.name))
    say(f"report: copied to {output}")


def _summary(config: RunConfig, report: str) -> Outcome:
    from clusterbatch.pipeline.summary import gains, workspace_summary

    summary = workspace_summary(config)
    return Outcome({**summary, "report": report}, lambda: console.print_quality(gains(summary["quality"]), report))


def _compare(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.evaluation.checks import check_collections
    from clusterbatch.experiments.compare.stage import compare
    from clusterbatch.pipeline.report import write_report

    check_collections(config)
    compare(config, force=options.force)
    write_report(config)
    return _comparison_report(config)


def _predict(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.experiments.predict.stage import predict

    found = predict(config, force=options.force)
    return Outcome(found, lambda: console.print_prediction(found))


def _tune(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.evaluation.checks import check_collections
    from clusterbatch.experiments.tune.refresh_interval import RESULT, tune_refresh
    from clusterbatch.experiments.tune.stage import CHOSEN, tune

    if config.tune.stream is not None:
        intervals = tune_refresh(config, force=options.force)
        return Outcome(intervals, lambda: console.print_intervals(intervals, f"{config.workspace}/{RESULT}"))
    check_collections(config)
    found = tune(config, force=options.force)
    return Outcome(found, lambda: console.print_tuning(found, f"{config.workspace}/{CHOSEN}"))


def _refresh(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.pipeline.refresh import refresh, rollback
    from clusterbatch.pipeline.report import write_report
    from clusterbatch.pipeline.summary import workspace_summary

    if options.rollback:
        live, target = rollback(config)
        say(f"refresh   generation {target} is live again, in place of {live}")
    else:
        refresh(config, force=options.force)
    report = write_report(config)
    summary = workspace_summary(config)
    return Outcome(
        {key: summary[key] for key in ("live_generation", "refresh")} | {"report": report},
        lambda: console.print_rounds(summary["refresh"], summary["live_generation"], report),
    )


def _inspect(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.pipeline.inspect_workspace import (
        inspect_named_cluster,
        inspect_workspace,
        require_workspace,
    )

    if options.cluster is not None:
        cluster = inspect_named_cluster(config, options.cluster)
        return Outcome(cluster, lambda: console.print_cluster(cluster))
    rows = inspect_workspace(config)
    require_workspace(config, rows)
    return Outcome(rows, lambda: console.print_workspace(config.workspace, rows))


def _clean(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.pipeline.clean import clean

    removals = clean(config, options.keep, dry_run=not options.yes)
    return Outcome(
        [asdict(removal) for removal in removals], lambda: console.print_removals(removals, removed=options.yes)
    )


COMMANDS = {
    "ingest": Command(
        "read and check the corpus",
        _stage,
        estimate=True,
        collections=True,
        options=(
            Option("--append", {"action": "store_true", "help": "add new files to the corpus, as its next version"}),
        ),
    ),
    "embed": Command("embed it with the surrogate", _stage, estimate=True),
    "cluster": Command("cluster it and write the shards that training reads", _stage, estimate=True),
    "train": Command("pretrain the model on same-cluster batches", _stage, estimate=True),
    "evaluate": Command("measure the model on the test collections", _stage, estimate=True, collections=True),
    "run": Command(
        "all stages, skipping what is done",
        _run,
        force="replace what another configuration made; what matches is kept",
        estimate=True,
        collections=True,
    ),
    "predict": Command("estimate, before any training, how hard clustered batches would be on this corpus", _predict),
    "tune": Command("choose settings by a cheap ranking and short runs; write the chosen configuration", _tune),
    "refresh": Command(
        "make the next generations: embed, cluster and train again",
        _refresh,
        options=(
            Option("--rollback", {"action": "store_true", "help": "return to the previously live model, and stop"}),
        ),
    ),
    "report": Command(
        "rebuild a workspace's reports",
        _report,
        force=None,
        options=(Option("--output", {"metavar": "DIR", "help": "also copy them to a local folder"}),),
    ),
    "compare": Command(
        "compare batch strategies and seeds on the same data: table, verdict, report",
        _compare,
        estimate=True,
        collections=True,
        options=(
            Option("--budget", {"metavar": "15m", "help": "time it may take; sample and steps are chosen to fit"}),
        ),
    ),
    "inspect": Command(
        "show the contents of a workspace, or of one cluster",
        _inspect,
        force=None,
        exclusive=False,
        options=(
            Option(
                "--cluster",
                {"metavar": "SOURCE/ID", "help": "one cluster: size, terms, neighbours, near and far rows"},
            ),
        ),
    ),
    "clean": Command(
        "list what a workspace no longer needs; remove it with --yes",
        _clean,
        force=None,
        options=(
            Option(
                "--keep",
                {
                    "type": int,
                    "default": 1,
                    "help": "finished generations, and checkpoints of each, to keep (default 1)",
                },
            ),
            Option("--yes", {"action": "store_true", "help": "remove it; without this it is only listed"}),
        ),
    ),
}


def _perform(command: Command, options: argparse.Namespace) -> None:
    """Load the configuration, run the command and print its outcome."""
    words: list[str] = list(options.words)
    if getattr(options, "budget", None):
        words.append(f"compare.budget={options.budget}")
    path = words[0] if words and "=" not in words[0] else None
    config = load_config(path, words[1:] if path else words)
    with log_context(run=config.workspace):
        if command.estimate and options.dry_run:
            if command.collections:
                from clusterbatch.evaluation.checks import check_given_collections

                check_given_collections(config)
            if options.command == "compare":
                from clusterbatch.experiments.compare.plan import plan_comparison

                plan = plan_comparison(config)
                print(json.dumps(plan.as_dict()) if options.json else f"Nothing is run. {plan.sentence()}")
                return
            from clusterbatch.experiments.capacity.dry_run import dry_run

            stages = None if options.command == "run" else [options.command]
            dry_run(config, stages=stages, as_json=options.json)
            return
        with workspace_lease(config) if command.exclusive else nullcontext():
            outcome = command.function(config, options)
        if options.json:
            print(json.dumps(outcome.data))
        else:
            outcome.show()


def _show_config(options: argparse.Namespace) -> None:
    from clusterbatch.config.describe import as_yaml, describe

    if options.yaml:
        print(as_yaml(options.sections))
        return
    keys = describe(options.sections)
    if options.json:
        print(json.dumps([asdict(key) for key in keys]))
    else:
        console.print_keys(keys)


def _sample(options: argparse.Namespace) -> None:
    from clusterbatch.corpus.docstrings import write_sample
    from clusterbatch.store import Folder

    if options.pairs < 100:
        raise UsageError(f"--pairs: at least 100 (got {options.pairs})")
    write_sample(Folder(options.folder), options.pairs, options.seed)
    print(f"sample corpus: {Folder(options.folder).uri}")


class _Parser(argparse.ArgumentParser):
    """Print usage errors as JSON objects too, if log lines are JSON."""

    def error(self, message: str) -> NoReturn:
        if is_structured():
            say(f"{self.prog}: {message}", level="error", exit_code=UsageError.exit_code)
            self.exit(UsageError.exit_code)
        super().error(message)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; options may stand anywhere among the words."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    unknown = [word for word in left if word.startswith("-") or "words" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0])}")
    if left:
        options.words += left
    return options


def _hint(word: str) -> str:
    """Return advice if a configuration key was written like an option."""
    key = word.lstrip("-")
    return f" (configuration keys have no dashes: {key})" if "=" in key and word.startswith("--") else ""


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clusterbatch",
        description="Pretrain text-embedding models on batches of one semantic cluster each.",
        epilog="Configuration: a YAML file, then dotted overrides such as cluster.mean_size=1024; "
        "`clusterbatch config` lists all keys.",
    )
    parser.add_argument("--version", action="version", version=f"clusterbatch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        added = _add(commands, name, command.help)
        added.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="a file first, then overrides")
        added.add_argument("--json", action="store_true", help="print one machine-readable summary")
        if command.force:
            added.add_argument("--force", action="store_true", help=command.force)
        if command.estimate:
            added.add_argument("--dry-run", action="store_true", help="only estimate time, memory and cost")
        for option in command.options:
            added.add_argument(option.flag, **option.settings)
        added.set_defaults(action=partial(_perform, command), command=name)
    keys = _add(commands, "config", "the configuration's keys with types, defaults and meaning")
    keys.add_argument("sections", nargs="*", metavar="SECTION", help="only these sections, for example cluster")
    keys.add_argument("--yaml", action="store_true", help="print a configuration file with all defaults, explained")
    keys.add_argument("--json", action="store_true", help="print one machine-readable list")
    keys.set_defaults(action=_show_config)
    sample = _add(commands, "sample", "write a real corpus mined from installed packages' docstrings")
    sample.add_argument("folder", metavar="DIR", help="where to write it: a local folder or s3://bucket/prefix")
    sample.add_argument("--pairs", type=int, default=18_000, help="number of pairs, at most (default 18000)")
    sample.add_argument("--seed", type=int, default=0)
    sample.set_defaults(action=_sample)
    return parser


def _add(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:].rstrip("?") + ("?" if what.endswith("?") else ".")
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `clusterbatch COMMAND [CONFIG.yaml] [key=value ...]`."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

from clusterbatch import console
from clusterbatch.commands import COMMANDS, Command
from clusterbatch.config import RunConfig, load_config, load_words
from clusterbatch.errors import ClusterbatchError, UsageError, root_cause
from clusterbatch.json_text import json_text
from clusterbatch.log import configure_logging, is_structured, log_context, say
from clusterbatch.store.lease import workspace_lease
from clusterbatch.version import __version__

# Models and tokenizers found on this machine are used as they are; progress bars of other libraries would break ours.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: a bug; 2: usage; 3: data; 4: infrastructure; 130: interrupted; 141: output closed; 143: terminated.
    """
    configure_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What the locale cannot write of a name or a sign must not end a finished command, as little as in log lines.
        sys.stdout.reconfigure(errors="backslashreplace")
    options = _parse(arguments)
    try:
        with _terminable():
            options.action(options)
            # Otherwise Python does it at its exit, where a closed pipe is an error of its own.
            sys.stdout.flush()
    except _Terminated:
        say("clusterbatch: terminated; the same command continues where this one stopped", level="error", exit_code=143)
        return 143
    except KeyboardInterrupt:
        say(
            "clusterbatch: interrupted; the same command continues where this one stopped", level="error", exit_code=130
        )
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_output_closed():
            return 141
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


def _is_output_closed() -> bool:
    """Return whether the reader of the output has closed it, as `head` does. Pipes to workers may break as well."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    closed = [stream for stream, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for stream in closed:
        # Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    return bool(closed)


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


def _perform(command: Command, options: argparse.Namespace) -> None:
    """Load the configuration, run the command and print its outcome."""
    words: list[str] = list(options.words)
    if getattr(options, "budget", None):
        words.append(f"compare.budget={options.budget}")
    config = load_words(words)
    with log_context(run=config.workspace):
        if command.estimate and options.dry_run:
            _estimate(command, config, options)
            return
        with workspace_lease(config) if command.exclusive else nullcontext():
            outcome = command.function(config, options)
        if options.json:
            print(json_text(outcome.data))
        else:
            outcome.show()


def _estimate(command: Command, config: RunConfig, options: argparse.Namespace) -> None:
    if command.collections:
        from clusterbatch.evaluation.checks import check_given_collections

        check_given_collections(config)
    if options.command != "compare":
        from clusterbatch.experiments.capacity.dry_run import dry_run

        dry_run(config, stages=None if options.command == "run" else [options.command], as_json=options.json)
        return
    from clusterbatch.experiments.compare.budget import planned
    from clusterbatch.experiments.compare.plan import at_size, plan_comparison

    config, sizes = planned(config), config.compare.batch_sizes
    plans = [plan_comparison(at_size(config, size)) for size in sizes] or [plan_comparison(config)]
    if options.json:
        found = [plan.as_dict() for plan in plans]
        print(json_text(found if sizes else found[0]))
        return
    sentences = [plan.sentence() for plan in plans]
    named = [f"Batches of {size}: {text}" for size, text in zip(sizes, sentences, strict=False)]
    print("Nothing is run.", "\n".join(named or sentences))


def _show_config(options: argparse.Namespace) -> None:
    from clusterbatch.config.describe import as_yaml, describe, differences

    if options.difference:
        found = differences(*(load_config(path) for path in options.difference))
        if options.json:
            print(json_text([asdict(each) for each in found]))
        else:
            console.print_differences(found)
        return
    if options.yaml:
        print(as_yaml(options.sections))
        return
    keys = describe(options.sections)
    if options.json:
        print(json_text([asdict(key) for key in keys]))
    else:
        console.print_keys(keys)


def _sample(options: argparse.Namespace) -> None:
    from clusterbatch.corpus.docstrings import check_place, write_sample
    from clusterbatch.store import Folder

    if options.pairs < 100:
        raise UsageError(f"--pairs: at least 100 (got {options.pairs})")
    folder = Folder(options.folder)
    check_place(folder)
    write_sample(folder, options.pairs, options.seed)
    print(f"sample corpus: {folder.uri}")


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
    keys.add_argument(
        "--difference",
        nargs=2,
        metavar="CONFIG.yaml",
        help="print the keys in which two files differ, with both values",
    )
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

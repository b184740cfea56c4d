"""Commands that take a configuration: one row of a table per command, and the function behind it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from clusterbatch import console
from clusterbatch.config import RunConfig
from clusterbatch.log import say
from clusterbatch.store.details import EvaluationDetails, details_of


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


def _stage(config: RunConfig, options: argparse.Namespace) -> Outcome:
    if options.command == "ingest":
        # Before the imports that working on them takes.
        from clusterbatch.pipeline.check_inputs import check_inputs

        check_inputs(config)
    from clusterbatch.corpus.ingest import ingest
    from clusterbatch.evaluation.checks import check_given_collections
    from clusterbatch.pipeline.run import SCORE, STAGES, run_stage

    stage = next(stage for stage in [*STAGES, SCORE] if stage.name == options.command)
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
    from clusterbatch.pipeline.check_inputs import check_named_files
    from clusterbatch.pipeline.finished import finished_report

    report = finished_report(config)
    if report is None:
        # Before the imports that working on them takes.
        check_named_files(config)
        from clusterbatch.pipeline.run import run_all

        report = run_all(config, force=options.force)
    return _summary(config, report)


def _report(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.experiments.compare.stage import comparison_artifact
    from clusterbatch.pipeline.report import write_report

    outcome = _summary(config, write_report(config))
    compared = None
    if config.compare.batch_sizes:
        from clusterbatch.experiments.compare.grid import finished_sizes, write_grid

        compared = _grid(config, write_grid(config)) if finished_sizes(config) else None
    elif comparison_artifact(config).manifest() is not None:
        compared = _comparison_report(config)
    if compared is not None:
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


def _grid(config: RunConfig, page: str) -> Outcome:
    from clusterbatch.experiments.compare.grid import CELLS, finished_sizes
    from clusterbatch.experiments.compare.plan import at_size
    from clusterbatch.experiments.compare.report import write_comparison
    from clusterbatch.store import Folder

    for size in finished_sizes(config):
        write_comparison(at_size(config, size))
    found = Folder(page.rsplit("/", 1)[0], config.storage).read_json(CELLS)
    return Outcome({**found, "report": page}, lambda: console.print_grid(found, page))


def _copy_reports(config: RunConfig, output: str) -> None:
    """Copy the pages to another folder, where they keep their places beside each other."""
    from clusterbatch.store import Folder
    from clusterbatch.store.workspace import Workspace

    copies = Folder(output, config.storage)
    sizes = [f"compare/batch={size}/report" for size in config.compare.batch_sizes]
    for place in ("report", "compare/report", *sizes):
        pages = Workspace(config).root.child(*place.split("/"))
        for entry in pages.find():
            copies.write(f"{place}/{entry.name}", pages.read(entry.name))
    say(f"report: copied to {output}")


def _summary(config: RunConfig, report: str) -> Outcome:
    from clusterbatch.pipeline.summary import scoreboard, workspace_summary

    summary = workspace_summary(config)
    return Outcome({**summary, "report": report}, lambda: console.print_quality(scoreboard(summary["quality"]), report))


def _compare(config: RunConfig, options: argparse.Namespace) -> Outcome:
    from clusterbatch.evaluation.checks import check_collections
    from clusterbatch.experiments.compare.stage import compare
    from clusterbatch.pipeline.report import write_report

    check_collections(config)
    if config.compare.batch_sizes:
        from clusterbatch.experiments.compare.grid import compare_sizes

        page = compare_sizes(config, force=options.force)
        write_report(config)
        return _grid(config, page)
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
    from clusterbatch.evaluation.checks import check_collections
    from clusterbatch.pipeline.refresh import refresh, rollback
    from clusterbatch.pipeline.report import write_report
    from clusterbatch.pipeline.summary import workspace_summary

    if options.rollback:
        live, target = rollback(config)
        say(f"refresh   generation {target} is live again, in place of {live}")
    else:
        # Its rounds are judged by them in the end.
        check_collections(config)
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
    from clusterbatch.pipeline.inspect_workspace import inspect_workspace, require_workspace

    require_workspace(config, inspect_workspace(config), leased=True)
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
    "score": Command(
        "score pairs and likely false negatives with a teacher, for masks and distillation", _stage, estimate=True
    ),
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
        options=(Option("--output", {"metavar": "DIR", "help": "also copy them to another folder"}),),
    ),
    "compare": Command(
        "compare batch strategies and seeds on the same data: table, verdict, report",
        _compare,
        estimate=True,
        collections=True,
        options=(
            Option(
                "--budget", {"metavar": "15m", "help": "time it may take; steps and an unset sample are chosen to fit"}
            ),
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

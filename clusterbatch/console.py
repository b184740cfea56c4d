"""Tables that the command line prints on standard output for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from clusterbatch.config.describe import Difference, Key

if TYPE_CHECKING:
    from clusterbatch.pipeline.clean import Removal

_COMPARED = [("value", ".4f"), ("difference", "+.4f"), ("p_corrected", ".3f"), ("minutes", ".1f")]
_DRIFT = [("drift", ".3f"), ("mutual_information", ".3f"), ("hardness", "+.4f")]
# Sources that `inspect` prints.
_MOST_SOURCES = 20
_TEXT = (
    "source",
    "stage",
    "state",
    "collection",
    "metric",
    "arm",
    "verdict",
    "refresh",
    "path",
    "reason",
    "pair_id",
    "query",
    "document",
)


def print_quality(scores: Sequence[dict[str, Any]], report: str) -> None:
    """Print what training gained, and what other models score; `scores` are rows of pipeline.summary.scoreboard."""
    others = list(dict.fromkeys(model for row in scores for model in row["values"] if model not in ("before", "after")))
    # Refresh rounds have the same collections.
    numbered = len({row["generation"] for row in scores}) > 1
    columns = ["collection", "metric", "queries", "before", "after", "gain", *others]
    table = _table("Retrieval quality before and after training", *(["generation"] if numbered else []), *columns)
    for row in scores:
        of_model = {model: f"{value:.4f}" for model, value in row["values"].items()}
        before, after = (row["values"].get(model) for model in ("before", "after"))
        gain = f"{after - before:+.4f}" if before is not None and after is not None else ""
        shown = [of_model.get("before", ""), of_model.get("after", ""), gain, *(of_model.get(m, "") for m in others)]
        number = [str(row["generation"])] if numbered else []
        table.add_row(*number, row["collection"], row["metric"], f"{row['queries']:,}", *shown)
    console = standard_output()
    console.print(table)
    console.print(f"report: {report}", soft_wrap=True)


def print_scores(scores: Sequence[dict[str, Any]]) -> None:
    """Print the `table` of an evaluation's manifest: a line per collection and metric, a column per model."""
    models = list(dict.fromkeys(row["model"] for row in scores))
    values: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in scores:
        values.setdefault((row["collection"], row["metric"], row["queries"]), {})[row["model"]] = row["value"]
    table = _table("Retrieval quality", "collection", "metric", "queries", *models)
    for (collection, metric, queries), of_model in values.items():
        shown = [f"{of_model[model]:.4f}" if model in of_model else "" for model in models]
        table.add_row(collection, metric, f"{queries:,}", *shown)
    standard_output().print(table)


def print_comparison(found: dict[str, Any], page: str) -> None:
    """Print a comparison; `found` is the content of its data file."""
    table = _table("Quality by arm", "arm", "verdict", "value", "difference", "interval", "p corrected", "minutes")
    for row in found["arms"]:
        interval = "" if row["difference"] is None else _interval(row)
        figures = [f"{row[key]:{form}}" if row[key] is not None else "" for key, form in _COMPARED]
        table.add_row(row["arm"], row["verdict"], *figures[:2], interval, *figures[2:])
    console = standard_output()
    console.print(table)
    console.print(found["answer"])
    console.print(f"report: {page}", soft_wrap=True)


def print_grid(found: dict[str, Any], page: str) -> None:
    """Print a comparison at several batch sizes; `found` is the content of its cells.json."""
    table = _table(
        f"{found['metric']} by batch size", "batch", "arm", "value", f"over {found['baseline']}", "interval", "rate"
    )
    for cell in found["cells"]:
        gain = "" if cell["gain"] is None else f"{cell['gain']:+.4f}"
        interval = "" if cell["gain"] is None else _interval(cell)
        table.add_row(
            f"{cell['batch']:,}", cell["arm"], f"{cell['value']:.4f}", gain, interval, str(cell["learning_rate"])
        )
    console = standard_output()
    console.print(table)
    console.print(f"report: {page}", soft_wrap=True)


def print_prediction(found: dict[str, Any]) -> None:
    """Print a prediction; `found` is the result of experiments.predict.stage.predict."""
    columns = ["source", "rows", "diversity", "duplicates", "source batches", "harder by", "batches", "reason"]
    table = _table("Would clusters help?", *columns)
    for name, row in sorted(found["sources"].items(), key=lambda entry: -entry[1]["rows"]):
        table.add_row(
            name,
            f"{row['rows']:,}",
            f"{row['diversity']:.3f}",
            f"{row['duplicates']:.1%}",
            f"{row['source']['difficulty']:.2f} nats",
            f"{row['gain']:+.2f}",
            row["verdict"],
            row["why"],
        )
    console = standard_output()
    console.print(table)
    console.print(found["answer"])


def print_tuning(found: dict[str, Any], file: str) -> None:
    """Print candidates; `found` is the result of experiments.tune.stage.tune, `file` the chosen configuration."""
    table = _table("Candidates", "arm", "rank score", "steps", found["metric"], "minutes")
    for name, row in found["candidates"].items():
        last = row["rungs"][-1] if row["rungs"] else None
        shown = [f"{last['steps']:,}", f"{last['value']:.4f}", f"{last['seconds'] / 60:.1f}"] if last else [""] * 3
        table.add_row(name, f"{row['rank']:+.3f}", *shown)
    console = standard_output()
    console.print(table)
    console.print(f"chosen: {found['chosen']} ({found['why']})")
    console.print(f"configuration: {file}", soft_wrap=True)


def print_intervals(found: dict[str, Any], file: str) -> None:
    """Print refresh intervals; `found` is the result of experiments.tune.refresh_interval, `file` its address."""
    columns = ["refresh", "month", "rows", "embedded", "new clusters", "old data", "new data", "minutes", "cost"]
    table = _table(f"{found['metric']} and cost by refresh interval", *columns)
    for name, policy in found["policies"].items():
        for row in policy["months"]:
            figures = [f"{row[key]:,.0f}" for key in ("month", "rows", "embedded")]
            clusters = {0.0: "", 1.0: "yes"}.get(row["reclustered"], f"{row['reclustered']:.0%} of the seeds")
            quality = [f"{row['old']:.4f}", f"{row['new']:.4f}"]
            minutes = f"{sum(row['seconds'].values()) / 60:.1f}"
            table.add_row(name, *figures, clusters, *quality, minutes, f"{row['cost']:.4g}")
            name = ""
        quality = [f"{policy['old']:.4f}", f"{policy['new']:.4f}"]
        table.add_row("", "mean", "", "", "", *quality, "", f"{policy['cost']:.4g}", end_section=True)
    console = standard_output()
    console.print(table)
    for name, policy in found["policies"].items():
        if policy["gain"] is not None:
            known = policy["low"] is not None
            unknown = " (one seed, or one query: no interval)"
            interval = f" ({policy['low']:+.4f} to {policy['high']:+.4f})" if known else unknown
            console.print(f"{name}: {policy['gain']:+.4f}{interval} over {next(iter(found['policies']))}")
    console.print(f"recommended: {found['chosen']} ({found['why']}; cost in {found['currency']})")
    console.print(f"figures: {file}", soft_wrap=True)


def print_rounds(rounds: Sequence[dict[str, Any]], live: int | None, report: str) -> None:
    """Print the rounds of refresh, as pipeline.summary has them."""
    columns = [
        "generation",
        "from",
        "clusters",
        "drift",
        "AMI",
        "hardness",
        "steps",
        "live",
        "own",
        "went live",
        "minutes",
    ]
    table = _table("Rounds of refresh", *columns)
    for row in rounds:
        verdict = {True: "rolled back" if row["rolled_back"] else "yes", False: "no", None: "under way"}[
            row["promoted"]
        ]
        values = [f"{row[key]:.4f}" if row[key] is not None else "" for key in ("live_value", "own_value")]
        drift = row["drift"]
        table.add_row(
            str(row["generation"]),
            str(row["base"]),
            f"of {row['clusters']}",
            *(f"{drift[key]:{form}}" if drift else "" for key, form in _DRIFT),
            f"{row['steps']:,}",
            *values,
            verdict,
            f"{sum(row['seconds'].values()) / 60:.1f}",
        )
    console = standard_output()
    console.print(table)
    console.print(f"live: generation {live}")
    console.print(f"report: {report}", soft_wrap=True)


def print_workspace(workspace: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the stages of a workspace, as pipeline.inspect_workspace finds them."""
    table = _table(workspace, "stage", "state", "read", "written", "rejected", "set aside", "files", "MiB", "seconds")
    for row in rows:
        name = f"{row['stage']} {row['generation']}" if row["generation"] else row["stage"]
        if row["state"] != "done":
            table.add_row(name, row["state"])
            continue
        table.add_row(
            name,
            f"version {row['versions'][-1]['version']}" if "versions" in row else row["state"],
            *(f"{row[key]:,}" for key in ("read", "written", "rejected")),
            f"{sum(row['set_aside'].values()):,}",
            f"{row['parts']:,}",
            f"{row['bytes'] / 2**20:,.1f}",
            f"{row['seconds']:,.1f}",
        )
        for version in row.get("versions", []):
            number = f"version {version['version']}"
            aside = f"{version['deleted']:,}"
            table.add_row("", number, "", f"{version['written']:,}", "", aside, "", "", f"{version['seconds']:,.1f}")
    console = standard_output()
    console.print(table)
    _print_sources(console, rows)
    live = [row["generation"] for row in rows if row.get("live")]
    if live:
        console.print(f"live: generation {live[0]}")


def _print_sources(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the largest sources with their rows, and their clusters in the newest generation that has any."""
    pairs: dict[str, int] = next((row["sources"] for row in rows if row["stage"] == "ingest" and "sources" in row), {})
    clusters: dict[str, int | None] = {}
    for row in rows:
        if row["stage"] == "cluster" and "sources" in row:
            clusters = row["sources"]
    if not pairs:
        return
    table = _table("Sources", "source", "rows", "clusters")
    largest = sorted(pairs, key=lambda name: (-pairs[name], name))
    for name in largest[:_MOST_SOURCES]:
        number = clusters.get(name)
        table.add_row(name, f"{pairs[name]:,}", "" if number is None else f"{number:,}")
    console.print(table)
    if len(largest) > _MOST_SOURCES:
        console.print(f"and {len(largest) - _MOST_SOURCES:,} more sources (all of them: --json)")


def print_cluster(cluster: dict[str, Any]) -> None:
    """Print one cluster, a row of shards.statistics."""
    console = standard_output()
    lines = [
        f"{cluster['source']}/{cluster['cluster']}: {cluster['rows']:,} rows, "
        f"mean cosine to their centroid {_cosine(cluster['mean_cosine'])}",
        f"terms: {', '.join(cluster['terms'])}",
        f"documents: {cluster['mean_characters']:,.0f} characters on average, "
        f"{cluster['duplicate_share']:.1%} repeat another one",
        *(f"remark: {remark}" for remark in cluster["remarks"]),
        *(f"neighbour: {near['cluster']}, cosine {_cosine(near['cosine'])}" for near in cluster["neighbours"]),
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    for title, rows in (("Nearest the centroid", cluster["near"]), ("Farthest from it", cluster["far"])):
        table = _table(title, "cosine", "pair_id", "query", "document")
        for row in rows:
            table.add_row(_cosine(row["cosine"]), *(row[key] for key in ("pair_id", "query", "document")))
        console.print(table)


def _cosine(value: float | None) -> str:
    """Return a cosine as text; rows that were not clustered by vectors have none."""
    return "-" if value is None else f"{value:.4f}"


def print_removals(removals: Sequence[Removal], removed: bool) -> None:
    table = _table("Removed" if removed else "Would be removed", "path", "MiB", "reason")
    for removal in removals:
        table.add_row(removal.path, f"{removal.bytes / 2**20:,.1f}", removal.reason)
    console = standard_output()
    console.print(table)
    total = sum(removal.bytes for removal in removals) / 2**20
    console.print(f"{len(removals)} places, {total:,.1f} MiB" + ("" if removed else "; pass --yes to remove them"))


def print_keys(keys: Sequence[Key]) -> None:
    """Print the configuration's keys, section by section."""
    console = standard_output()
    section = ""
    for key in keys:
        if (first := key.name.split(".")[0]) != section:
            section = first
            console.print(f"\n{section}", style="bold", highlight=False)
        default = "must be given" if key.default is None else f"default {key.default}"
        console.print(f"  {key.name}  ({key.type}; {default})", highlight=False, soft_wrap=True)
        console.print(Padding(key.meaning, (0, 0, 0, 6)), highlight=False)


def print_differences(found: Sequence[Difference]) -> None:
    """Print the keys in which two configurations differ, a line each."""
    console = standard_output()
    for each in found:
        one, other = ("not there" if value is None else value for value in (each.one, each.other))
        console.print(f"{each.name}: {one} -> {other}", highlight=False, soft_wrap=True)
    if not found:
        console.print("no difference", highlight=False)


def _interval(row: dict[str, Any]) -> str:
    """Return an interval as text; a dash if there was one seed, or one query of a collection."""
    return "–" if row["low"] is None else f"{row['low']:+.4f} … {row['high']:+.4f}"


class _Console(Console):
    """Rich's console, but a closed pipe is left to the caller: Rich itself would exit with 1, which means a bug."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def standard_output() -> Console:
    """Return a console for tables on standard output."""
    # Names and paths are the user's: what looks like markup in them is not.
    console = _Console(markup=False, emoji=False)
    # In a log or a pipe eighty columns would only break words.
    return console if console.is_terminal else _Console(markup=False, emoji=False, width=120)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for column in columns:
        # In a narrow terminal figures break rather than lose their last digits.
        table.add_column(column, justify="left" if column in _TEXT else "right", overflow="fold")
    return table

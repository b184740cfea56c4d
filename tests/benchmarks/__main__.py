"""All benchmarks, or those named, one after another in processes of their own; one table of what they print.

    python -m tests.benchmarks [NAME ...] [--quick] [--workspace URI] [--json FILE] [--markdown FILE]

Ours, the peer's figure for the same work, their ratio, and whether the promise (promises.py) was kept, on this machine.
A benchmark whose data is not there is listed with what it needs. `--quick` tries every one with small sizes, which say
nothing about the promises. Exit codes: 1 where a promise was not kept or a benchmark failed, 2 where a name is unknown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from tests.benchmarks.catalogue import CATALOGUE
from tests.benchmarks.running import Given, run
from tests.benchmarks.table import as_json, as_markdown, as_table


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [benchmark.name for benchmark in CATALOGUE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--workspace", help="one with a corpus and embeddings, for the benchmarks of clustering")
    parser.add_argument("--comparison", metavar="CONFIG", help="for `samples`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was printed, as one document")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table")
    options = parser.parse_args(words)
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    given = Given(options.workspace, options.comparison, options.quick)
    outcomes = []
    for benchmark in CATALOGUE:
        if not options.names or benchmark.name in options.names:
            print(f"{benchmark.name} ...", file=sys.stderr, flush=True)
            outcomes.append(run(benchmark, given))
    # What a narrow terminal would fold belongs into one line each in a file or a pipe.
    Console(width=None if sys.stdout.isatty() else 200).print(as_table(outcomes, options.quick))
    if options.json:
        options.json.write_text(as_json(outcomes, options.quick))
    if options.markdown:
        options.markdown.write_text(as_markdown(outcomes, options.quick))
    broken = any(outcome.failure for outcome in outcomes)
    missed = not options.quick and any(line["kept"] is False for outcome in outcomes for line in outcome.figures)
    return 1 if broken or missed else 0


if __name__ == "__main__":
    sys.exit(main())

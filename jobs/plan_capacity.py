"""Estimate of a run: `python jobs/plan_capacity.py jobs/web_scale.yaml --rows 1e9 --gpu l4`.

Times hold for the machine on which the coefficients were measured. For yours: run a configuration at two sizes (a
few thousand pairs, a few times as many) in two workspaces SMALL and LARGE, then
`python jobs/plan_capacity.py CONFIG.yaml --calibrate SMALL LARGE --coefficients mine.json`, and give
`--coefficients mine.json` from then on.
"""

import argparse
import math
import platform
import sys

from clusterbatch.config import load_words
from clusterbatch.errors import ClusterbatchError
from clusterbatch.experiments.capacity.calibrate import GPUS, check_writable, fit, matrix_flops, measure, save
from clusterbatch.experiments.capacity.dry_run import dry_run


def _amount(text: str) -> float:
    """Read a number of a size that there can be."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative (got {text})")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml | key=value")
    parser.add_argument("--rows", type=_amount, help="pairs, if the corpus cannot be read")
    parser.add_argument("--sources", type=int, help="number of sources")
    parser.add_argument("--query-characters", type=_amount, help="mean length")
    parser.add_argument("--document-characters", type=_amount, help="mean length")
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), help="one for each worker that embeds, scores, trains, evaluates"
    )
    parser.add_argument(
        "--gpu-hour", type=float, help="price of an hour of one GPU worker (otherwise compare.prices.gpu_hour)"
    )
    parser.add_argument("--coefficients", metavar="FILE", help="measured on your machine")
    parser.add_argument("--calibrate", nargs=2, metavar=("SMALL", "LARGE"), help="two finished workspaces")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        if options.calibrate:
            if not options.coefficients:
                parser.error("--calibrate: say with --coefficients where to write them")
            # Measuring takes a while.
            check_writable(options.coefficients)
            small, large = (measure(load_words([*options.words, f"workspace={uri}"])) for uri in options.calibrate)
            save(fit(small, large, matrix_flops(), machine=platform.node()), options.coefficients)
            return 0
        known = {name: getattr(options, name) for name in ("sources", "query_characters", "document_characters")}
        known["rows"] = None if options.rows is None else int(options.rows)
        dry_run(
            load_words(options.words),
            gpu=options.gpu,
            gpu_hour=options.gpu_hour,
            coefficients=options.coefficients,
            as_json=options.json,
            **{name: value for name, value in known.items() if value is not None},
        )
    except ClusterbatchError as error:
        print(f"plan_capacity: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

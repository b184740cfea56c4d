"""Does a small experiment tell what the whole corpus would? The gain on samples drawn both ways, and on all of it.

    python -m tests.benchmarks.bench_samples CONFIG.yaml [key=value ...]

The configuration is that of a comparison (two arms are enough); embeddings are reused where `reuse.embeddings` names
some. Every sample is compared in a workspace of its own below the configured one, with the same steps as the whole. One
JSON line each: the gain of the first candidate over the baseline with its interval, and at the end how far each
prediction was off, in widths of the whole corpus' own interval.
"""

from __future__ import annotations

import sys
from typing import Any

from clusterbatch.config import RunConfig, load_config, with_changes
from clusterbatch.experiments.compare.results import read_comparison
from clusterbatch.experiments.compare.stage import compare, comparison_artifact
from clusterbatch.runtime import lasting_session
from tests.benchmarks.figures import emit

SHARES = (0.05, 0.1, 0.2)
WAYS = ("neighbourhoods", "uniform")


def measured(config: RunConfig, share: float | None, way: str | None) -> dict[str, Any]:
    """The gain at one size, {share, way, pairs, arm, gain, low, high}; no share: all of the corpus."""
    name = "whole" if share is None else f"{way}-{share:g}"
    home = config.reuse.corpus or config.workspace
    changes: dict[str, Any] = {"workspace": f"{config.workspace}/{name}", "reuse.corpus": home, "compare.sample": share}
    if way is not None:
        changes["compare.sample_by"] = way
    own = with_changes(config, changes)
    manifest = compare(own)
    found = read_comparison(own, comparison_artifact(own), manifest)
    arm = found.candidates[0]
    assert arm.gain is not None
    low, high = arm.gain.interval(found.confidence)
    return {"share": share, "way": way, "arm": arm.name, "gain": arm.gain.mean, "low": low, "high": high}


def main() -> None:
    config = load_config(sys.argv[1], sys.argv[2:])
    if config.compare.steps is None:
        sys.exit("bench_samples: give compare.steps, the same for every size")
    with lasting_session():
        found = [measured(config, share, way) for way in WAYS for share in SHARES]
        whole = measured(config, None, None)
    for row in [*found, whole]:
        case = "whole corpus" if row["share"] is None else f"{row['way']}, {row['share']:.0%}"
        emit("samples, gain", row["gain"], "NDCG", case=case, arm=row["arm"], low=row["low"], high=row["high"])
    half_width = (whole["high"] - whole["low"]) / 2
    for row in found:
        off = row["gain"] - whole["gain"]
        emit(
            "samples, prediction off by",
            off / half_width,
            "half widths of the whole corpus' interval",
            case=f"{row['way']}, {row['share']:.0%}",
            holds_it=row["low"] <= whole["gain"] <= row["high"],
        )


if __name__ == "__main__":
    main()

"""A static encoder's training steps a second: rows of the table updated lazily, and all of them in every step.

    python -m tests.benchmarks.bench_static [--batch 32] [--steps 60] [--rounds 5]
    python -m tests.benchmarks.bench_static --once        # one line for a comparison with another build in turn

Token embeddings of MiniLM (30,522 x 384), real pairs (CLUSTERBATCH_DATA) cut to 64 and 256 tokens, one process with one
thread. Both begin after the first steps, which update all rows; rounds alternate. Prints one JSON line: steps a second
of CPU time and of wall time (medians of the rounds), and how far the weights of the two are apart in the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

from clusterbatch.batches.loader import SliceBatch
from clusterbatch.config import TrainConfig
from clusterbatch.encoder.load import load_encoder
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.training.collectives import World
from clusterbatch.training.step import TrainingStep
from tests.benchmarks.bench_training import MODEL, real_pairs
from tests.benchmarks.figures import emit
from tests.training.batches import plain_batch

WARM = 105


def batches_of(training: TrainingStep, size: int, count: int) -> list[SliceBatch]:
    pairs = real_pairs(size * count)
    encode = training.encoder.tokenizer.encode
    return [
        plain_batch(
            step,
            encode([query for query, _ in pairs[step * size :][:size]], 64),
            encode([document for _, document in pairs[step * size :][:size]], 256),
        )
        for step in range(len(pairs) // size)
    ]


def static_training(steps: int) -> TrainingStep:
    encoder = load_encoder(resolve_model(MODEL), "static", device="cpu")
    return TrainingStep(encoder, TrainConfig(encoder="static", warmup=0.1), steps, World())


def timed(training: TrainingStep, batches: Sequence[SliceBatch]) -> tuple[float, float]:
    """Steps a second of CPU time and of wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        training.run(batch)
    return len(batches) / (time.process_time() - cpu), len(batches) / (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="one round of this build alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1 if options.once else options.rounds
    count = WARM + rounds * options.steps
    runs = {"lazy": static_training(count + 1)}
    batches = batches_of(runs["lazy"], options.batch, count)
    if not options.once:
        runs["dense"] = static_training(count + 1)
        # As if every batch touched every row.
        runs["dense"].gradients._touched_rows = lambda token_ids: None  # type: ignore[method-assign]
    for training in runs.values():
        timed(training, batches[:WARM])
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds):
        part = batches[WARM + number * options.steps :][: options.steps]
        # Whoever comes first in a round has the warmer or the colder machine; so take turns.
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            rates[name].append(timed(runs[name], part))
    cpu, wall = (
        {name: float(np.median([pair[at] for pair in found])) for name, found in rates.items()} for at in (0, 1)
    )
    more = {}
    if "dense" in runs:
        weights = []
        for training in runs.values():
            with training.current_weights(count):
                weights.append(training.encoder.backbone.weight.detach().clone())
        more = {"peer": cpu["dense"], "largest_difference": float((weights[0] - weights[1]).abs().max())}
    emit(
        "training a static encoder, steps per second of CPU time",
        cpu["lazy"],
        "steps/s",
        case=f"{MODEL}'s table, batch {options.batch}, one thread",
        wall={name: round(rate, 1) for name, rate in wall.items()},
        rounds={name: [round(pair[0], 1) for pair in found] for name, found in rates.items()},
        **more,
    )


if __name__ == "__main__":
    main()

"""A surrogate that costs little: `python jobs/static_surrogate.py CONFIG.yaml [key=value ...] --output FOLDER`.

After `clusterbatch ingest CONFIG.yaml`: fits a static encoder to `embed.model` on a sample of the corpus and writes it
to FOLDER, a local folder that does not exist yet. `embed.model=FOLDER` then embeds the corpus with it.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from clusterbatch.config import RunConfig, load_words
from clusterbatch.corpus.row_groups import read_row_group, row_groups_of
from clusterbatch.embedding.char_ngrams import SURROGATES
from clusterbatch.embedding.workers import sample_rows
from clusterbatch.encoder.devices import resolve_device
from clusterbatch.encoder.distil import distil_static
from clusterbatch.encoder.resolve import resolve_model
from clusterbatch.encoder.save import save_model
from clusterbatch.encoder.sides import SIDES
from clusterbatch.errors import ClusterbatchError, UsageError
from clusterbatch.store.workspace import Workspace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml | key=value")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--pairs", type=int, default=2048, help="pairs that it is fitted to (2048)")
    options = parser.parse_args()
    try:
        distil(load_words(options.words), options.output, options.pairs)
    except ClusterbatchError as error:
        print(f"static_surrogate: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def distil(config: RunConfig, output: Path, pairs: int) -> None:
    """Write the static encoder. Raises UsageError if the output exists, or there is nothing to distil."""
    model, max_tokens = config.embed.model, config.embed.max_tokens
    if output.exists():
        raise UsageError(f"--output: {output} exists already")
    if pairs < 1:
        raise UsageError("--pairs: at least one is needed")
    if model in SURROGATES or config.corpus.columns.images:
        raise UsageError(f"embed.model: {model}: only a transformer for texts can be distilled to a static encoder")
    folder, device = resolve_model(model, config.storage), str(resolve_device(config.embed.device))
    corpus = Workspace(config).corpus
    drawn = sample_rows(row_groups_of(corpus.require()), pairs)
    rows = pa.concat_tables(read_row_group(corpus, group, [*SIDES]).take(pa.array(chosen)) for group, chosen in drawn)
    texts = {side: rows[side].to_pylist() for side in SIDES}
    encoder = distil_static(folder, texts, max_tokens=max_tokens, device=device)
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as room:
        save_model(encoder, Path(room, "model"))
        Path(room, "model").rename(output)
    print(f"fitted to {rows.num_rows:,} pairs; take it with embed.model={output}")


if __name__ == "__main__":
    sys.exit(main())

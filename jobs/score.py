"""`clusterbatch score` for `ray job submit --working-dir . -- python jobs/score.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))

"""`clusterbatch run` for `ray job submit --working-dir . -- python jobs/run.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))

"""`clusterbatch cluster` for `ray job submit --working-dir . -- python jobs/cluster.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["cluster", *sys.argv[1:]]))

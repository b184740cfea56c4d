"""`clusterbatch evaluate` for `ray job submit --working-dir . -- python jobs/evaluate.py CONFIG.yaml key=value`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))

"""`clusterbatch ingest` for `ray job submit --working-dir . -- python jobs/ingest.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))

"""`clusterbatch compare` for `ray job submit --working-dir . -- python jobs/compare.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))

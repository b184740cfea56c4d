"""`clusterbatch tune` for `ray job submit --working-dir . -- python jobs/tune.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))

"""`clusterbatch train` for `ray job submit --working-dir . -- python jobs/train.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

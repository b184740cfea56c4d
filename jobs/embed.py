"""`clusterbatch embed` for `ray job submit --working-dir . -- python jobs/embed.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))

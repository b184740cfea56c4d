"""`clusterbatch refresh` for `ray job submit --working-dir . -- python jobs/refresh.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["refresh", *sys.argv[1:]]))

"""`clusterbatch predict` for `ray job submit --working-dir . -- python jobs/predict.py CONFIG.yaml [key=value ...]`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))

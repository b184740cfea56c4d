"""`python -m clusterbatch`, the same as the command `clusterbatch`."""

import sys

from clusterbatch.cli import main

if __name__ == "__main__":
    sys.exit(main())

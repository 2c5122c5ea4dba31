"""``python -m stiefel``: the command line."""

import sys

from stiefel.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())

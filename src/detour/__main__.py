"""`python -m detour` is the `detour` command."""

import sys

from detour.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m nydusd`: the same as the command `nydusd`. Runs in the process that becomes the supervisor."""

from __future__ import annotations

import sys

from nydusd.cli.nydusd import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

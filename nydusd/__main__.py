"""`python -m nydusd`: the same as the command `nydusd`. Runs in the process that becomes the supervisor, or stands for it."""

from __future__ import annotations

import sys

from nydusd.nursery.stub import main

if __name__ == "__main__":
    sys.exit(main())

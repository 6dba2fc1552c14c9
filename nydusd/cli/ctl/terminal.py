"""What the output of `nydusctl` can show: whether it is a terminal, in colours, in Unicode, and how wide."""

from __future__ import annotations

import os
import shutil
import sys
from typing import NamedTuple


class Screen(NamedTuple):
    """`tty`: a person looks at it. Without one there are no colours, and 100 columns."""

    tty: bool
    colour: bool
    unicode: bool
    columns: int
    rows: int


def screen() -> Screen:
    """What standard output is now."""
    tty = sys.stdout.isatty()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    unicode = (sys.stdout.encoding or "ascii").lower().replace("-", "").startswith("utf")
    columns, rows = shutil.get_terminal_size((100, 24)) if tty else (100, 24)
    return Screen(tty, tty and not plain, unicode, max(columns, 20), max(rows, 8))

"""`Clock`: a time of day for the processes of a daemon; nobody else's clock is touched."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """`environment` makes processes take the time from a file, at each look. What counts seconds (CLOCK_MONOTONIC) is true.

    So are the times of files, which the kernel gives: to the daemon they are as far away as its clock was put.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "clock"
        self.put(0)
        shifted = Path(__file__).parent / "shifted"
        self.environment = {"NYDUSD_TEST_CLOCK": str(self._path), "PYTHONPATH": f"{shifted}:{_ROOT}"}

    def put(self, days: int) -> None:
        """So many days from ours, from now on."""
        new = self._path.with_suffix(".new")
        new.write_text(str(days * 86400))
        os.replace(new, self._path)

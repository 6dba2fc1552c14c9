"""The progress bar of a build: one line on standard error, if that is a terminal. Runs in the process of the command."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_INTERVAL = 0.1
_WIDTH = 30


class Progress:
    """Counts bytes towards `total` and shows them at most ten times a second."""

    def __init__(self, total: int, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._shows = self._stream.isatty() and not quiet
        self._done = 0
        self._begin = self._last = time.monotonic()

    def add(self, size: int) -> None:
        self._done += size
        if self._shows and time.monotonic() - self._last >= _INTERVAL:
            self._show()

    def end(self) -> None:
        """The bar is finished: leave it full, on a line of its own."""
        if self._shows:
            self._show()
            print(file=self._stream, flush=True)

    def _show(self) -> None:
        self._last = now = time.monotonic()
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        bar = "#" * int(share * _WIDTH)
        speed = self._done / max(now - self._begin, 1e-6) / 1e6
        text = f"\r[{bar:<{_WIDTH}}] {share:4.0%}  {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {speed:,.0f} MB/s "
        print(text, end="", file=self._stream, flush=True)

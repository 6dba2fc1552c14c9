"""The progress of a build, on standard error. Runs in the process of the command."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

_INTERVAL = 0.1
_WIDTH = 30


class Progress:
    """One line that changes, on a terminal: counts bytes towards `total` and shows them at most ten times a second."""

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


class LayerProgress:
    """Of layers that others fetch to files and convert: `sizes` are those of the files when they are complete.

    On a terminal a line that changes, elsewhere a line for each layer that is done.
    """

    def __init__(self, sizes: Mapping[Path, int], stream: TextIO | None = None) -> None:
        self._sizes = sizes
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._done = 0

    def show(self) -> None:
        """Something may have come."""
        if self._terminal:
            got = sum(min(_size(path), size) for path, size in self._sizes.items())
            print(
                f"\r{self._text()}, {got / 1e6:,.1f} of {self._total():,.1f} MB fetched ",
                end="",
                file=self._stream,
                flush=True,
            )

    def done(self, path: Path) -> None:
        """A layer is converted."""
        self._done += 1
        if not self._terminal:
            print(f"{self._text()}: {path.name[:12]}, {self._sizes[path] / 1e6:,.1f} MB", file=self._stream, flush=True)

    def end(self) -> None:
        """All are done: leave the line as it is."""
        self.show()
        if self._terminal:
            print(file=self._stream, flush=True)

    def _text(self) -> str:
        return f"{self._done} of {len(self._sizes)} layers converted"

    def _total(self) -> float:
        return sum(self._sizes.values()) / 1e6


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

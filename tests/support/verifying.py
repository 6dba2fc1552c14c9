"""`Verifying`: readers that compare every byte of a mount, beside what a test does to its daemon meanwhile."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.discipline import wait_until
from tests.support.readers import longest_read, pieces_of_each, pieces_read

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0


class Verifying:
    """`with Verifying(mountpoint, tree, folder) as readers:` has `count` processes read all files of `tree` again and again.

    Leaving stops them; AssertionError for a wrong byte or a read that failed. `inside` is a command that runs another one
    where the mount is; `doings`, to which a test may add, is told with a failure.
    """

    def __init__(
        self, mountpoint: Path, tree: Path, folder: Path, count: int = 4, *, inside: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.doings: list[str] = []
        self._seed = seed or random.SystemRandom().randrange(1, 1 << 32)
        self._progress, self._stop = folder / "progress", folder / "stop"
        verify = [sys.executable, "-m", "tests.support.readers", "verify", str(mountpoint), str(tree)]
        self._command = [*inside, *verify, str(self._progress), str(self._stop), str(count), str(self._seed)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problems = self.stop()
        if error is None:
            assert not problems, f"seed {self._seed}, {self.doings}: {problems}"

    def start(self) -> None:
        """What entering does; whoever calls it calls `stop`."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    def stop(self) -> list[str]:
        """End the readers; gives what was wrong."""
        self._stop.touch()
        with self._process as process:
            assert process.stderr is not None
            found = process.stderr.read().splitlines()
        return found or ([f"the readers ended with {process.returncode}"] if process.returncode else [])

    def have_ended(self) -> bool:
        """Whether they have found something wrong."""
        return self._process.poll() is not None

    def pieces(self) -> int:
        """How many they have read so far."""
        return pieces_read(self._progress)

    def longest(self) -> float:
        """Seconds that the longest of all reads took."""
        return longest_read(self._progress)

    def go_on(self, more: int = 16) -> None:
        """Return when they have read more than so many pieces from now on, or found something wrong."""
        seen = self.pieces()
        what = f"any progress of the readers after {self.doings} (seed {self._seed})"
        wait_until(lambda: self.pieces() > seen + more or self.have_ended(), what, SECONDS)

    def all_go_on(self) -> None:
        """Return when each of them has been answered what it asks for now, or found something wrong."""
        seen = pieces_of_each(self._progress)

        def have() -> bool:
            now = pieces_of_each(self._progress)
            return all(after > before + 1 for before, after in zip(seen, now, strict=False)) or self.have_ended()

        wait_until(have, f"any progress of each reader after {self.doings} (seed {self._seed})", SECONDS)

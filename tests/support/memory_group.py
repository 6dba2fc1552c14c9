"""`MemoryGroup`: a control group of a test's own whose memory is bounded, of whichever version of cgroups the machine has."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.discipline import wait_until

_TAKE = """
import re, sys
def killed():
    with open(sys.argv[1]) as events:
        return int(re.search(r"^oom_kill (\\d+)$", events.read(), re.MULTILINE)[1])
held = []
while killed() < int(sys.argv[2]):
    if len(held) < 4096:
        held.append(b"x" * (256 << 10))
"""


class MemoryGroup:
    """In it is whoever was started by `command`, with all that he starts. AssertionError for one that stays at the end."""

    def __init__(self) -> None:
        root, self._is_v1 = _root()
        self._path = root / f"nydusd-test-{uuid.uuid4().hex[:12]}"
        self._events = "memory.oom_control" if self._is_v1 else "memory.events"

    def __enter__(self) -> Self:
        self._path.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            wait_until(lambda: not self.pids(), "the end of all in a control group", 60)
        finally:
            wait_until(self._is_removed, "the end of a control group", 60)

    def _is_removed(self) -> bool:
        try:
            os.rmdir(self._path)
        except OSError:  # the kernel is not done with somebody who was in it
            return False
        return True

    def command(self, command: list[str], score: int) -> list[str]:
        """A command that does the same, and is in the group from its beginning on.

        `score`: the higher, the rather the kernel kills what it starts (`oom_score_adj`, 0 to 1000).
        """
        begin = f"echo $$ > {self._path}/cgroup.procs && echo {score} > /proc/self/oom_score_adj"
        return ["sh", "-c", f'{begin} && exec "$@"', "sh", *command]

    def pids(self) -> list[int]:
        """Who is in it."""
        return [int(pid) for pid in (self._path / "cgroup.procs").read_text().split()]

    def used(self) -> int:
        """Bytes that are charged to it now."""
        return int((self._path / ("memory.usage_in_bytes" if self._is_v1 else "memory.current")).read_text())

    def limit(self, size: int | None) -> None:
        """So many bytes at most; None for any number. OSError where that is less than what cannot be taken back (v1)."""
        unlimited = "-1" if self._is_v1 else "max"
        name = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (self._path / name).write_text(unlimited if size is None else str(size))

    def exhaust(self, spare: int, kills: int = 1) -> None:
        """Bound the group to so many bytes more than it has, take those, and hold them until so many of it were killed."""
        wanted = self.killed() + kills
        wait_until(lambda: self._bound(spare), "a bound for a control group", 60)
        while self.killed() < wanted:
            taking = [sys.executable, "-c", _TAKE, str(self._path / self._events), str(wanted)]
            status = subprocess.run(self.command(taking, 0), timeout=60, check=False).returncode
            assert status in (0, -signal.SIGKILL)
            wanted += status != 0  # nobody else was left

    def _bound(self, spare: int) -> bool:
        try:
            self.limit(self.used() + spare)
        except OSError:  # it has grown meanwhile
            return False
        return True

    def killed(self) -> int:
        """How many processes the kernel has killed for want of memory."""
        found = re.search(r"^oom_kill (\d+)$", (self._path / self._events).read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1])


def _root() -> tuple[Path, bool]:
    """Where groups are made whose memory is counted, and whether that is version 1. AssertionError where they cannot be."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        path = Path(before.split(" ")[4])
        if kind == "cgroup" and "memory" in options.split(","):
            return path, True
        if kind == "cgroup2" and "memory" in (path / "cgroup.controllers").read_text().split():
            (path / "cgroup.subtree_control").write_text("+memory")
            return path, False
    raise AssertionError("this machine has no control groups that count memory")

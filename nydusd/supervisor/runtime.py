"""The run-time folder of a daemon, and what an earlier daemon of the same mount point may have left.

`/run/nydusd/<instance>` (or under $NYDUSD_RUNTIME_DIR), mode 0700: the ZeroMQ sockets and `state.json`, which names the
supervisor and its children by pid and start time. The instance is derived from the mount point, so the same command line
finds its own leftovers after a SIGKILL: processes are ended, sockets removed, shared memory kept for `prepare` to inherit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from nydusd.errors import MountError
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.segment import names, remove

log = logging.getLogger(__name__)

_DEFAULT = "/run/nydusd"


class Runtime:
    """Paths of one daemon's run-time folder."""

    def __init__(self, mountpoint: str) -> None:
        self.instance = sha256(mountpoint.encode(errors="surrogateescape")).hexdigest()[:12]
        self.folder = Path(os.environ.get("NYDUSD_RUNTIME_DIR", _DEFAULT)) / self.instance
        self.front = f"ipc://{self.folder}/front"
        self.work = f"ipc://{self.folder}/work"
        self.arena = f"/nydusd.{self.instance}.arena"
        self._state = self.folder / "state.json"
        self._mountpoint = mountpoint

    def claim(self) -> None:
        """Make the folder ours. Raises MountError when a live daemon has it; ends what a dead one left running."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = self._read()
        if old and _alive(old[0]):
            raise MountError(f"{self._mountpoint}: nydusd with pid {old[0][0]} serves this mount point already")
        for process in old[1:]:
            if _alive(process):
                log.warning("ending pid %d, left by a nydusd that was killed", process[0])
                _end(process)
        for path in self.folder.iterdir():
            path.unlink(missing_ok=True)
        remove(self.arena)
        self.record([])

    def _read(self) -> list[tuple[int, int]]:
        """The processes of the recorded daemon, its supervisor first; [] if there is no record that can be read."""
        try:
            raw = json.loads(self._state.read_bytes())
            return [(int(pid), int(start)) for pid, start in raw["processes"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def record(self, children: Iterable[int]) -> None:
        """Write down who we are and which children we have (pids)."""
        pids = [os.getpid(), *children]
        text = json.dumps(
            {"version": 1, "mountpoint": self._mountpoint, "processes": [[p, start_time(p)] for p in pids]}
        )
        temporary = self._state.with_suffix(".tmp")
        temporary.write_text(text)
        os.replace(temporary, self._state)

    def remove(self) -> None:
        """Remove the folder and all shared memory of this instance: the end of a clean stop."""
        for name in names(f"nydusd.{self.instance}."):
            remove(name)
        shutil.rmtree(self.folder, ignore_errors=True)


def _alive(process: tuple[int, int]) -> bool:
    pid, start = process
    return start != 0 and start_time(pid) == start


def _end(process: tuple[int, int]) -> None:
    try:
        os.kill(process[0], signal.SIGKILL)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + 5
    while _alive(process) and time.monotonic() < deadline:
        time.sleep(0.005)  # not our child: the system gives no event that needs no further rights

"""Daemons that may come from a nursery, and a nursery that is there from the start. Elsewhere in the tests it is off."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.errors import CacheError
from nydusd.nursery import client
from nydusd.supervisor.checked import read_checked
from tests.supervisor.lives import IMAGE
from tests.support.daemon import Daemon
from tests.support.discipline import cmdline, descendants, discipline, is_running, wait_until


class Another(Daemon):
    """A daemon that may come from a nursery: its processes are not below the one that was started."""

    def __init__(
        self,
        runtime: Path = discipline.runtime,
        environment: dict[str, str] | None = None,
        bootstrap: Path | None = IMAGE.bootstrap,
        config: dict[str, object] | None = None,
    ) -> None:
        own = {"NYDUSD_NURSERY": "", "NYDUSD_RUNTIME_DIR": str(runtime)}
        super().__init__(bootstrap, IMAGE.blobs, config=config, environment=own | (environment or {}))

    def recorded(self) -> list[int]:
        """The pids of its processes, its supervisor first."""
        runtime = Path(self._environment["NYDUSD_RUNTIME_DIR"])
        return next(([pid for pid, _ in noted] for noted in noted_processes(runtime, self.place)), [])

    def family(self) -> list[int]:
        return self.recorded()

    @property
    def supervisor(self) -> int:
        return self.recorded()[0]

    def is_copy(self) -> bool:
        """Whether a nursery has made it."""
        return self.supervisor != self.pid

    def status(self) -> int:
        """The exit status of what was started, once it has ended."""
        assert self._process is not None
        return self._process.wait(60)


def noted_processes(runtime: Path, place: str) -> Iterator[list[tuple[int, int]]]:
    """Of each daemon that has a record as that of this place: its processes and when they began, the supervisor first."""
    for state in runtime.glob("*/state.json"):
        try:
            record = read_checked(state)
        except CacheError:
            continue
        if record["mountpoint"] == place and record.get("processes"):
            yield [(pid, start) for pid, start in record["processes"]]


def nurseries() -> list[int]:
    return of_nursery("nursery")


def seats_kept() -> list[int]:
    """What keeps the seats beside a nursery."""
    return of_nursery("seats")


def of_nursery(role: str) -> list[int]:
    """The processes of this run with this title: `nursery`, or `seats`."""
    return [pid for pid in descendants(os.getpid()) if cmdline(pid) == f"nydusd: {role}" and is_running(pid)]


def wait_for_end() -> None:
    """Until no nursery is left; the files of one that was killed are removed, as by whoever comes next."""
    wait_until(lambda: not nurseries() and not seats_kept(), "the end of the nurseries", 60)
    for path in discipline.runtime.glob("nursery-*"):
        path.unlink()


def is_ready(runtime: Path) -> bool:
    return bool(list(runtime.glob("nursery-*.sock")) and list(runtime.glob("nursery-*.seats")))


@contextmanager
def running_nursery() -> Iterator[int]:
    """A nursery in the run's run-time folder, where a daemon must live: its pid. Commands started here ask it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NYDUSD_NURSERY", "")
        client.start_if_useful()
        wait_until(lambda: is_ready(discipline.runtime), "a nursery")
        (pid,) = nurseries()
        try:
            yield pid
        finally:
            for other in nurseries():  # a daemon that found none has started another
                os.kill(other, signal.SIGKILL)
            wait_for_end()

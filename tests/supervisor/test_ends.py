"""Ending what other supervisors have left: all of them are killed before the end of one is waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from nydusd.frontends.fuse.holders import Holder
from nydusd.storage.state.lock import start_time
from nydusd.supervisor import nbd_left
from nydusd.supervisor.fuse import FuseDaemon
from nydusd.supervisor.nbd_left import Left, Note
from nydusd.waits import EndedError, Told

SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]
Orphans = list[tuple[int, int]]


class Watched(Told):
    """Notes how many were killed when one is waited for; `ends`: the daemon is told to end then."""

    def __init__(self, ends: bool) -> None:
        super().__init__("/mnt/image")
        self.ends = ends
        self.killed = 0
        self.seen: list[int] = []

    def wait(self, since: float, seconds: float, fd: int = -1) -> bool:
        self.seen.append(self.killed)
        if self.ends:
            raise EndedError("told to end")
        return super().wait(since, seconds, fd)


@pytest.fixture
def orphans() -> Iterator[Orphans]:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(SLEEPS)) for _ in range(3)]
        for process in processes:
            stack.callback(process.kill)
        yield [(process.pid, start_time(process.pid)) for process in processes]


def end_left(orphans: Orphans, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds a FUSE session that cannot be taken over."""
    holders = [Holder(*orphan, title="nydusd: fuse 0", is_sure=True) for orphan in orphans]
    monkeypatch.setattr("nydusd.supervisor.fuse.mounted_device", lambda _mountpoint: "0:77")
    monkeypatch.setattr(
        "nydusd.frontends.fuse.holders.holders_of",
        lambda _device: [holder for holder in holders if start_time(holder.pid) == holder.start],
    )
    daemon = SimpleNamespace(_store=SimpleNamespace(keep=id), _record={"session": {"device": "0:77"}}, told=told)
    FuseDaemon._end_left(cast(FuseDaemon, daemon), "/mnt/image")


def end_holders(orphans: Orphans, told: Told, _monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the clients of a block export."""
    Left(Note("", 1, 2, 3), -1, -1, {}, orphans).end_holders([], told)


def end_made_since(orphans: Orphans, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, of whom it was not known before."""
    pids = [pid for pid, _ in orphans]
    monkeypatch.setattr(nbd_left, "_processes", lambda: [*pids, os.getpid()])
    monkeypatch.setattr(nbd_left, "_memories", lambda pid: [1] if pid == os.getpid() or start_time(pid) > 0 else [])
    Left(Note("", 1, 2, 3), -1, -1, {}, []).end_holders([os.getpid()], told)


@pytest.mark.parametrize("ends", [False, True], ids=["to the end", "told to end"])
@pytest.mark.parametrize("end", [end_left, end_holders, end_made_since])
def test_all_are_killed_before_one_is_waited_for(
    orphans: Orphans,
    end: Callable[[Orphans, Told, pytest.MonkeyPatch], None],
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, kill = Watched(ends), signal.pidfd_send_signal

    def killed(pidfd: int, number: signal.Signals) -> None:
        told.killed += 1
        kill(pidfd, number)

    monkeypatch.setattr("signal.pidfd_send_signal", killed)
    with pytest.raises(EndedError) if ends else contextlib.nullcontext():
        end(orphans, told, monkeypatch)
    assert told.killed == len(orphans)
    assert set(told.seen) == {len(orphans)}
    for pid, _ in orphans:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

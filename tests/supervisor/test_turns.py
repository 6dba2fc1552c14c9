"""Processes of a daemon have short turns of the processor, unless somebody gave them another policy."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

import pytest

from nydusd import turns
from tests.supervisor.lives import IMAGE, wrong
from tests.support.daemon import Daemon

_GET_ATTR = {"x86_64": 315}.get(platform.machine(), 275)
_ATTR = struct.Struct("=IIQiIQQQII")
ROLES = ("fuse", "fetch", "decompress", "fork server")


def attributes(pid: int) -> tuple[int, int, int]:
    """Policy, nice value, and nanoseconds of a turn."""
    buffer = ctypes.create_string_buffer(_ATTR.size)
    assert ctypes.CDLL(None).syscall(_GET_ATTR, pid, buffer, _ATTR.size, 0) == 0
    _, policy, _, nice, _, runtime, *_ = _ATTR.unpack(buffer.raw)
    return policy, nice, runtime


@pytest.fixture(scope="module")
def shortest() -> int:
    """Of a turn that somebody asks for on this kernel; one before 6.12 has none to give."""
    pid = os.fork()
    if pid == 0:
        turns.be_short()
        os._exit(attributes(0)[2] == turns.SHORTEST)
    return turns.SHORTEST if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) else 0


def test_all_who_serve_a_reader_have_short_turns_at_the_usual_priority(shortest: int) -> None:
    with Daemon(IMAGE.bootstrap, IMAGE.blobs) as daemon:
        nice = os.getpriority(os.PRIO_PROCESS, daemon.pid)
        assert wrong(daemon) == []
        by_role = [daemon.pids(role) for role in ROLES]
        assert all(by_role)
        for pid in (daemon.pid, *(pid for pids in by_role for pid in pids)):
            assert attributes(pid) == (os.SCHED_OTHER, nice, shortest)


def test_a_policy_that_an_operator_chose_is_kept() -> None:
    daemon = Daemon(IMAGE.bootstrap, IMAGE.blobs)
    daemon.command = ["chrt", "--batch", "0", *daemon.command]
    with daemon:
        assert wrong(daemon) == []
        fetch, fork_servers = daemon.pids("fetch"), daemon.pids("fork server")
        assert fetch
        assert fork_servers
        for pid in (daemon.pid, *fetch, *fork_servers):
            assert attributes(pid)[0] == os.SCHED_BATCH

"""Who takes the place of a fork server that is gone, and when its copy is made."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import signal
from collections.abc import Iterator

import pytest

from nydusd.forkserver import servers
from nydusd.forkserver.client import ForkServer
from nydusd.forkserver.process import Process
from tests.forkserver.spawned import spawn, wait_for_copy, wait_until_gone
from tests.support.discipline import wait_until
from tests.support.fork_server import fork_server


def test_one_that_ended_is_replaced_before_it_is_needed() -> None:
    def is_another() -> bool:
        server.tend()
        return server.pid not in (0, before)

    with fork_server() as server:
        before = server.pid
        server.tend()
        assert server.pid == before
        os.kill(before, signal.SIGKILL)
        wait_until(is_another, "another fork server", 60)


def test_its_copy_takes_its_place_at_once_and_has_one_made_of_its_own() -> None:
    with fork_server() as server:
        first, second = wait_for_copy(server)
        os.kill(first, signal.SIGKILL)
        process, _ = spawn(server, status=3)
        assert process.wait(10) == 3
        process.close()
        assert server.pid == second
        assert wait_for_copy(server)[0] == second
        third = server.pids[1]
        os.kill(third, signal.SIGKILL)
        wait_until_gone(server, third)
        assert server.pid == second
        for pid in wait_for_copy(server):  # both at once
            os.kill(pid, signal.SIGKILL)
        process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()
        assert wait_for_copy(server)


def test_a_copy_has_the_priority_of_whoever_has_it_made() -> None:
    """Its original may have another one at that moment: that of a daemon that hurries to take over."""
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    with fork_server() as server:
        os.setpriority(os.PRIO_PROCESS, server.pid, usual - 5)
        _, copy = wait_for_copy(server)
        assert os.getpriority(os.PRIO_PROCESS, copy) == usual


def test_when_it_and_its_copy_are_killed_another_is_started_at_once() -> None:
    """Until then one of those that hold the mount is missing."""
    with fork_server() as server:
        pids = wait_for_copy(server)
        watched = [Process(pid) for pid in pids]
        for process in watched:
            process.send_signal(signal.SIGKILL)
        for process in watched:
            wait_until(lambda process=process: process.poll() is not None, "it is gone", 60)  # type: ignore[misc]
            process.close()
        assert server.tend()
        assert server.pid not in (0, *pids)


def test_one_that_cannot_load_is_tried_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a package is being upgraded. When it can be loaded again, all is as before."""
    monkeypatch.setattr(servers, "_INTERVAL_NO_ROOM", 4 * servers._INTERVAL)
    with monkeypatch.context() as patch:
        patch.setattr("nydusd.forkserver.start.FOR_DAEMON", ("nothing_of_this_name",))
        server = ForkServer()

        def is_seldom() -> bool:
            server.tend()
            return server._interval == servers._INTERVAL_NO_ROOM

        wait_until(is_seldom, "two that failed", 60)
    try:
        wait_for_copy(server)
        assert server._interval == servers._INTERVAL
    finally:
        server.close()


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """No file descriptor is left for this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_there_is_no_room_for_a_copy_or_a_guardian_it_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the daemon goes on."""
    monkeypatch.setattr("nydusd.forkserver.servers._INTERVAL_NO_ROOM", 0.1)
    with fork_server() as server:
        assert select.select([server._servers[0].line], [], [], 60)[0]
        server._hear(server._servers[0])
        assert server.ready
        with no_room():
            server.guard(1000)
            server.tend()
            assert server.due() < math.inf
        first, copy = wait_for_copy(server)
        assert not server._unguarded
        process = server._servers[0].process
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: process.poll() is not None, "it is gone", 60)
        with no_room():
            server.tend()
            assert server._unguarded
        assert wait_for_copy(server)[0] == copy != first
        assert not server._unguarded

"""A fork server that is stopped, or answers late: it is waited for, passed by, or ended."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nydusd.forkserver import client
from nydusd.forkserver.client import ForkServer, LoadingError
from nydusd.forkserver.process import Process
from tests.forkserver.spawned import open_in, spawn, spawn_leaving, stop, wait_for_copy, wait_until_gone
from tests.support.discipline import wait_until
from tests.support.fork_server import fork_server


def test_one_that_is_stopped_while_it_loads_is_waited_for_though_its_line_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Longer than for one that has loaded."""
    monkeypatch.setattr(client, "_PATIENCE", 0.1)
    monkeypatch.setattr(client, "_PATIENCE_STOPPED", 60.0)
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"), fork_server() as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
        while not server._servers[0].is_late:
            server.hold([reader])
        go_on = threading.Timer(0.5, os.kill, (pid, signal.SIGCONT))
        go_on.start()
        process, _ = spawn(server)
        go_on.join()
        assert process.wait(10) == 0
        process.close()
        assert server.pid == pid


def test_a_child_that_may_wait_does_not_wait_for_one_that_stays_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as for one that loads: a daemon that takes over has readers waiting."""
    monkeypatch.setattr(client, "_FIRST_PATIENCE", 600.0)
    with fork_server() as server:
        pid = server.pid
        stop(pid)
        process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()
        assert server.pid != pid


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ForkServer, list[int]]]:
    """The fork server of a daemon that serves, and the pids of it and its copy, which may be silent for long."""
    for name in ("_PATIENCE", "_PATIENCE_WITH_COPY", "_PATIENCE_WITH_ALL"):
        monkeypatch.setattr(client, name, 60.0)
    with fork_server() as server:
        pids = wait_for_copy(server)
        server.waits = False
        yield server, pids


def wait_until_free(server: ForkServer, pid: int) -> None:
    def is_free() -> bool:
        server.tend()
        return server.pid == pid and server._servers[0].is_free

    wait_until(is_free, "it has answered", 60)


def test_a_daemon_that_serves_asks_the_copy_of_one_that_is_stopped_for_a_moment_and_kills_neither(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(monkeypatch) as (server, pids):
        stop(pids[0])
        for status in (3, 4):
            process = spawn_leaving(server, status)
            assert process.wait(10) == status
            process.close()
        assert server.ready
        assert server.pids == pids
        os.kill(pids[0], signal.SIGCONT)
        wait_until_free(
            server, pids[0]
        )  # the child that it was asked for first was never let begin, or that were an error
        stop(pids[1])
        process = spawn_leaving(server, 5)
        assert process.wait(10) == 5
        process.close()
        assert server.pids == pids
        os.kill(pids[1], signal.SIGCONT)


def test_a_daemon_that_serves_goes_on_while_both_are_stopped_and_asks_again_when_one_has_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(monkeypatch) as (server, pids):
        for pid in pids:
            stop(pid)
        for _ in range(10):  # whoever asks again is not kept waiting
            with pytest.raises(LoadingError):
                spawn_leaving(server, 3)
            assert not server.ready
        assert [one._asked for one in server._servers] == [1, 1]
        assert server.due() < math.inf
        os.kill(pids[0], signal.SIGCONT)
        wait_until_free(server, pids[0])
        process = spawn_leaving(server, 3)
        assert process.wait(10) == 3
        process.close()
        assert server.pids == pids


def ask_in_vain(server: ForkServer, pids: list[int]) -> None:
    """All fork servers are stopped, and each of them is asked for a child."""
    for pid in pids:
        stop(pid)
    with pytest.raises(LoadingError):
        spawn_leaving(server, 3)


def test_where_all_are_silent_another_is_loaded_and_takes_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before they are given up: somebody waits for what the child does."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"), serving(monkeypatch) as (server, pids):
        server.hold([reader])
        ask_in_vain(server, pids)
        monkeypatch.setattr(client, "_PATIENCE_WITH_ALL", 0.1)
        assert server.due() < math.inf
        known: list[list[int]] = []
        server.started = lambda: known.append(server.pids)

        def another_is_ready() -> bool:
            server.tend()
            return server.ready

        wait_until(another_is_ready, "another fork server", 60)
        assert not set(server.pids) & set(pids)
        (another,) = server.pids
        assert [*pids, another] in known, "who takes over from us finds all three"
        process = spawn_leaving(server, 3)
        assert process.wait(10) == 3
        process.close()
        assert open_in(another, reader) == [reader]
        assert wait_for_copy(server)[0] == another


def test_the_one_that_is_loaded_beside_silent_ones_is_ended_when_one_of_these_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(monkeypatch) as (server, pids):
        ask_in_vain(server, pids)
        monkeypatch.setattr(client, "_PATIENCE_WITH_ALL", 0.1)

        def is_loaded_beside() -> bool:
            server.tend()
            return len(server.pids) == 3

        wait_until(is_loaded_beside, "another fork server")
        another = Process(server.pids[2])
        another.send_signal(signal.SIGSTOP)
        os.kill(pids[1], signal.SIGCONT)
        assert another.wait(0) is None

        def one_has_answered() -> bool:
            server.tend()
            return server.ready

        wait_until(one_has_answered, "an answer", 60)
        assert server.pids == pids
        assert another.wait(10) == -signal.SIGKILL
        another.close()
        os.kill(pids[0], signal.SIGCONT)


def test_a_daemon_that_serves_ends_one_that_goes_on_to_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PATIENCE_WITH_COPY", 0.3)
    with fork_server() as server:
        first, copy = wait_for_copy(server)
        server.waits = False
        hung = Process(first)
        stop(first)
        process = spawn_leaving(server, 0)
        assert process.wait(10) == 0
        process.close()
        assert server.due() < math.inf
        wait_until_gone(server, first)
        assert hung.wait(10) == -signal.SIGKILL
        hung.close()
        assert wait_for_copy(server)[0] == copy


def test_where_each_answer_takes_longer_than_a_moment_a_child_is_made_all_the_same(tmp_path: Path) -> None:
    slow = f"lambda name: time.sleep({3 * client._MOMENT}) if name == 'fork server: asked' else None"
    (tmp_path / "slow.py").write_text(f"import time\nfrom nydusd import points\npoints.reach = {slow}")
    made: list[Process] = []
    with fork_server() as server:
        process, _ = spawn(server, ("slow",))
        assert process.wait(10) == 0
        process.close()
        wait_for_copy(server)
        server.waits = False

        def is_made() -> bool:
            server.tend()
            with contextlib.suppress(LoadingError):
                made.append(spawn_leaving(server, 3))
            return bool(made)

        wait_until(is_made, "a child", 20)
        (process,) = made
        assert process.wait(10) == 3
        process.close()

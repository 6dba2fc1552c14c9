"""Who takes the place of a fork server that is gone, and what it and its copy hold, or are told late."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nydusd.forkserver import client
from nydusd.forkserver.client import ForkServer, LoadingError
from nydusd.forkserver.fresh import FreshServer
from nydusd.forkserver.process import Process
from nydusd.supervisor.family import Family
from tests.forkserver.spawned import spawn, spawn_leaving, wait_for_copy
from tests.support.discipline import wait_until
from tests.support.fork_server import fork_server


def wait_until_gone(server: ForkServer, pid: int) -> None:
    def is_gone() -> bool:
        server.tend()
        return pid not in server.pids

    wait_until(is_gone, "the end of a fork server", 60)


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


def test_what_it_is_to_hold_is_held_under_our_numbers_by_whoever_takes_its_place_and_by_no_child() -> None:
    reader, writer = os.pipe()
    try:
        with fork_server() as server:
            for _ in range(2):  # where its own line may have one of these numbers
                server.hold([reader, writer])
            for kill in ([], [0], [0, 1]):
                pids = wait_for_copy(server)
                for which in kill:
                    os.kill(pids[which], signal.SIGKILL)
                    wait_until_gone(server, pids[which])
                process, told = spawn(server)
                assert os.readlink(f"/proc/self/fd/{reader}") not in told["fds"].values()  # type: ignore[attr-defined]
                assert process.wait(10) == 0
                process.close()
                for pid in wait_for_copy(server):
                    for fd in (reader, writer):
                        assert os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), os.fstat(fd))
    finally:
        os.close(reader)
        os.close(writer)


def open_in(pid: int, like: int) -> list[int]:
    """The numbers under which a process has this file of ours open."""
    wanted, found = os.fstat(like), []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), wanted):
                found.append(int(name))
    return sorted(found)


def test_what_its_line_has_no_room_for_it_is_told_later_and_is_not_killed_for() -> None:
    """It is stopped, or is loading, while clients of an export come and go."""
    one, other = os.memfd_create("one"), os.memfd_create("other")
    with open(one, "rb"), open(other, "rb"), fork_server() as server:
        process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()
        pid, first = server.pid, server._servers[0]
        before, stay = os.dup(one), os.dup(one)
        server.hold([before, stay])
        assert server.holders == [pid]
        stop(pid)
        for _ in range(10_000):
            client = os.dup(one)
            server.hold([client])
            server.release([client])
            os.close(client)
            if first.is_late:
                break
        assert first.is_late, "a line that takes everything"
        server.release([before])
        again = os.dup2(other, before, inheritable=False)  # the number is another file's now
        new = os.dup(one)
        server.hold([again, new])
        server.guard(1000)
        server.tend()
        assert (server.pids, server.holders, server._copying) == ([pid], [], None)
        assert server._unguarded
        assert server.due() < math.inf
        holders: list[list[int]] = []
        server.started = lambda: holders.append(server.holders)
        os.kill(pid, signal.SIGCONT)

        def has_all() -> bool:
            server.tend()
            return pid in server.holders and not server._unguarded

        wait_until(has_all, "all is told", 60)
        assert [pid] in holders, "who depends on it is told that it holds all"
        process, _ = spawn(server)  # when that is there, all that was told before is done
        assert process.wait(10) == 0
        process.close()
        assert server.pid == pid
        assert open_in(pid, one) == sorted([stay, new])
        assert open_in(pid, other) == [again]
        for fd in (stay, new, again):
            os.close(fd)


def test_one_that_takes_the_place_of_another_holds_nothing_that_was_let_go_of_while_it_was_tried() -> None:
    """Clients of an export come and go during an upgrade. Numbers are used again."""
    one, other = os.memfd_create("one"), os.memfd_create("other")
    with open(one, "rb"), open(other, "rb"), fork_server() as server:
        fresh = FreshServer()
        try:
            stays, leaves, changes = (os.dup(one) for _ in range(3))
            server.hold([stays, leaves, changes])
            fresh.hold(server.held)
            server.release([leaves, changes])
            os.close(leaves)
            os.dup2(other, changes, inheritable=False)
            server.hold([changes])
            nothing = lambda: None  # noqa: E731
            family = SimpleNamespace(
                fork_server=server, _watch_fork_server=nothing, _have_guarded=nothing, remember=nothing
            )
            Family.succeed(cast("Family", family), fresh)
        finally:
            fresh.close()
        process, _ = spawn(server)  # when that is there, all that was told before is done
        assert process.wait(10) == 0
        process.close()
        assert open_in(server.pid, one) == [stays]
        assert open_in(server.pid, other) == [changes]
        for fd in (stays, changes):
            os.close(fd)


def test_one_that_is_stopped_while_it_loads_is_waited_for_though_its_line_is_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Longer than for one that has loaded."""
    monkeypatch.setattr(client, "_PATIENCE", 0.1)
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


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text(), "it is stopped", 60)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ForkServer, list[int]]]:
    """The fork server of a daemon that serves, and the pids of it and its copy, which may be silent for long."""
    monkeypatch.setattr(client, "_PATIENCE_WITH_COPY", 60.0)
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


def test_one_that_cannot_load_is_tried_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while a package is being upgraded. When it can be loaded again, all is as before."""
    monkeypatch.setattr(client, "_INTERVAL_NO_ROOM", 4 * client._INTERVAL)
    with monkeypatch.context() as patch:
        patch.setattr("nydusd.forkserver.start.FOR_DAEMON", ("nothing_of_this_name",))
        server = ForkServer()

        def is_seldom() -> bool:
            server.tend()
            return server._interval == client._INTERVAL_NO_ROOM

        wait_until(is_seldom, "two that failed", 60)
    try:
        wait_for_copy(server)
        assert server._interval == client._INTERVAL
    finally:
        server.close()


def environments(pid: int) -> list[int]:
    """The numbers under which a process has what a daemon would be started again with."""
    folder = Path(f"/proc/{pid}/fd")
    return [int(name) for name in os.listdir(folder) if "nydusd-environment" in os.readlink(folder / name)]


def test_the_environment_for_another_daemon_is_in_no_child_and_makes_way_for_what_is_held() -> None:
    with fork_server() as server:
        server.guard(60.0)
        process, told = spawn(server)
        assert not [path for path in told["fds"].values() if "environment" in path]  # type: ignore[attr-defined]
        assert process.wait(10) == 0
        process.close()
        (number,) = environments(server.pid)
        assert server._servers[0].tell({"hold": [number]}, [0])
        process, _ = spawn(server)  # when that is there, it holds
        assert process.wait(10) == 0
        process.close()
        assert os.path.samestat(os.stat(f"/proc/{server.pid}/fd/{number}"), os.fstat(0))
        assert len(environments(server.pid)) == 1


def inheritable(pid: int) -> list[str]:
    """What a program that this process starts would have of its fds, but for stdio."""
    found = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        (flags,) = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("flags:")]
        if int(path.name) > 2 and not int(flags, 8) & os.O_CLOEXEC:
            found.append(os.readlink(f"/proc/{pid}/fd/{path.name}"))
    return found


def test_a_daemon_that_it_starts_would_inherit_nothing_of_what_it_was_given() -> None:
    """Not the environment, which may have secrets; nor lines: whose other end would never learn that one is gone."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb"), fork_server() as server:
        server.hold([reader])
        server.guard(60.0)
        for pid in wait_for_copy(server):
            assert inheritable(pid) == []
        os.kill(server.pid, signal.SIGKILL)
        process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()
        assert environments(server.pid)
        assert inheritable(server.pid) == []


def test_what_it_was_given_last_is_held_though_the_giver_died_before_it_had_read_an_answer() -> None:
    """The kernel then says ECONNRESET first, and only after that gives what lies in the socket."""
    reader, writer = os.pipe()
    with open(reader, "rb") as held, fork_server() as server:
        first = server._servers[0]
        assert select.select([first.line], [], [], 60)[0]  # it has said that it is ready, and nobody reads that
        process = Process(first.process.pid)
        try:
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: ") T " in Path(f"/proc/{process.pid}/stat").read_text(), "it is stopped")
            server.hold([reader])
            first.line.close()
            process.send_signal(signal.SIGCONT)

            def holds() -> bool:
                with contextlib.suppress(FileNotFoundError):
                    return os.path.samestat(os.stat(f"/proc/{process.pid}/fd/{reader}"), os.fstat(held.fileno()))
                return False

            wait_until(lambda: holds() or process.poll() is not None, "it holds the fd, or has ended")
            assert holds()
            os.close(writer)  # what it holds is over, and so is it
            assert process.wait(10) == 0
        finally:
            process.close()


@pytest.mark.parametrize("holds", [False, True], ids=["holds nothing", "holds something"])
def test_one_whose_supervisor_is_killed_while_it_loads_loads_no_more_and_holds_what_it_was_given(
    tmp_path: Path, holds: bool
) -> None:
    """Its successor and the fork server of that wait for the processor."""
    begun, goes_on, marker = tmp_path / "begun", tmp_path / "goes-on", tmp_path / "marker"
    os.mkfifo(begun)
    os.mkfifo(goes_on)
    (tmp_path / "slow.py").write_text(f"open({str(begun)!r}, 'w').close(); open({str(goes_on)!r}).read()")
    for name in ("next_one", "asked_for"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "nydusd.forkserver", str(theirs.fileno()), "slow", "next_one"]
    with ours, open(reader, "rb") as held, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as server:
        theirs.close()
        begun.read_bytes()  # it is in the middle of the first
        if holds:
            socket.send_fds(ours, [json.dumps({"hold": [reader]}).encode()], [reader])
        gate, key = os.pipe()
        request = json.dumps({"module": "child", "fds": [reader], "load": ["asked_for"]}).encode()
        socket.send_fds(ours, [request], [reader, gate])
        for fd in (gate, key):
            os.close(fd)
        ours.close()
        goes_on.write_bytes(b"")

        def is_held() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return os.path.samestat(os.stat(f"/proc/{server.pid}/fd/{reader}"), os.fstat(held.fileno()))
            return False

        wait_until(lambda: server.poll() is not None or (holds and is_held()), "it has done what is in its line", 60)
        assert is_held() == holds
        os.close(writer)  # what it holds is over, and so is it
        assert server.wait(60) == 0
    assert not marker.exists()


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
    monkeypatch.setattr("nydusd.forkserver.client._INTERVAL_NO_ROOM", 0.1)
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


def test_one_that_is_started_is_known_of_before_it_holds_anything() -> None:
    """A successor ends it then, whenever its supervisor is killed. It counts as a holder when all is in its line."""
    reader, writer = os.pipe()
    known: list[tuple[list[int], list[tuple[list[int], list[int]]]]] = []
    with open(reader, "rb"), open(writer, "wb"), fork_server() as server:
        server.hold([reader])
        before = wait_for_copy(server)
        send = socket.send_fds

        def sent(*args: object) -> int:
            known.append((server.pids, list(noted)))
            return send(*args)  # type: ignore[arg-type]

        noted: list[tuple[list[int], list[int]]] = []
        server.started = lambda: noted.append((server.pids, server.holders))
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "send_fds", sent)
            process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()
        assert server.pid not in before
        one = [server.pid]
        assert noted == [(one, []), (one, one)]
        assert next(noted for pids, noted in known if pids == one) == [(one, [])], "held before it was noted"

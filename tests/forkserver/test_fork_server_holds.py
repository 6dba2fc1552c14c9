"""What a fork server and its copy hold for a daemon, are told late, and pass on to nobody."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nydusd.forkserver.fresh import FreshServer
from nydusd.forkserver.process import Process
from nydusd.supervisor.family import Family
from tests.forkserver.spawned import open_in, spawn, stop, wait_for_copy, wait_until_gone
from tests.support.discipline import wait_until
from tests.support.fork_server import fork_server


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

"""Children of the fork server: what they are given, whose they are, and what becomes of them when it is gone."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
from pathlib import Path

import pytest

from nydusd.forkserver.client import LoadingError
from nydusd.forkserver.environment import environment
from nydusd.forkserver.fresh import FreshServer
from nydusd.forkserver.guardian import guard
from nydusd.forkserver.line import PACKET_MAX
from nydusd.forkserver.process import Process
from nydusd.ipc.spec import write_spec
from nydusd.supervisor.children import Child, reap_strays
from nydusd.waits import DEAF, EndedError, Told
from tests.forkserver.spawned import spawn, wait_for_copy
from tests.killing.plan import Plan
from tests.support.discipline import wait_until
from tests.support.fork_server import fork_server


def test_a_child_has_its_fds_under_their_numbers_and_no_others() -> None:
    with fork_server() as server:
        reader, writer = os.pipe()
        high = 700
        os.dup2(reader, high)
        spec_fd = write_spec({"out": writer})
        process = server.spawn("child", [spec_fd, writer, high, reader])
        for fd in (writer, high, spec_fd):
            os.close(fd)
        with open(reader, "rb") as f:
            told = json.loads(f.read())
        assert process.wait(10) == 0
        process.close()
    own = {"0", "1", "2", str(spec_fd), str(writer), str(high), str(reader)}
    assert told["fds"].keys() <= own
    assert told["fds"][str(high)] == told["fds"][str(writer)] == told["fds"][str(reader)]
    assert str(spec_fd) not in told["fds"]  # it was read and closed


def test_a_child_is_ours_and_its_end_is_told_to_us() -> None:
    with fork_server() as server:
        process, _ = spawn(server, status=7)
        assert process.wait(10) == 7
        process.close()
        process, _ = spawn(server, wait=True)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        process.close()


def test_modules_that_are_asked_for_are_there_when_the_child_begins() -> None:
    with fork_server() as server:
        for load, loaded in (((), False), (("extra",), True), ((), True)):
            process, told = spawn(server, load)
            assert told["loaded"] is loaded
            assert process.wait(10) == 0
            process.close()


def test_a_module_that_is_not_there_is_an_error_and_the_server_lives() -> None:
    with fork_server() as server:
        with pytest.raises(OSError, match="nothing_of_this_name"):
            spawn(server, ("nothing_of_this_name",))
        pid = server.pid
        process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()
        assert server.pid == pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_children_outlive_it_and_another_takes_its_place(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nydusd.forkserver.client._PATIENCE", 3.0)
    with fork_server() as server:
        first, _ = spawn(server, wait=True)
        os.kill(server.pid, number)
        second, _ = spawn(server)
        assert second.wait(10) == 0
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        assert first.wait(10) == -signal.SIGKILL
        first.close()
        second.close()


def test_a_child_that_nobody_knows_of_does_not_begin(tmp_path: Path) -> None:
    """The supervisor was killed, or has given up, between the request and the answer."""
    with fork_server() as server:
        first = server._servers[0]
        marker = tmp_path / "begun"
        (tmp_path / "marking.py").write_text(f"open({str(marker)!r}, 'w').close()")
        for begins in (False, True):
            gate, key = os.pipe2(os.O_CLOEXEC)
            spec_fd = write_spec({})
            request = json.dumps({"module": "marking", "fds": [spec_fd], "load": []}).encode()
            answer = server._ask(first, request, [spec_fd, gate])
            assert answer is not None
            process = Process(answer["pid"])
            if begins:
                os.write(key, b"g")
            for fd in (gate, key, spec_fd):
                os.close(fd)
            assert process.wait(10) == 0
            process.close()
            assert marker.exists() == begins
        assert server.pid == first.process.pid


def test_a_child_that_dies_before_it_begins_is_an_error_and_costs_no_file_descriptor() -> None:
    server = FreshServer()
    try:
        wait_until(server.is_ready, "it has loaded", 60)
        before = len(os.listdir("/proc/self/fd"))
        spec_fd = write_spec({})
        server.ask_for_child("child", [spec_fd], ())
        os.close(spec_fd)
        assert select.select([server], [], [], 60)[0]
        answer = json.loads(server._servers[0].line.recv(PACKET_MAX, socket.MSG_PEEK))
        child = os.pidfd_open(answer["pid"])
        signal.pidfd_send_signal(child, signal.SIGKILL)
        assert select.select([child], [], [], 60)[0]
        os.close(child)
        with pytest.raises(OSError, match="a child has died before it began"):
            server.take_child()
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.waitpid(answer["pid"], 0)[1] == signal.SIGKILL
    finally:
        server.close()


def test_it_ends_when_whoever_started_it_is_gone() -> None:
    with fork_server() as server:
        ends = [Process(pid) for pid in wait_for_copy(server)]
        for one in server._servers:
            one.line.close()
        for process in ends:
            assert process.wait(10) == 0
            process.close()


def test_credentials_of_our_environment_are_for_those_alone_that_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "NYDUS_HEADER_X": "1",
        "DOCKER_CONFIG": "/x",
        "AWS_SECRET_ACCESS_KEY": "s",
        "https_proxy": "http://u:p@h",
        "MIRROR": "https://u:p@h/",
    }
    for name, value in (secrets | {"LANG": "C"}).items():
        monkeypatch.setenv(name, value)
    assert environment(secrets=False)["LANG"] == "C"
    assert not environment(secrets=False).keys() & secrets.keys()
    assert environment(secrets=True).items() >= secrets.items()
    with fork_server() as server:
        process, told = spawn(server, environment=environment(secrets=True))
        assert process.wait(10) == 0
        assert told["environment"].items() >= secrets.items()  # type: ignore[attr-defined]
        process.close()
        process, told = spawn(server)
        assert process.wait(10) == 0
        assert not told["environment"].keys() & secrets.keys()  # type: ignore[attr-defined]
        process.close()


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_what_a_worker_had_started_is_let_go_of_when_both_have_ended() -> None:
    with fork_server() as server:
        reap_strays([], [server.pid])  # what earlier tests have left to us
        before = children()
        pid = os.fork()
        if pid == 0:  # a worker that starts something and ends
            os.fork()
            os._exit(0)
        os.waitpid(pid, 0)

        def is_gone() -> bool:
            reap_strays([], list(before))
            return children() == before

        wait_until(is_gone, "the end of what became our child")
        assert server.pid in before


def test_nobody_waits_for_one_that_is_loading_if_that_is_not_wanted() -> None:
    with fork_server() as server:
        server.waits = False
        with pytest.raises(LoadingError):
            spawn(server)
        pids = wait_for_copy(server)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(LoadingError):
            spawn(server)
        child = Child("child", 0, "child")
        child.start(server, {"out": 1}, [])
        assert child.process is None
        assert child.restart_at is not None
        wait_for_copy(server)
        with server.waited_for():  # on a busy machine an answer may take longer than a moment
            process, _ = spawn(server)
        assert process.wait(10) == 0
        process.close()


class ToldToEnd(Told):
    """Is told so while the answer of a fork server is waited for."""

    def wait(self, since: float, seconds: float, fd: int = -1) -> bool:
        raise EndedError("told to end")


def test_the_answer_to_a_request_that_was_given_up_is_not_taken_for_that_to_the_next() -> None:
    """It comes, whatever release the fork server is of."""
    with fork_server() as server:
        pid = server.pid
        for _ in range(2):
            server.told = ToldToEnd("test")
            with pytest.raises(EndedError):
                spawn(server, ("nothing_of_this_name",))
            server.told = DEAF
            for status in (3, 4):
                process, _ = spawn(server, status=status)
                assert process.wait(10) == status
                process.close()
        assert server.pid == pid


def test_a_guardian_that_cannot_start_the_command_goes_on_trying(capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    environment_fd = os.memfd_create("environment")
    task = {"delay": 0.01, "command": ["/nonexistent/python"], "environment": environment_fd}
    with open(reader, "rb"), open(environment_fd, "rb"):
        guardian = threading.Thread(target=guard, args=(reader, task))
        guardian.start()
        told: list[str] = []

        def has_tried_twice() -> bool:
            told.append(capfd.readouterr().err)
            return "".join(told).count("/nonexistent/python: No such file or directory; trying again") > 1

        try:
            wait_until(lambda: has_tried_twice() or not guardian.is_alive(), "two tries", 60)
            assert guardian.is_alive()
        finally:
            os.close(writer)  # the mount is over
            guardian.join(60)
        assert not guardian.is_alive()


@pytest.mark.parametrize("point", ["fork server: between it and a child", "fork server: before a child's pid is told"])
def test_whoever_is_killed_while_a_child_is_made_costs_the_child_nothing(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(tmp_path / "plan")
    plan.begin(point, 1)
    path = f"{tmp_path}:{plan.environment['PYTHONPATH']}"
    for name, value in (plan.environment | {"PYTHONPATH": path}).items():
        monkeypatch.setenv(name, value)
    with fork_server() as server:
        pid = server.pid
        process, _ = spawn(server, status=5)
        assert process.wait(10) == 5
        process.close()
        assert server.pid == pid
    assert plan.end()[0]

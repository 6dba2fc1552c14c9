"""Clients of the API who say nothing: nydus-snapshotter's probe takes its end for the daemon's. Real daemons."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from nydusd.ipc.silent import HELD_MOST
from tests.supervisor.lives import IMAGE, config_for, wrong
from tests.support.api import Wire
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import wait_until
from tests.support.keeper import Keeper, begin, put, state_of

CONNECTED = "03"
GET = "GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"front_ends": 1, "worker_idle": 0})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        yield daemon


def wire_to(daemon: Daemon) -> Wire:
    return Wire(str(daemon.apisock))


def is_served(daemon: Daemon) -> Wire:
    """By then whoever has connected or said something before was let in, and heard."""
    wire = wire_to(daemon)
    assert wire.ask("GET", "/nowhere").status == 404
    assert wire.ask("GET", "/nowhere").status == 404
    return wire


def kill_api(daemon: Daemon) -> None:
    (api,) = daemon.pids("api")
    daemon.kill(api)
    wait_for_role(daemon, "api", 1, without=api)


def held(daemon: Daemon) -> int:
    """How many clients the supervisor holds."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    clients = {f"socket:[{row[6]}]" for row in rows if row[7:] == [str(daemon.apisock)] and row[5] == CONNECTED}
    count = 0
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(f"/proc/{daemon.pid}/fd/{fd}") in clients
    return count


def test_a_silent_client_outlives_the_api_process_and_is_served_by_the_next(daemon: Daemon) -> None:
    with wire_to(daemon) as silent:
        for _ in range(2):
            with wire_to(daemon) as half, is_served(daemon) as used:
                half.send(GET[:20])
                is_served(daemon).sock.close()
                kill_api(daemon)
                assert half.at_end()
                assert used.at_end()
            is_served(daemon).sock.close()
            assert silent.is_open()
        assert silent.ask("GET", "/api/v1/daemon").json["state"] == "RUNNING"
        kill_api(daemon)
        assert silent.at_end()
    assert wrong(daemon) == []


def test_what_a_silent_client_says_while_there_is_no_api_process_is_answered(daemon: Daemon) -> None:
    with wire_to(daemon) as silent, wire_to(daemon) as left:
        is_served(daemon).sock.close()
        (api,) = daemon.pids("api")
        wait_until(lambda: held(daemon) == 2, "both to be held")
        os.kill(api, signal.SIGSTOP)
        silent.send(GET)
        left.sock.close()
        daemon.kill(api)
        assert silent.response().json["state"] == "RUNNING"
        assert silent.ask("GET", "/api/v1/daemon").status == 200
        wait_until(lambda: held(daemon) == 0, "both to be let go of")


def test_the_supervisor_holds_no_more_than_it_may_and_nobody_who_has_left(daemon: Daemon) -> None:
    with is_served(daemon) as wire:
        for kills in (0, 1):
            with ExitStack() as stack:
                silent = [stack.enter_context(wire_to(daemon)) for _ in range(300)]
                wait_until(lambda: held(daemon) == HELD_MOST, "as many as may be held", 60)
                for _ in range(kills):
                    kill_api(daemon)
                    assert sum(wire.is_open() for wire in silent) == HELD_MOST
            wait_until(lambda: held(daemon) == 0, "all to be let go of", 60)
        assert wire.at_end()


def test_a_supervisor_that_hangs_is_told_later_and_nothing_is_read_before(daemon: Daemon) -> None:
    with is_served(daemon):
        with wire_to(daemon) as silent:
            wait_until(lambda: held(daemon) == 1, "the client to be held")
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                with ExitStack() as stack:  # more than there is room for on the way to it
                    for _ in range(400):
                        stack.enter_context(wire_to(daemon))
                silent.send("GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
                is_served(daemon).sock.close()
                assert silent.is_open()
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            assert silent.response().status == 404
        wait_until(lambda: held(daemon) == 0, "all to be let go of", 60)


def test_silent_clients_see_the_end_of_the_supervisor(daemon: Daemon) -> None:
    with wire_to(daemon) as old, wire_to(daemon) as inherited:
        is_served(daemon).sock.close()
        kill_api(daemon)
        with wire_to(daemon) as young:
            is_served(daemon).sock.close()
            daemon.kill_supervisor()
            assert [wire.at_end() for wire in (old, inherited, young)] == [True] * 3
    daemon.start()
    assert wrong(daemon) == []


def test_a_silent_client_of_a_daemon_that_waits_to_take_over_is_kept_until_it_serves(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"front_ends": 1})
    try:
        with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, args=keeper.args) as daemon:
            keeper.save(daemon)
            daemon.kill_all()
            begin(daemon)
            with wire_to(daemon) as silent:
                for _ in range(2):
                    is_served(daemon).sock.close()
                    kill_api(daemon)
                keeper.give(daemon)
                wait_until(lambda: state_of(daemon) == "READY", "READY", 60)
                kill_api(daemon)
                assert put(daemon, "start") == 204
                assert silent.ask("GET", "/api/v1/daemon").json["state"] == "RUNNING"
            assert wrong(daemon) == []
    finally:
        keeper.close()

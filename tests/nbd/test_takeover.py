"""The supervisor of a block export is killed: clients are served on, and the next supervisor goes on with all of them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bench.image import Built
from nydusd.frontends.nbd import protocol
from tests.killing.plan import Plan
from tests.nbd.test_export import Export, answered, command, exactly, is_closed, read, serving
from tests.support.daemon import image_config, wait_for_role
from tests.support.discipline import cmdline, descendants, is_running, wait_until
from tests.support.oracle import Image

WAITS = "waiting for a fork server to hold the clients"
POINTS = ("clients: memory copied", "clients: noted", "clients: before a front end")


def export_of(built: Built, cache: Path, plan: Plan) -> Export:
    what = Image("built", built.bootstrap, built.blob.parent, built.bootstrap, built.bootstrap)
    return Export(what, config=image_config(what.blobs, cache), environment=plan.environment)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def disk(built: Built, cache: Path, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What is exported, read in peace; from now on it is in the cache folder."""
    with export_of(built, cache, plan) as made:
        return made.copy(tmp_path_factory.mktemp("disk") / "disk").read_bytes()


@pytest.fixture
def export(built: Built, cache: Path, plan: Plan, disk: bytes) -> Iterator[Export]:
    with export_of(built, cache, plan) as made:
        with serving(made) as wire:  # its blob is opened: what is cached needs no supervisor from now on
            assert read(wire, len(disk) // 2, 4096)[0] == 0
        yield made


def front_end(export: Export) -> int:
    (pid,) = export.pids("nbd")
    return pid


def end(pid: int) -> None:
    """SIGKILL somebody, who may have ended by now, and wait for that."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "its end", 60)


def reads_anywhere(wire: socket.socket, disk: bytes, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(20):
        length = choose.randrange(1, 300_000)
        offset = choose.randrange(len(disk) - length)
        assert read(wire, offset, length) == (0, disk[offset : offset + length])


def test_clients_are_served_without_a_supervisor_and_go_on_with_the_next(export: Export, disk: bytes) -> None:
    with serving(export) as wire:
        served_by = front_end(export)
        export.kill_supervisor()
        reads_anywhere(wire, disk, 1)
        assert is_running(served_by)
        with export.connect() as late:
            export.start()
            assert not is_running(served_by), "one front end at a time"
            reads_anywhere(wire, disk, 2)
            assert exactly(late, 18) == protocol.GREETING, "who came while there was no supervisor was kept waiting"
        with serving(export) as other:
            reads_anywhere(other, disk, 3)


def test_clients_outlive_supervisor_and_front_end_killed_one_after_the_other(export: Export, disk: bytes) -> None:
    with serving(export) as wire:
        wire.sendall(command(protocol.READ, 0, 4 << 20))
        assert answered(wire) == 0
        half = exactly(wire, 100_000)
        served_by = front_end(export)
        export.kill_supervisor()
        end(served_by)
        export.start()
        assert half + exactly(wire, (4 << 20) - len(half)) == disk[: 4 << 20]
        reads_anywhere(wire, disk, 4)
        end(front_end(export))
        reads_anywhere(wire, disk, 5)
        export.kill_supervisor()
        reads_anywhere(wire, disk, 6)
        export.start()
        reads_anywhere(wire, disk, 7)


def test_clients_outlive_the_fork_servers_and_the_supervisor(export: Export, disk: bytes) -> None:
    with serving(export) as wire:
        read(wire, 0, 1)
        keepers = export.pids("fork server")
        export.kill_supervisor()
        for pid in keepers:
            end(pid)
        export.start()
        reads_anywhere(wire, disk, 8)


OWN_SOCKETS = 2
"""Of a fork server without clients: its line, and the listening socket that it holds."""


def sockets_of(pid: int) -> set[str]:
    """The sockets that a process has open."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {what for what in found if what.startswith("socket:")}


def hold(keepers: list[int], export: Export, clients: int) -> bool:
    """Whether each of the keepers holds those clients, so many, whom supervisor and front end have, and nobody else."""
    served = sockets_of(export.pid) & sockets_of(front_end(export))  # and the listening socket
    held = [sockets_of(pid) for pid in keepers]
    return len(served) == clients + 1 and all(served <= found and len(found) == OWN_SOCKETS + clients for found in held)


@contextmanager
def client_of_stopped_fork_servers(export: Export) -> Iterator[tuple[socket.socket, list[int]]]:
    """A client, and the fork servers that hold it, which take nothing from now on."""
    wait_for_role(export, "fork server", 2)
    keepers = export.pids("fork server")
    with serving(export) as client:
        wait_until(lambda: hold(keepers, export, 1), "both hold the client", 60)
        for pid in keepers:
            os.kill(pid, signal.SIGSTOP)
        yield client, keepers


def test_a_burst_of_clients_while_the_fork_servers_take_nothing_costs_nobody_anything(
    export: Export, disk: bytes
) -> None:
    """They are not killed for it, and when they go on they hold who is there and nobody else."""
    with client_of_stopped_fork_servers(export) as (first, keepers):
        for _ in range(160):
            with serving(export):
                pass
        with serving(export) as last:
            assert export.pids("fork server") == keepers
            for pid in keepers:
                os.kill(pid, signal.SIGCONT)
            wait_until(lambda: hold(keepers, export, 2), "both hold both", 60)
            served_by = front_end(export)
            export.kill_supervisor()
            end(served_by)
            assert [pid for pid in keepers if is_running(pid)] == keepers
            export.start()
            reads_anywhere(first, disk, 11)
            reads_anywhere(last, disk, 12)


def test_a_client_whom_only_fork_servers_are_to_hold_that_are_stopped_outlives_all_others(
    export: Export, disk: bytes
) -> None:
    """It lies in their lines."""
    with client_of_stopped_fork_servers(export) as (first, keepers), serving(export) as last:
        served_by = front_end(export)
        export.get("/api/v1/daemon")  # so it has told them: it gives a client to the front end first
        export.kill_supervisor()
        end(served_by)
        assert [pid for pid in keepers if is_running(pid)] == keepers
        export.start()
        reads_anywhere(first, disk, 13)
        reads_anywhere(last, disk, 14)


def test_clients_outlive_all_but_a_fork_server_that_was_stopped_while_it_loaded(export: Export, disk: bytes) -> None:
    wait_for_role(export, "fork server", 2)
    with serving(export) as wire:
        before = export.pids("fork server")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: bool(set(export.pids("fork server")) - set(before)), "another fork server", 60)
        (another,) = set(export.pids("fork server")) - set(before)
        os.kill(another, signal.SIGSTOP)
        served_by = front_end(export)
        export.get("/api/v1/daemon")  # so all that it is to hold lies in its line
        export.kill_supervisor()
        end(served_by)
        export.start()
        reads_anywhere(wire, disk, 15)


def test_the_next_supervisor_may_be_killed_at_any_step(export: Export, disk: bytes, plan: Plan) -> None:
    with serving(export) as wire:
        export.kill_supervisor()
        for point in POINTS:
            plan.begin(point, 1)
            export.launch()
            wait_until(export.has_ended, f"the supervisor to reach {point}", 60)
            assert plan.end()[0]
        export.start()
        reads_anywhere(wire, disk, 9)


def test_the_former_holders_go_on_until_a_fork_server_of_the_next_one_has_the_clients(
    export: Export, disk: bytes
) -> None:
    """The next one may be killed, or told to end, before that has taken them from its line, and it, too."""
    with serving(export) as wire:
        former = [front_end(export), *export.pids("fork server")]
        export.kill_supervisor()

        def loading() -> list[int]:
            return [pid for pid in descendants(export.pid) if re.search("nydusd.forkserver|fork server", cmdline(pid))]

        for times, (number, status) in enumerate(((signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)), 1):
            export.launch()
            wait_until(lambda: bool(loading()), "its fork server", 60)
            (server,) = loading()
            os.kill(server, signal.SIGSTOP)
            wait_until(lambda times=times: export.log.read_text().count(WAITS) == times, "the supervisor to wait", 60)  # type: ignore[misc]
            assert [pid for pid in former if is_running(pid)] == former
            reads_anywhere(wire, disk, 13)
            assert export._process is not None
            export._process.send_signal(number)
            assert export._process.wait(60) == status
            end(server)
        export.start()
        reads_anywhere(wire, disk, 14)
    assert not any(is_running(pid) for pid in former)


def test_nbdcopy_of_what_is_not_cached_notices_nothing(built: Built, disk: bytes, plan: Plan, tmp_path: Path) -> None:
    """A client that gives up at the first failure."""
    with export_of(built, tmp_path / "cache", plan) as export:
        target = tmp_path / "copy"
        uri = f"nbd+unix:///?socket={export.socket}"
        with subprocess.Popen(
            ["nbdcopy", "--request-size=4096", "--requests=2", uri, str(target)], stderr=subprocess.PIPE, text=True
        ) as client:
            wait_until(lambda: target.exists() and target.stat().st_blocks > 200, "some of the copy", 60)
            export.kill_supervisor()
            export.start()
            end(front_end(export))
            export.kill_supervisor()
            for pid in export.pids("nbd"):
                end(pid)
            export.start()
            assert client.stderr is not None
            assert client.wait(120) == 0, client.stderr.read()
        assert target.read_bytes() == disk


def test_with_other_parameters_clients_are_disconnected_and_new_ones_served(export: Export, disk: bytes) -> None:
    with serving(export) as wire:
        export.kill_supervisor()
        config = export.folder / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"digest_validate": True}))
        export.start()
        assert is_closed(wire)
    with serving(export) as wire:
        reads_anywhere(wire, disk, 10)


def test_a_front_end_without_a_supervisor_ends_with_its_last_client(export: Export) -> None:
    with serving(export) as wire:
        assert read(wire, 0, 1)[0] == 0
        served_by = front_end(export)
        export.kill_supervisor()
        assert is_running(served_by)
    wait_until(lambda: not is_running(served_by), "its end", 60)
    export.start()


def test_a_stop_after_a_takeover_disconnects_everybody_and_leaves_nothing(export: Export) -> None:
    with serving(export) as wire:
        export.kill_supervisor()
        export.start()
        assert read(wire, 0, 512)[0] == 0
        export.stop(signal.SIGTERM)
        assert is_closed(wire)
        assert not export.socket.exists()

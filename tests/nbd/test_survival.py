"""The front end of a block export is killed, at any moment: no client is disconnected, and none gets a wrong byte."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.image import Built
from nydusd.frontends.nbd import protocol
from tests.killing.plan import Plan, all_points
from tests.nbd.test_export import Export, answered, command, exactly, is_closed, read, serving
from tests.support.daemon import image_config
from tests.support.discipline import is_running, wait_until
from tests.support.oracle import Image

IN_A_WRITE = "nbd: bytes of a write taken"
POINTS = sorted(name for name in all_points() if name.startswith("nbd: ") and name != IN_A_WRITE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all daemons here: each has few kills, for one whose front end dies again and again waits before it starts another."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def export(built: Built, plan: Plan, cache: Path) -> Iterator[Export]:
    what = Image("built", built.bootstrap, built.blob.parent, built.bootstrap, built.bootstrap)
    with Export(what, config=image_config(what.blobs, cache), environment=plan.environment) as made:
        yield made


@pytest.fixture
def disk(export: Export, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What is exported, read in peace. The kernel mounts such a copy in test_export.py."""
    return export.copy(tmp_path_factory.mktemp("disk") / "disk").read_bytes()


def front_end(export: Export) -> int:
    found: list[int] = []

    def is_there() -> bool:
        found[:] = export.pids("nbd")
        return len(found) == 1

    wait_until(is_there, "a front end", 60)
    return found[0]


def read_all_at_once(export: Export, disk: bytes) -> None:
    """Many reads under way at once, small ones and such as neither socket nor pipe can take; then everything else."""
    with export.connect() as wire:
        wire.settimeout(60)
        assert exactly(wire, 18) == protocol.GREETING
        wire.sendall(b"\0\0\0\3")
        wire.sendall(protocol.OPTION.pack(b"IHAVEOPT", 8, 0))
        exactly(wire, 20)
        wire.sendall(protocol.OPTION.pack(b"IHAVEOPT", 1, 0))
        exactly(wire, 10)
        choose = random.Random(7)
        asked = {}
        for cookie, length in enumerate((10, 4096, 3 << 20, 50_000, 1 << 20, 1, 2 << 20)):
            offset = choose.randrange(len(disk) - length)
            asked[cookie] = offset, length
            wire.sendall(command(protocol.READ, offset, length, cookie))
        while asked:
            magic, code, cookie = protocol.REPLY.unpack(exactly(wire, 16))
            assert (magic, code) == (0x67446698, 0)
            offset, length = asked.pop(cookie)
            assert exactly(wire, length) == disk[offset : offset + length]
        wire.sendall(command(protocol.WRITE, 0, 5000) + bytes(5000))
        assert answered(wire) == 1
        wire.sendall(command(protocol.FLUSH))
        assert answered(wire) == 0
        wire.sendall(command(protocol.DISC))
        assert is_closed(wire)


@pytest.mark.parametrize("points", [POINTS[::2], POINTS[1::2]])
def test_a_client_survives_a_kill_at_each_point(points: list[str], export: Export, disk: bytes, plan: Plan) -> None:
    for point in points:
        plan.begin(point, 2 if point == "nbd: piece sent" else 1)
        read_all_at_once(export, disk)
        wait_until(plan.killed, f"the front end to reach {point}", 60)
        plan.end()
        front_end(export)


def test_a_client_that_writes_to_what_is_read_only_is_disconnected_where_its_next_command_begins_nobody_knows(
    export: Export, disk: bytes, plan: Plan
) -> None:
    """It would wait for ever if the successor took its commands for the rest of what it writes."""
    plan.begin(IN_A_WRITE, 1)
    with serving(export) as wire:
        wire.sendall(command(protocol.WRITE, 0, 200_000))
        assert answered(wire) == 1
        with contextlib.suppress(OSError):
            wire.sendall(bytes(200_000) + command(protocol.READ, 0, 512))
        assert is_closed(wire)
    assert plan.killed()
    plan.end()
    with serving(export) as wire:
        assert read(wire, 0, 512) == (0, disk[:512])


def test_what_came_with_a_write_is_counted_once_though_the_front_end_is_killed_as_it_ends_it(
    export: Export, disk: bytes, plan: Plan
) -> None:
    """All of it was thrown away: what comes next are commands, also in the place that the first one had."""
    with serving(export) as wire:
        wire.settimeout(60)
        for _ in range(2):
            plan.begin("nbd: slot free, still noted", 1)
            wire.sendall(command(protocol.WRITE, 0, 5000) + bytes(5000))
            assert answered(wire) == 1
            wait_until(plan.killed, "the front end to be killed", 60)
            plan.end()
        assert read(wire, 12_345, 6789) == (0, disk[12_345 : 12_345 + 6789])


def test_a_client_that_has_half_of_a_reply_gets_the_other_half(export: Export, disk: bytes) -> None:
    victim = front_end(export)
    with serving(export) as wire:
        wire.sendall(command(protocol.READ, 0, 4 << 20))
        assert answered(wire) == 0
        half = exactly(wire, 100_000)
        export.kill(victim)
        wait_until(lambda: not is_running(victim), "the front end's end", 60)
        assert half + exactly(wire, (4 << 20) - len(half)) == disk[: 4 << 20]
        assert read(wire, 12_345, 6789)[1] == disk[12_345 : 12_345 + 6789]


def test_a_client_that_connects_while_there_is_no_front_end_is_served(export: Export, disk: bytes) -> None:
    export.kill(front_end(export))
    with serving(export) as wire:
        assert read(wire, 0, 4096) == (0, disk[:4096])


def test_a_half_message_is_taken_up_by_the_successor(export: Export, disk: bytes) -> None:
    victim = front_end(export)
    with serving(export) as wire:
        message = command(protocol.READ, 4096, 4096)
        wire.sendall(message[:11])
        export.kill(victim)
        wait_until(lambda: front_end(export) != victim, "a successor", 60)
        wire.sendall(message[11:])
        assert answered(wire) == 0
        assert exactly(wire, 4096) == disk[4096:8192]


def test_nbdcopy_notices_nothing_of_kills(export: Export, disk: bytes, tmp_path: Path) -> None:
    """A client that gives up at the first failure."""
    choose = random.Random(3)
    target = tmp_path / "copy"
    uri = f"nbd+unix:///?socket={export.socket}"
    pause = threading.Event()
    with subprocess.Popen(
        ["nbdcopy", "--request-size=4096", "--requests=2", uri, str(target)], stderr=subprocess.PIPE, text=True
    ) as client:
        for _ in range(4):
            pause.wait(choose.random() * 0.1)
            if client.poll() is None:
                export.kill(front_end(export))
        assert client.stderr is not None
        assert client.wait(60) == 0, client.stderr.read()
    assert target.read_bytes() == disk


def test_a_stop_disconnects_those_who_are_there(built: Built) -> None:
    what = Image("built", built.bootstrap, built.blob.parent, built.bootstrap, built.bootstrap)
    with Export(what) as export, serving(export) as wire:
        assert read(wire, 0, 512)[0] == 0
        export.stop(signal.SIGTERM)
        assert is_closed(wire)

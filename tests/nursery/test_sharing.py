"""Daemons of one node share its workers: how many there are, what an operator sees, and what kills cost. Real daemons."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event

import pytest

from tests.supervisor.lives import IMAGE, config_for, read_direct
from tests.support import oracle
from tests.support.discipline import cmdline, descendants, discipline, is_running, wait_until
from tests.support.nursery import Another, is_ready, nurseries, seats_kept

SEATS = {"fetch": 1, "decompress": 2}
DAEMONS = 3
FILES = 15
PATIENCE = 60.0


class Node:
    """Three daemons, of which the last comes from the nursery that the second has started. Much of what is read is a miss."""

    def __init__(self, stack: ExitStack, runtime: Path, caches: Path) -> None:
        tuning = {"worker_idle": 1, "front_ends": 1, "decompress_workers": 2, "arena_size": 1 << 20}
        tuning |= {f"node_{role}_workers": count for role, count in SEATS.items()}
        self.runtime = runtime
        self.daemons: list[Another] = []
        for number in range(DAEMONS):
            config = config_for(IMAGE, caches / str(number), nydusd=tuning)
            device = config["device"]
            assert isinstance(device, dict)
            config["device"] = device | {"cache": {"type": "dummycache"}}
            self.daemons.append(stack.enter_context(Another(runtime, config=config)))
            if number == 1:
                wait_until(lambda: is_ready(runtime), "a nursery", PATIENCE)

    def seats(self, daemon: Another) -> dict[str, object]:
        answer = daemon.get("/api/v1/nydusd/workers")
        assert isinstance(answer, dict)
        found = answer["seats"]
        assert isinstance(found, dict)
        return found

    def wait_for_rest(self) -> None:
        """All share, and no worker is there."""
        wait_until(self.shares, "all at one nursery", PATIENCE)
        wait_until(lambda: not any(map(workers, SEATS)), "workers at rest", PATIENCE)

    def shares(self) -> bool:
        nodes = [self.seats(daemon)["node"] for daemon in self.daemons]
        return all(isinstance(node, dict) and node["daemons"] == DAEMONS for node in nodes)

    @contextmanager
    def readers(self) -> Iterator[list[Reader]]:
        """Somebody reads each image all the time; AssertionError at the end unless every byte was right."""
        stop = Event()
        readers = [Reader(daemon, stop) for daemon in self.daemons]
        with ThreadPoolExecutor(DAEMONS) as threads:
            running = [threads.submit(reader.run) for reader in readers]
            try:
                yield readers
            finally:
                stop.set()
        assert [thread.result() for thread in running] == [[]] * DAEMONS


class Reader:
    """Reads all files of a daemon's image, again and again."""

    def __init__(self, daemon: Another, stop: Event) -> None:
        self.daemon = daemon
        self.files = 0
        self._stop = stop

    def run(self) -> list[bytes]:
        """What was wrong."""
        found = []
        while not self._stop.is_set():
            for path, content in oracle.truth(IMAGE.name).items():
                if read_direct(self.daemon.mountpoint / os.fsdecode(path)) != content:
                    found.append(path)
                self.files += 1
                if self._stop.is_set():
                    break
        return found


def wait_for_reads(readers: Iterable[Reader], files: int = 5) -> None:
    """Until each of them has read some more."""
    before = {reader: reader.files for reader in readers}
    wait_until(lambda: all(reader.files >= count + files for reader, count in before.items()), "reads", PATIENCE)


def workers(role: str) -> list[int]:
    """The workers of a role, of whichever daemon."""
    return [pid for pid in descendants(os.getpid()) if cmdline(pid).startswith(f"nydusd: {role}") and is_running(pid)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    runtime = discipline.folder / "node"
    with ExitStack() as stack:
        node = Node(stack, runtime, tmp_path)
        assert [daemon.is_copy() for daemon in node.daemons] == [False, False, True]
        yield node
    assert list(runtime.iterdir()) == []
    wait_until(lambda: not nurseries() and not seats_kept(), "the end of the nursery", PATIENCE)


def test_those_that_read_at_once_share_so_many_workers_and_whoever_is_killed_or_stopped_costs_no_read(
    node: Node,
) -> None:
    node.wait_for_rest()
    there_are_no_more_workers_than_seats_and_an_operator_sees_who_has_them(node)
    node.wait_for_rest()
    who_is_killed_or_stopped_costs_no_read_of_others_and_none_of_its_own_in_the_end(node)
    node.wait_for_rest()


def there_are_no_more_workers_than_seats_and_an_operator_sees_who_has_them(node: Node) -> None:
    assert "node: decompress: 0 of 2 seats taken, 0 daemons wait" in node.daemons[0].ctl("workers")
    most, shown = dict.fromkeys(SEATS, 0), 0
    with node.readers() as readers:
        while min(reader.files for reader in readers) < FILES:
            for role in SEATS:
                most[role] = max(most[role], len(workers(role)))
            told = node.seats(node.daemons[1])["node"]
            assert isinstance(told, dict)
            assert {row["pid"] for row in told["active"]} <= {daemon.supervisor for daemon in node.daemons}
            assert sum(row["decompress"]["have"] for row in told["active"]) == told["roles"]["decompress"]["taken"]
            shown = max(shown, told["roles"]["decompress"]["taken"])
    assert most["decompress"] == shown == SEATS["decompress"]
    assert most["fetch"] <= SEATS["fetch"]
    page = node.daemons[0].request("GET", "/api/v1/metrics/prometheus")[1].decode()
    assert 'nydusd_node_workers{pool="decompress",state="seats"} 2' in page
    assert 'nydusd_seat_waits_total{pool="decompress"}' in page


def who_is_killed_or_stopped_costs_no_read_of_others_and_none_of_its_own_in_the_end(node: Node) -> None:
    victim = node.daemons[-1]
    with node.readers() as readers:
        others = [reader for reader in readers if reader.daemon is not victim]
        wait_until(lambda: bool(workers("decompress")), "a worker", PATIENCE)
        for pid in workers("decompress"):
            with suppress(ProcessLookupError):  # it has ended by itself, for another daemon waits for its seat
                os.kill(pid, signal.SIGKILL)
        wait_for_reads(readers)

        for victims in (seats_kept(), nurseries()):
            os.kill(victims[0], signal.SIGKILL)
            wait_for_reads(readers)
            wait_until(lambda: bool(seats_kept()) and node.shares(), "another one", PATIENCE)
            wait_for_reads(readers)

        (keeper,) = seats_kept()
        os.kill(keeper, signal.SIGSTOP)
        wait_for_reads(readers)
        os.kill(keeper, signal.SIGCONT)
        wait_until(node.shares, "all at one nursery", PATIENCE)

        supervisor = victim.supervisor
        os.kill(supervisor, signal.SIGSTOP)
        wait_for_reads(others)
        os.kill(supervisor, signal.SIGCONT)
        wait_for_reads(readers)

        os.kill(supervisor, signal.SIGKILL)
        assert victim.status() == -signal.SIGKILL
        wait_for_reads(others)
        victim.start()
        wait_for_reads(readers)

"""The table that the workers share: one process at a time changes it, and none is stopped by a dead one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.storage.backend.http.breaker import Breaker, Policy
from nydusd.storage.backend.http.store import KEEP, Entry, SharedStore


@pytest.fixture
def store() -> Iterator[SharedStore]:
    store = SharedStore()
    yield store
    store.close()


def run(code: str, store: SharedStore, **options: object) -> subprocess.Popen[str]:
    """A process with the same table as `store` in its code."""
    head = "import os, sys, time\nfrom nydusd.storage.backend.http.store import SharedStore\nstore = SharedStore({})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head.format(store.fileno()) + code],
        pass_fds=[store.fileno()],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def test_entries_are_seen_by_all_who_share_the_table(store: SharedStore) -> None:
    other = SharedStore(store.fileno())
    store.put("a", {"x": 1})
    assert other.get("a") == {"x": 1}
    other.drop("a")
    assert store.get("a") is None
    other.close()


def test_entries_end(store: SharedStore) -> None:
    store.put("gone", {"x": 1}, 0.0)
    store.put("there", {"x": 1}, 1000.0)
    assert store.get("gone") is None and store.get("there") == {"x": 1}
    store.update("there", lambda entry: ({"x": 2}, KEEP, None))
    assert store.get("there") == {"x": 2}
    store.update("there", lambda entry: (entry, 0.0, None))
    assert store.get("there") is None


def test_no_change_is_lost_between_processes(store: SharedStore) -> None:
    code = """
def more(entry):
    return {"n": (entry or {"n": 0})["n"] + 1}, None, None
for _ in range(200):
    store.update("n", more)
"""
    processes = [run(code, store) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=30)
        assert process.returncode == 0
    assert store.get("n") == {"n": 800}


def test_the_lock_of_a_key_is_held_by_one_process_and_freed_by_its_death(store: SharedStore) -> None:
    code = "with store.lock('k', time.monotonic() + 9) as got:\n print(got, flush=True)\n time.sleep(60)\n"
    process = run(code, store)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "True\n"
    with store.lock("k", 0.0) as got:
        assert not got
    with store.lock("other", 0.0) as got:
        assert got
    process.send_signal(signal.SIGKILL)
    with store.lock("k", time.monotonic() + 10) as got:
        assert got
    process.communicate()


def test_a_stopped_holder_of_the_table_delays_but_does_not_block(store: SharedStore) -> None:
    store.put("a", {"x": 1})
    process = run("with store._locked():\n print('in', flush=True)\n time.sleep(60)\n", store)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    assert store.get("a") == {"x": 1}
    process.kill()
    process.communicate()


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 20])
def test_a_torn_table_is_empty_and_usable(store: SharedStore, cut: int) -> None:
    store.put("a", {"x": "y" * 50})
    os.ftruncate(store.fileno(), cut)
    assert store.get("a") is None
    store.put("b", {"x": 1})
    assert store.get("b") == {"x": 1}


@given(st.binary(max_size=200), st.integers(0, 100))
def test_any_bytes_in_the_table_are_survived(garbage: bytes, place: int) -> None:
    store = SharedStore()
    store.put("a", {"x": 1, "y": "z"})
    os.pwrite(store.fileno(), garbage, place)
    assert store.get("a") in (None, {"x": 1, "y": "z"})
    store.put("b", {"x": 1})
    assert store.get("b") == {"x": 1}
    store.close()


def test_a_flood_of_entries_drops_those_that_end_first(store: SharedStore) -> None:
    for number in range(1200):
        store.put(f"k{number}", {"x": number}, 1000.0 + number)
    assert store.get("k1199") == {"x": 1199} and store.get("k0") is None
    store.put("huge", {"x": "y" * (2 << 20)}, 1.0)
    store.put("b", {"x": 1})
    assert store.get("b") == {"x": 1}
    assert os.fstat(store.fileno()).st_size < 2 << 20


def test_the_table_is_on_no_disk(store: SharedStore) -> None:
    assert os.readlink(f"/proc/self/fd/{store.fileno()}").startswith("/memfd:")
    assert not os.get_inheritable(store.fileno())


def test_a_breaker_admits_one_after_its_pause(store: SharedStore) -> None:
    policy = Policy(limit=3, pause=0.0, longest=0.0, trial=50.0)
    one, two = Breaker(store, "host", policy), Breaker(store, "host", policy)
    for _ in range(3):
        assert one.admit() == 0.0
        one.failed("it does")
    assert one.is_open() and two.is_open()
    assert one.admit() == 0.0, "the pause is over at once"
    assert two.admit() > 0.0, "but somebody is trying"
    one.succeeded()
    assert two.admit() == 0.0 and not two.is_open()


def test_a_trial_whose_process_died_is_followed_by_another(store: SharedStore) -> None:
    policy = Policy(limit=1, pause=0.0, longest=0.0, trial=0.0)
    breaker = Breaker(store, "host", policy)
    breaker.failed("it does")
    assert breaker.admit() == 0.0
    assert breaker.admit() == 0.0


def test_failures_while_it_is_open_do_not_lengthen_the_pause(store: SharedStore) -> None:
    breaker = Breaker(store, "host", Policy(limit=1, pause=50.0, longest=500.0))
    for _ in range(5):
        breaker.failed("it does")
    assert breaker.admit() <= 50.0 * 1.25


def test_a_host_that_asks_for_rest_gets_it_from_all(store: SharedStore) -> None:
    one, two = Breaker(store, "host", Policy()), Breaker(store, "host", Policy())
    one.hold_off(100.0)
    two.hold_off(10.0)
    assert 90 < two.hold() <= 100
    one.succeeded()
    assert two.hold() > 90, "an answer does not end it"
    entry: Entry = {"hold": "nonsense"}
    store.put("breaker:host", entry)
    assert two.hold() == 0.0

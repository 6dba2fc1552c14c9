"""Watch: who has a job and shows no sign of life is found, whatever it hangs in; who works or waits for work is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nydusd.supervisor.watch import Watch
from tests.supervisor.lives import IMAGE, ROOT, config_for, wrong
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import wait_until

BEATS = "import time\nwhile True: time.sleep(0.001)"
SPINS = "while True: pass"
SLEEPS = "import signal\nsignal.pause()"
COMPUTES = """
import time
from nydusd import points

def reach(name):
    if name == "prepare: map judged":
        begin = time.process_time()
        while time.process_time() - begin < 1.6:
            pass

vars(points)["reach"] = reach
"""
"""`sitecustomize.py` of a daemon whose blobs have so many chunks that it takes long to prepare them."""


class Process:
    """A process that is doing something for ever."""

    def __init__(self, code: str) -> None:
        code = f"print(flush=True)\n{code}"
        self._process = subprocess.Popen([sys.executable, "-ISc", code], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.pid = self._process.pid
        if code.endswith("pause()"):
            wait_until(lambda: "pause" in Path(f"/proc/{self.pid}/wchan").read_text(), "sleep for ever")

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def process() -> Iterator[Callable[[str], int]]:
    made: list[Process] = []

    def make(code: str) -> int:
        made.append(Process(code))
        return made[-1].pid

    yield make
    for one in made:
        one.end()


def looks(watch: Watch, busy: dict[int, int], count: int, start: float = 100.0) -> list[list[int]]:
    """What a watch of 4 s, which looks each second, finds."""
    return [watch.hung(busy, start + number) for number in range(count)]


@pytest.mark.parametrize("code", [SPINS, SLEEPS])
def test_a_process_that_never_sleeps_or_never_wakes_is_hung(process: Callable[[str], int], code: str) -> None:
    pid = process(code)
    found = looks(Watch(4.0), {pid: 1}, 7)
    assert found[:4] == [[], [], [], []]
    assert found[-1] == [pid]


def test_a_process_that_waits_and_wakes_is_not(process: Callable[[str], int]) -> None:
    pid = process(BEATS)
    watch, busy, before = Watch(4.0), {pid: 1}, ""

    def switches() -> str:
        with open(f"/proc/{pid}/status") as status:
            return next(line for line in status if line.startswith("voluntary"))

    for now in range(8):
        while switches() == before:
            pass
        before = switches()
        assert watch.hung(busy, 100.0 + now) == []


def test_who_may_compute_for_long_may_do_so_but_not_for_ever(process: Callable[[str], int]) -> None:
    pid = process(SPINS)
    watch = Watch(4.0)
    assert [watch.hung({pid: 1}, 100.0 + now, {pid}) for now in range(50)] == [[]] * 48 + [[pid]] * 2


@pytest.mark.parametrize("code", [SPINS, SLEEPS])
def test_who_may_compute_for_long_and_does_nothing_is_hung(process: Callable[[str], int], code: str) -> None:
    pid = process(code)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: ") T " in Path(f"/proc/{pid}/stat").read_text(), "stop", 60)
    watch = Watch(4.0)
    assert [watch.hung({pid: 1}, 100.0 + now, {pid}) for now in range(6)] == [[]] * 4 + [[pid]] * 2


def test_a_new_job_is_a_sign_of_life_and_so_is_none(process: Callable[[str], int]) -> None:
    pid = process(SLEEPS)
    watch = Watch(4.0)
    for now in range(8):
        assert watch.hung({pid: now // 2}, 100.0 + now) == []
    for now in range(8, 16):
        assert watch.hung({}, 100.0 + now) == []
    assert watch.hung({pid: 99}, 116.0) == []


def test_one_that_starts_and_is_only_slow_is_not(process: Callable[[str], int]) -> None:
    pid = process(SPINS)  # whoever computes is interrupted at times
    watch, before = Watch(4.0), ""

    def switches() -> str:
        with open(f"/proc/{pid}/status") as status:
            return next(line for line in status if line.startswith("nonvoluntary"))

    rival = process(SPINS)
    for number in (pid, rival):
        os.sched_setaffinity(number, {min(os.sched_getaffinity(0))})
    for now in range(6):
        while switches() == before:
            pass
        before = switches()
        assert watch.hung({pid: 0}, 100.0 + now) == []


def test_one_that_is_stopped_while_it_starts_is_hung(process: Callable[[str], int]) -> None:
    pid = process(SLEEPS)
    assert looks(Watch(4.0), {pid: 0}, 7)[-1] == [pid]


def test_time_in_which_nobody_looked_does_not_count(process: Callable[[str], int]) -> None:
    pid = process(SLEEPS)
    watch = Watch(4.0)
    looks(watch, {pid: 1}, 3)
    assert watch.hung({pid: 1}, 1000.0) == []
    assert looks(watch, {pid: 1}, 3, 1001.0) == [[], [], []]
    assert watch.hung({pid: 1}, 1004.0) == [pid]


def test_a_process_that_is_gone_is_no_error() -> None:
    assert looks(Watch(4.0), {1 << 22: 1}, 3) == [[], [], []]


def test_workers_that_are_stopped_are_replaced_and_their_jobs_done(tmp_path: Path) -> None:
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_patience": 1})
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config) as daemon:
        wait_for_role(daemon, "decompress", 2)
        stopped = daemon.pids("decompress")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert wrong(daemon) == []
        # One that has no job is left alone: that it is stopped is not known.
        assert len(set(stopped) - set(daemon.pids("decompress"))) >= 1
        for pid in set(stopped) & set(daemon.pids("decompress")):
            os.kill(pid, signal.SIGCONT)


def test_worker_that_computes_for_longer_than_its_patience_is_not_killed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(COMPUTES)
    config = config_for(IMAGE, tmp_path / "cache", nydusd={"worker_patience": 1})
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Daemon(IMAGE.bootstrap, IMAGE.blobs, config=config, environment=environment) as daemon:
        assert wrong(daemon) == []
        assert "job prepare" not in daemon.log.read_text(), "it has lost a worker"

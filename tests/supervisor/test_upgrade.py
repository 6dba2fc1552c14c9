"""`nydusctl workers upgrade` and `scale`: new code takes over while readers compare every byte, or nothing changes.

The daemon runs from a copy of the code, so that what is on disk can be changed under it.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.image import Built, build
from nydusd.codec.compress import decompress
from nydusd.codec.digest import digest
from nydusd.formats.model import Compressor, Digester
from nydusd.ipc.messages import PROTOCOL
from nydusd.supervisor import trial
from tests.support.daemon import Daemon, image_config, wait_for_role
from tests.support.discipline import is_running, wait_until
from tests.support.trees import half_random_tree
from tests.support.verifying import Verifying

ROOT = Path(__file__).resolve().parents[2]
FILES, FILE_SIZE, CHUNK = 8, 1 << 20, 1 << 16
READERS = 2
SECONDS = 60.0
UPGRADE = "/api/v1/nydusd/workers/upgrade"
Row = dict[str, object]
ExpectLog = Callable[..., None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_random_tree(tmp_path_factory.mktemp("tree"), FILES, FILE_SIZE, CHUNK)


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tree, tmp_path_factory.mktemp("image"), CHUNK)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the code, which is what a daemon of `running` and all that it starts run."""
    folder = tmp_path / "code"
    for package in ("nydusd", "workers"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@contextmanager
def running(built: Built, code: Path, cached: bool = True) -> Iterator[Daemon]:
    environment = {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as cache:
        config = image_config(built.blob.parent, Path(cache)) | {"nydusd": {"front_ends": 2, "worker_idle": 0}}
        if not cached:
            device = config["device"]
            assert isinstance(device, dict)
            device["cache"]["type"] = ""
        daemon = Daemon(built.bootstrap, built.blob.parent, config=config, environment=environment)
        daemon.command.insert(1, "-P")
        with daemon:
            yield daemon


@contextmanager
def verified(daemon: Daemon, tree: Path, tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Readers compare every byte meanwhile. Gives a function that waits until each has gone on."""
    with Verifying(daemon.mountpoint, tree, tmp_path, READERS) as readers:
        readers.go_on()
        yield readers.go_on


def rows(daemon: Daemon) -> list[Row]:
    answer = daemon.get("/api/v1/nydusd/workers")
    assert isinstance(answer, dict)
    return list(answer["processes"])


def workers(daemon: Daemon) -> list[Row]:
    return [row for row in rows(daemon) if row["role"] in ("fetch", "decompress")]


def pids(daemon: Daemon) -> set[object]:
    return {row["pid"] for row in workers(daemon)}


def fork_servers(daemon: Daemon) -> set[int]:
    return set(daemon.pids("fork server"))


def has_fork_servers(daemon: Daemon, wanted: set[int]) -> bool:
    return fork_servers(daemon) == wanted


def settled(daemon: Daemon) -> bool:
    return all(row["state"] in ("idle", "busy") for row in workers(daemon))


def change(code: Path, name: str, old: str, new: str) -> None:
    """Put other code on the disk, in the place of `old`."""
    path = code / name
    text = path.read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def upgrade(daemon: Daemon) -> tuple[int, str]:
    """Status and text of the answer."""
    status, body = daemon.request("PUT", UPGRADE, seconds=150.0)
    return status, body.decode()


class TestUpgrade:
    def test_gives_the_jobs_to_new_code_and_no_reader_sees_it(
        self, built: Built, tree: Path, code: Path, tmp_path: Path
    ) -> None:
        with running(built, code) as daemon:
            before, servers, (older,) = pids(daemon), fork_servers(daemon), {row["commit"] for row in rows(daemon)}
            change(code, "workers/fill.py", "\ndef fill(", "\n# Newer.\ndef fill(")
            with verified(daemon, tree, tmp_path) as go_on:
                for number in range(2):
                    told = daemon.ctl("workers", "upgrade")
                    go_on()
                    assert re.search(r"of build python-\w{12} now; tried: chunk .* is the same", told), told
                    assert number or f"3 workers of build {older}" in told
            assert not before & pids(daemon)
            assert {row["generation"] for row in workers(daemon)} == {3}
            (newer,) = {row["commit"] for row in workers(daemon)}
            assert newer != older
            wait_until(lambda: len(fork_servers(daemon)) == 2, "the new fork server and its copy", SECONDS)
            assert not fork_servers(daemon) & servers
            assert not [pid for pid in before if isinstance(pid, int) and is_running(pid)]

    def test_goes_well_without_a_blob_to_try(self) -> None:
        with Daemon(None, Path("/nonexistent")) as daemon:
            status, told = upgrade(daemon)
            assert status == 200, told
            assert "no blob of an image is open" in told

    def test_the_new_fork_server_holds_the_session_when_all_others_are_killed(
        self, built: Built, tree: Path, code: Path
    ) -> None:
        with running(built, code) as daemon:
            former = fork_servers(daemon)
            assert upgrade(daemon)[0] == 200
            servers = fork_servers(daemon)
            assert servers and not servers & former
            front_ends = daemon.pids("fuse")
            daemon.kill_supervisor()
            for pid in front_ends:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not any(map(is_running, front_ends)), "the end of the front ends")
            assert any(map(is_running, servers))
            daemon.start()
            assert "still mounted" in daemon.log.read_text()
            assert (daemon.mountpoint / "00").read_bytes() == (tree / "00").read_bytes()

    def test_that_was_begun_twice_is_refused_the_second_time(self, built: Built, code: Path) -> None:
        with running(built, code) as daemon:
            found: list[tuple[int, str]] = []
            ask = [threading.Thread(target=lambda: found.append(upgrade(daemon))) for _ in range(2)]
            for thread in ask:
                thread.start()
            for thread in ask:
                thread.join()
            assert sorted(status for status, _ in found) == [200, 409]
            assert "under way" in next(text for status, text in found if status == 409)


class Broken(NamedTuple):
    """What is put in the place of what, in which file, and what an upgrade to that says."""

    file: str
    old: str
    new: str
    why: str


RETURN, ABORT = "    return 5\n    blobs = OpenBlobs(", "    os.abort()\n    blobs = OpenBlobs("
TITLE, READ = '    set_title("fork', "            reader.read_into(view"
BROKEN = {
    "a syntax error": Broken("workers/fill.py", "\ndef fill(", "\ndef fill fill(", "loading the code .*SyntaxError"),
    "a fork server that ends": Broken("nydusd/forkserver/__main__.py", TITLE, f"    return 7\n{TITLE}", "has ended"),
    "workers that end": Broken("workers/loop.py", "    blobs = OpenBlobs(", RETURN, "ended with status 5"),
    "workers that crash": Broken("workers/loop.py", "    blobs = OpenBlobs(", ABORT, "ended with status -6"),
    "wrong bytes": Broken("workers/fill.py", "len(data))[:] = data", "len(data))[:] = bytes(len(data))", "wrong bytes"),
    "wrong bytes of a backend": Broken(
        "workers/fetch.py", READ, f"            return dict(timed=[])\n{READ}", "wrong bytes"
    ),
    "jobs that fail": Broken(
        "workers/fill.py", "    result = _Result()\n", "    raise OSError(7, 'x')\n", "internal error"
    ),
    "workers that hear of no loss": Broken(
        "nydusd/ipc/messages.py", f"PROTOCOL = {PROTOCOL}", "PROTOCOL = 2", "protocol 2, this daemon"
    ),
}


def test_new_code_that_is_broken_changes_nothing_and_is_named(
    built: Built, tree: Path, code: Path, tmp_path: Path, expect_log: ExpectLog
) -> None:
    expect_log("the workers are not upgraded", "Traceback", "SyntaxError", "failed by a bug of ours")
    with running(built, code) as daemon, verified(daemon, tree, tmp_path) as go_on:
        wait_until(lambda: settled(daemon), "the workers to be there", SECONDS)
        wait_until(lambda: len(fork_servers(daemon)) == 2, "the fork server and its copy", SECONDS)
        before, servers = pids(daemon), fork_servers(daemon)
        for name, (file, old, new, why) in BROKEN.items():
            change(code, file, old, new)
            status, told = upgrade(daemon)
            assert status == 500, f"{name}: {told}"
            assert re.search(why, told), f"{name}: {told}"
            assert pids(daemon) == before, name
            # A child that was about to be made ends by itself.
            wait_until(partial(has_fork_servers, daemon, servers), f"the fork servers of before ({name})", SECONDS)
            go_on()
            change(code, file, new, old)
        assert upgrade(daemon)[0] == 200
        assert not pids(daemon) & before


def on_trial(daemon: Daemon, role: str) -> list[int]:
    return [
        int(str(row["pid"]))
        for row in rows(daemon)
        if row["state"] == "on trial" and row["role"] == role and row["pid"]
    ]


def test_whatever_is_killed_in_its_middle_costs_the_upgrade_at_most(
    built: Built, tree: Path, code: Path, tmp_path: Path
) -> None:
    """New and old workers and fork servers, a front end, the supervisor: no read fails, and the next upgrade goes well."""
    # New workers take their time to say that they are there, as long as a file exists: so there is a middle.
    change(code, "workers/loop.py", "    context = zmq.Context()\n", SLOW)
    slow = code / "slow"
    with running(built, code) as daemon, verified(daemon, tree, tmp_path) as go_on:
        for victim in VICTIMS:
            wait_until(lambda: settled(daemon), "the workers to be there", SECONDS)
            wait_until(lambda: len(fork_servers(daemon)) == 2, "the fork server and its copy", SECONDS)
            before, servers = pids(daemon), fork_servers(daemon)
            slow.touch()
            with in_background(daemon) as answers:
                wait_until(lambda: len(on_trial(daemon, "decompress")) == 2, "new workers", SECONDS)
                family = [pid for pid in daemon.family() if pid not in daemon.pids("fuse")]
                age, _, role = victim.partition(" ")
                if role == "supervisor":
                    daemon.kill_supervisor()
                elif age == "old":
                    os.kill((sorted(servers) if role == "fork server" else daemon.pids(role))[0], signal.SIGKILL)
                else:
                    new = on_trial(daemon, role) or [pid for pid in daemon.pids(role) if pid not in servers]
                    os.kill(new[0], signal.SIGKILL)
                if age == "old":
                    slow.unlink()
            slow.unlink(missing_ok=True)
            ((status, told),) = answers
            if role == "supervisor":
                assert status == 0, told
                daemon.start()
                wait_until(partial(all_ended, family), "the end of all that was there before", SECONDS)
            elif age == "old":
                assert status == 200, f"{victim}: {told}"
                assert not pids(daemon) & before, victim
            else:
                assert status == 500, f"{victim}: {told}"
                assert re.search("ended with status -9|fork server has ended", told), told
                assert pids(daemon) == before, victim
                wait_until(
                    partial(has_fork_servers, daemon, servers), f"the fork servers of before ({victim})", SECONDS
                )
            go_on()
        assert upgrade(daemon)[0] == 200
        go_on()


def all_ended(processes: list[int]) -> bool:
    return not any(map(is_running, processes))


VICTIMS = ("new decompress", "new fork server", "old fetch", "old fork server", "old fuse", "the supervisor")
SLOW = """    context = zmq.Context()
    import time
    while os.path.exists(os.path.join(os.path.dirname(__file__), "..", "slow")) and not supervisor_gone(lifeline):
        time.sleep(0.01)
"""


@contextmanager
def in_background(daemon: Daemon) -> Iterator[list[tuple[int, str]]]:
    """An upgrade is under way meanwhile; its answer is there at the end, status 0 if there was none."""
    found: list[tuple[int, str]] = []

    def ask() -> None:
        try:
            found.append(upgrade(daemon))
        except (OSError, http.client.HTTPException) as e:
            found.append((0, repr(e)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
    finally:
        thread.join()


class TestWorkersThatDie:
    def test_chunk_that_kills_three_is_an_error_for_its_readers_alone(
        self, built: Built, tree: Path, code: Path, expect_log: ExpectLog
    ) -> None:
        expect_log("workers died on it|is given up", "a read failed")
        change(code, "workers/fill.py", "    segment = blob.segment\n    decoder", POISON)
        with running(built, code) as daemon:
            before = pids(daemon)
            for name in ("00", "02", "07"):
                assert (daemon.mountpoint / name).read_bytes() == (tree / name).read_bytes()
            with open(daemon.mountpoint / "01", "rb", buffering=0) as file:
                for number in range(FILE_SIZE // CHUNK):
                    wanted = (tree / "01").read_bytes()[number * CHUNK :][:CHUNK]
                    if number == 4:
                        with pytest.raises(OSError, match="Input/output error"):
                            os.preadv(file.fileno(), [bytearray(CHUNK)], number * CHUNK)
                    elif number > 8 or number < 2:  # the kernel's read-ahead has had the error of those beside it, too
                        assert os.pread(file.fileno(), CHUNK, number * CHUNK) == wanted
            wait_until(lambda: settled(daemon), "workers in all places", SECONDS)
            assert pids(daemon) != before

    def test_chunk_that_kills_in_shared_memory_is_an_error_for_its_readers_alone(
        self, built: Built, tree: Path, code: Path, tmp_path: Path, expect_log: ExpectLog
    ) -> None:
        """Without a cache: one read of it and its neighbours fails, and they are good after that."""
        expect_log("workers died on it|is given up", "a read failed")
        change(code, "workers/fill.py", "    segment = blob.segment\n    decoder", POISON)
        with running(built, code, cached=False) as daemon:
            wanted = (tree / "01").read_bytes()
            fd = os.open(daemon.mountpoint / "01", os.O_RDONLY | os.O_DIRECT)
            try:
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(fd, 4 * CHUNK, 4 * CHUNK)
                for number in (5, 6, 7, 0):
                    assert os.pread(fd, CHUNK, number * CHUNK) == wanted[number * CHUNK :][:CHUNK]
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(fd, CHUNK, 4 * CHUNK)
            finally:
                os.close(fd)
            wait_until(lambda: settled(daemon), "workers in all places", SECONDS)

    def test_that_keep_dying_wait_longer_each_time_and_that_is_shown(
        self, built: Built, tree: Path, code: Path
    ) -> None:
        change(code, "workers/loop.py", "    context = zmq.Context()\n", BROKEN_NOW)
        with running(built, code) as daemon:
            wait_until(lambda: settled(daemon), "the workers to be there", SECONDS)
            (code / "broken").touch()
            for pid in daemon.pids("decompress"):
                os.kill(pid, signal.SIGKILL)

            def waits(row: Row) -> bool:
                deaths, starts_in = row["deaths"], row["starts_in"]
                return isinstance(deaths, int) and deaths > 3 and isinstance(starts_in, float) and starts_in > 0.1

            wait_until(lambda: any(map(waits, workers(daemon))), "a worker that waits for its next start", SECONDS)
            wait_until(lambda: "early deaths" in daemon.ctl("workers"), "one that is shown so", SECONDS)
            (code / "broken").unlink()
            assert (daemon.mountpoint / "00").read_bytes() == (tree / "00").read_bytes()


# Chunk 20 is the fifth of the second file.
POISON = """    if first <= 20 <= last:
        os.abort()
    segment = blob.segment
    decoder"""
BROKEN_NOW = """    context = zmq.Context()
    if os.path.exists(os.path.join(os.path.dirname(__file__), "..", "broken")):
        os.abort()
"""


class TestScale:
    def test_more_and_fewer_workers_under_readers(self, built: Built, tree: Path, code: Path, tmp_path: Path) -> None:
        with running(built, code) as daemon, verified(daemon, tree, tmp_path) as go_on:
            for decompress, fetch in ((5, 2), (1, 3)):
                daemon.ctl("workers", "scale", f"decompress={decompress}", f"fetch={fetch}")
                wait_for_role(daemon, "decompress", decompress, seconds=SECONDS)
                wait_for_role(daemon, "fetch", fetch, seconds=SECONDS)
                wait_until(lambda: settled(daemon), "workers that are ready", SECONDS)
                go_on()
            assert upgrade(daemon)[0] == 200
            assert (len(daemon.pids("decompress")), len(daemon.pids("fetch"))) == (1, 3)
            daemon.kill_supervisor()
            daemon.start()
            wait_for_role(daemon, "decompress", 1, seconds=SECONDS)
            wait_for_role(daemon, "fetch", 3, seconds=SECONDS)
            configured = len(os.sched_getaffinity(0))
            assert daemon.ctl("workers", "scale", "decompress=0") == f"decompress: 1 workers, {configured} wanted\n"
            wait_for_role(daemon, "decompress", configured, seconds=SECONDS)
            go_on()

    def test_what_is_no_number_of_workers_is_refused(self, built: Built) -> None:
        with Daemon(built.bootstrap, built.blob.parent) as daemon:
            wait_until(lambda: settled(daemon), "the workers to be there", SECONDS)
            before = pids(daemon)
            for body, why in REFUSED.items():
                status, told = daemon.request("PUT", "/api/v1/nydusd/workers", body)
                assert status == 400, body
                assert why in told.decode(), body
            assert pids(daemon) == before


REFUSED = {
    b'{"decompress": 129}': "129 is not allowed; it must be 1 to 128, or 0",
    b'{"decompress": -1}': "-1 is not allowed",
    b'{"decompress": true}': "True is not allowed",
    b'{"decompress": 2, "fetch": "3"}': "fetch: '3' is not allowed",
    b'{"fuse": 2}': "role 'fuse' is unknown; there are fetch and decompress",
    b"{}": "say how many of which role",
    b"[]": "must be an object",
}


def test_the_blob_of_the_trial_is_what_it_is_said_to_be() -> None:
    assert decompress(Compressor.ZSTD, trial.STORED, len(trial.PLAIN)) == trial.PLAIN
    assert digest(Digester.BLAKE3, trial.PLAIN) == trial.DIGEST

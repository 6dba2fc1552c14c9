"""A supervisor that takes over many images is ready before it knows them all again. Real daemons, image by image."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from nydusd.errors import ScarceError
from nydusd.supervisor.checked import read_checked, write_checked
from nydusd.supervisor.restore import Restore
from tests.killing.kernel_scenes import Bare
from tests.killing.plan import Plan
from tests.supervisor.lives import IMAGE, ONE_CHUNK, ROOT, crash, read_direct, state_file
from tests.supervisor.systemd import Systemd
from tests.support import oracle
from tests.support.daemon import Daemon, wait_for_role
from tests.support.discipline import wait_until
from tests.support.keeper import Keeper, begin, put

if TYPE_CHECKING:
    from nydusd.supervisor.mount_records import Recorded
    from nydusd.supervisor.mounts import Mounts
    from nydusd.supervisor.router import Router

ExpectLog = Callable[..., None]
POINT = "takeover: one image known"
CONTENT = oracle.truth(IMAGE.name)[ONE_CHUNK.encode()]
SECONDS = 60.0


class Steps:
    """Has a supervisor wait at each image that it knows again, until `take`; from `let_go` on no more."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "steps"
        os.mkfifo(self._path)
        self._fd = os.open(self._path, os.O_RDWR)
        self._pythonpath = f"{Path(__file__).parent / 'stepping'}:{ROOT}"

    def hold(self, daemon: Daemon) -> None:
        """What is started from now on waits."""
        daemon._environment |= {"NYDUSD_TEST_STEPS": f"{POINT}={self._path}", "PYTHONPATH": self._pythonpath}

    def take(self) -> None:
        os.write(self._fd, b"x")

    def let_go(self) -> None:
        os.write(self._fd, bytes(1000))

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    made = Steps(tmp_path)
    yield made
    made.close()


@contextmanager
def many(
    folder: Path,
    count: int,
    kind: type[Daemon] = Daemon,
    *,
    verb: str = "fuse",
    args: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> Iterator[Daemon]:
    """A daemon with so many images of one blob, mounted by the API."""
    with kind(None, IMAGE.blobs, cache=folder / "cache", verb=verb, args=args, environment=environment) as daemon:
        for number in range(count):
            bootstrap = folder / f"bootstrap-{number}"
            shutil.copyfile(IMAGE.bootstrap, bootstrap)
            assert daemon.mount(f"/{number}", bootstrap, IMAGE.blobs) == (204, "")
        yield daemon


def read(daemon: Daemon, number: int) -> bytes:
    return read_direct(daemon.mountpoint / str(number) / ONE_CHUNK)


def mounted(daemon: Daemon) -> set[str]:
    rows = daemon.get("/api/v1/nydusd/mounts", seconds=SECONDS)
    return {row["mountpoint"] for row in rows["images"]}  # type: ignore[index]


class Asking(threading.Thread):
    """Something that is asked for meanwhile."""

    def __init__(self, ask: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self.answer: object = None
        self.start()

    def run(self) -> None:
        self.answer = self._ask()

    def served(self, steps: Steps, most: int) -> None:
        """Go on until it is there. AssertionError when it takes more than so many steps."""
        for _ in range(most):
            if self.is_alive():
                steps.take()
                self.join(2.0)
        assert not self.is_alive(), "it did not come before nearly all images were known"


def test_ready_the_api_and_reads_do_not_wait_for_all_images(tmp_path: Path, steps: Steps, systemd: Systemd) -> None:
    count = 20
    with many(tmp_path, count, environment={"NOTIFY_SOCKET": systemd.path}) as daemon:
        systemd.until("READY")
        crash(daemon)
        steps.hold(daemon)
        daemon.launch()
        text = f"{count} images are mounted at {daemon.mountpoint}; restoring"
        assert systemd.until("READY")["STATUS"] == f"{text} 0 of {count} images"
        wait_for_role(daemon, "api", 1)
        asking = Asking(lambda: daemon.get("/api/v1/daemon", seconds=SECONDS))
        asking.served(steps, count // 3)
        assert isinstance(asking.answer, dict)
        assert asking.answer["state"] == "RUNNING"
        assert sorted(asking.answer["backend_collection"]) == sorted(f"/{number}" for number in range(count))
        assert systemd.until("STATUS")["STATUS"] == f"{text} 1 of {count} images"
        # The first that was mounted is the last in line, unless somebody waits for it.
        reading = Asking(lambda: read(daemon, 0))
        reading.served(steps, count // 3)
        assert reading.answer == CONTENT
        steps.let_go()
        assert mounted(daemon) == {f"/{number}" for number in range(count)}
        assert all(read(daemon, number) == CONTENT for number in range(count))


def test_images_of_the_kernel_are_known_again_behind_ready_too(tmp_path: Path, steps: Steps, systemd: Systemd) -> None:
    count = 12
    args, environment = ("--driver", "fanotify"), {"NOTIFY_SOCKET": systemd.path}
    with many(tmp_path, count, Bare, verb="erofs", args=args, environment=environment) as daemon:
        systemd.until("READY")
        crash(daemon)
        steps.hold(daemon)
        daemon.launch()
        assert systemd.until("READY")["STATUS"].endswith(f"; restoring 0 of {count} images")
        wait_for_role(daemon, "api", 1)
        asking = Asking(lambda: daemon.get("/api/v1/daemon", seconds=SECONDS))
        asking.served(steps, count - 2)
        steps.let_go()
        assert mounted(daemon) == {f"/{number}" for number in range(count)}
        for number in range(count):
            assert (daemon.mountpoint / str(number) / ONE_CHUNK).read_bytes() == CONTENT


def test_sigkill_in_the_middle_loses_no_image(tmp_path: Path) -> None:
    plan, count = Plan(tmp_path / "plan"), 8
    with many(tmp_path, count, environment=plan.environment) as daemon:
        held = [os.open(daemon.mountpoint / str(number), os.O_PATH) for number in range(count)]
        crash(daemon)
        for number in (1, 5):
            plan.begin(POINT, number)
            daemon.launch()
            assert daemon._process is not None
            assert daemon._process.wait(SECONDS) == -signal.SIGKILL
            assert plan.end()[0]
        daemon.start()
        assert mounted(daemon) == {f"/{number}" for number in range(count)}
        for fd in held:
            assert read_direct(Path(f"/proc/self/fd/{fd}", ONE_CHUNK)) == CONTENT
            os.close(fd)


def test_sigterm_in_the_middle_stores_what_is_cached(tmp_path: Path, steps: Steps) -> None:
    with many(tmp_path, 6) as daemon:
        assert read(daemon, 0) == CONTENT
        crash(daemon)
        steps.hold(daemon)
        daemon.launch()
        wait_for_role(daemon, "api", 1)
        os.kill(daemon.pid, signal.SIGTERM)
        steps.let_go()
        assert daemon._process is not None
        assert daemon._process.wait(SECONDS) == 0
        daemon.start()
        assert os.listdir(daemon.mountpoint) == []
        assert daemon.mount("/0", tmp_path / "bootstrap-0", IMAGE.blobs) == (204, "")
        assert read(daemon, 0) == CONTENT
        assert daemon.backend_reads() == 0


def test_upgrade_in_the_middle_loses_no_image(tmp_path: Path, steps: Steps, keeper: Keeper) -> None:
    count = 6
    with many(tmp_path, count, args=keeper.args) as daemon:
        keeper.save(daemon)
        crash(daemon)
        steps.hold(daemon)
        daemon.launch()
        old, sock = daemon._process, daemon.apisock
        assert old is not None
        wait_for_role(daemon, "api", 1)
        daemon.apisock = daemon.folder / "api1.sock"
        begin(daemon, "--upgrade", "--apisock", str(daemon.apisock))
        keeper.give(daemon)
        new, daemon.apisock = daemon.apisock, sock
        asking = Asking(lambda: put(daemon, "exit"))
        asking.served(steps, count - 2)
        assert asking.answer == 204
        steps.let_go()
        assert old.wait(SECONDS) == 0
        daemon.apisock = new
        assert put(daemon, "start") == 204
        assert mounted(daemon) == {f"/{number}" for number in range(count)}
        assert all(read(daemon, number) == CONTENT for number in range(count))


def test_a_configuration_that_is_none_now_costs_its_image_alone(tmp_path: Path, expect_log: ExpectLog) -> None:
    """That is found out behind READY."""
    with many(tmp_path, 3) as daemon:
        crash(daemon)
        folder = state_file(daemon).parent / "mounts"
        (record,) = folder.glob("2.*.record")
        write_checked(record, read_checked(record) | {"config": json.dumps({"version": 7})})
        expect_log("the image at /1 cannot be taken over: configuration of /1: .*; it is unmounted")
        daemon.start()
        assert mounted(daemon) == {"/0", "/2"}
        assert sorted(os.listdir(daemon.mountpoint)) == ["0", "2"]
        assert [read(daemon, number) for number in (0, 2)] == [CONTENT] * 2
        wait_until(lambda: not list(folder.glob("2.*")), "the end of its record", SECONDS)


def test_an_image_for_which_nothing_is_left_now_is_known_later() -> None:
    records = [SimpleNamespace(place=f"/{name}", handles=[ord(name)], given=False, files=None) for name in "abc"]
    known: list[str] = []
    scarce = {"/a": 2, "/c": 1}

    def know(recorded: SimpleNamespace) -> SimpleNamespace:
        if scarce.get(recorded.place, 0):
            scarce[recorded.place] -= 1
            raise ScarceError("no file descriptor is left", errno.EMFILE)
        del mounts.coming[recorded.place]
        known.append(recorded.place)
        return recorded

    strays: list[object] = []
    mounts = SimpleNamespace(coming={}, know=know, remove_strays=strays.append)
    router = SimpleNamespace(unknown=None)
    restore = Restore(cast("Mounts", mounts), cast("Router", router), cast("list[Recorded]", records), lambda _: None)
    assert restore.step() and restore.is_scarce
    assert router.unknown(ord("c")), "whoever waits for it is not to fail"
    assert restore.step() and not restore.is_scarce and known == ["/b"]
    assert not router.unknown(ord("c"))
    assert known == ["/b", "/c"]
    assert restore.step() and restore.is_scarce
    restore.end()
    assert not strays, "what an image has that is not known yet is nobody's stray"
    assert not restore.step() and known == ["/b", "/c", "/a"]
    restore.end()
    assert len(strays) == 1

"""What a daemon notes of the kernel's cache for its guard and its successor, at each step of a takeover."""

from __future__ import annotations

import errno
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from nydusd import priority
from nydusd.cli.options import SingletonOptions
from nydusd.errors import CacheError, ScarceError
from nydusd.frontends.fscache.device import CacheDevice
from nydusd.frontends.fscache.guard import Guard
from nydusd.frontends.fscache.left import Files, Held
from nydusd.ipc.spec import write_spec
from nydusd.storage.state.lock import start_time
from nydusd.supervisor.fscache import FscacheDaemon
from nydusd.supervisor.handover import Sent
from tests.support.discipline import is_running, wait_until
from tests.support.fork_server import fork_server
from tests.support.scarce import no_fd_left

IMAGES = [{"entry": 1}, {"entry": 2}]
LOG = {"level": "info", "file": None}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FscacheDaemon]:
    """One that takes over from a guard that lives, which is this process, and has not started its own."""
    monkeypatch.setenv("NYDUSD_RUNTIME_DIR", str(tmp_path))
    with fork_server() as server:
        daemon = FscacheDaemon(SingletonOptions(fscache=str(tmp_path)), [], cast(Any, server))
        held = Held((os.getpid(), start_time(os.getpid())), 5, {"d/a": 1}, ["a", "b"])
        daemon._files.write(held, cast(Any, IMAGES))
        daemon._device = CacheDevice(os.memfd_create("device"))
        daemon._family.inherited = True
        yield daemon


def taken(daemon: FscacheDaemon) -> tuple[int, list[Any] | None]:
    held = daemon._files.read()
    assert held is not None
    return held.holder[0], daemon._files.images()


def test_the_former_guard_stays_noted_until_there_is_another(daemon: FscacheDaemon) -> None:
    """It ends when it is not, and until then nobody else would be left if the daemon were killed."""
    daemon._note()
    assert taken(daemon) == (os.getpid(), IMAGES)
    daemon._guard.process = cast(Any, type("Process", (), {"pid": os.getppid()}))
    daemon._note()
    assert taken(daemon) == (os.getppid(), [])
    daemon.stop()


def test_a_takeover_that_fails_removes_nothing_of_what_the_next_one_needs(daemon: FscacheDaemon) -> None:
    daemon.fail()
    daemon.stop()
    assert taken(daemon) == (os.getpid(), IMAGES)


def test_a_daemon_that_has_not_served_and_fails_leaves_nothing(daemon: FscacheDaemon) -> None:
    daemon._family.inherited = False
    daemon.fail()
    daemon.stop()
    assert daemon._files.read() is None


def test_a_daemon_that_leaves_to_its_successor_leaves_what_is_noted_though_nothing_is_mounted(
    daemon: FscacheDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(priority, "leave", lambda _pids: None)  # this process, that is, with which other tests go on
    daemon._family.inherited = False
    daemon.handover.leaving = True
    pids = daemon.fork_server.pids
    daemon.stop()
    assert taken(daemon) == (os.getpid(), IMAGES)
    assert not any(map(is_running, pids)), "a fork server that holds nothing is left to nobody"
    for fd in (daemon._family.lifeline, daemon._family._shared):
        os.close(fd)


def sent(images: object) -> Sent:
    return Sent(os.memfd_create("device"), {"images": images})


def test_what_was_noted_of_images_is_preferred_to_what_was_sent_with_the_device(
    daemon: FscacheDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written at each change, and sent when somebody asks for it."""
    served: list[object] = []
    monkeypatch.setattr(daemon, "_serve", served.append)
    monkeypatch.setattr(daemon, "_recall", served.append)
    other = [{"entry": 3}]
    for noted, images, expected in ((True, other, IMAGES), (False, other, other), (False, "junk", [])):
        if not noted:
            daemon._files.remove()
        assert daemon._device is not None
        daemon._device.close()
        daemon._device = None
        daemon.take_sent(sent(images))
        assert served == [expected, daemon._device]
        served.clear()
    daemon.stop()


def test_what_was_noted_of_images_and_cannot_be_read_now_is_not_taken_for_nothing(
    daemon: FscacheDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends the device may do so again."""
    served: list[object] = []
    monkeypatch.setattr(daemon, "_serve", served.append)
    monkeypatch.setattr(daemon, "_recall", served.append)
    assert daemon._device is not None
    daemon._device.close()
    daemon._device = None
    message = sent([])
    with no_fd_left(os.getpid()), pytest.raises(ScarceError):
        daemon.take_sent(message)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(message.fd)
    assert not served
    daemon.take_sent(sent([]))
    assert served == [IMAGES, daemon._device]
    daemon.stop()


def test_a_successor_that_waited_takes_the_device_from_the_guard_and_what_was_sent_when_there_is_none(
    daemon: FscacheDaemon,
) -> None:
    guards = os.memfd_create("of the guard")
    held = Held((os.getpid(), start_time(os.getpid())), guards, {}, [])
    daemon._files.write(held, cast(Any, IMAGES))
    for alive, told in ((True, IMAGES), (False, IMAGES), (False, [{"entry": 3}])):
        if not alive:
            daemon._files.write(msgspec.structs.replace(held, holder=(os.getpid(), 1)), cast(Any, IMAGES))
        if told is not IMAGES:
            daemon._files.remove()
        daemon.handover.sent = sent([{"entry": 3}])
        name = os.readlink(f"/proc/self/fd/{guards if alive else daemon.handover.sent.fd}")
        found = daemon._take_left()
        assert found is not None
        assert os.readlink(f"/proc/self/fd/{found.device}") == name
        assert found.images == told
        assert daemon.handover.sent is None
        os.close(found.device)
    os.close(guards)
    daemon.stop()


def test_a_guard_that_gives_nothing_costs_no_device_that_was_kept(daemon: FscacheDaemon) -> None:
    daemon._files.write(Held((os.getpid(), start_time(os.getpid())), 1 << 20, {}, []), cast(Any, IMAGES))
    with pytest.raises(CacheError, match="does not give its device"):
        daemon._files.take(None)
    kept = os.memfd_create("kept")
    assert daemon._files.take(kept) == (kept, (os.getpid(), start_time(os.getpid())), IMAGES)
    os.close(kept)
    daemon.stop()


def test_a_guard_that_nobody_could_name_names_itself_where_the_one_that_is_named_has_ended(tmp_path: Path) -> None:
    """Its supervisor was killed after it had started it in the place of another that was killed."""
    files, device = Files.beside(str(tmp_path / "run")), os.memfd_create("device")
    before = Held((os.getpid(), 1), 1 << 20, {"d/a": 1}, ["."])  # as if an image was mounted
    files.write(before, cast(Any, IMAGES))
    nobody = 1 << 22  # no process has a number like that
    spec = write_spec(
        {"device": device, "folder": str(tmp_path / "run"), "supervisor": nobody, "patience": 600, "log": LOG}
    )
    command = [sys.executable, "-P", "-m", "nydusd.frontends.fscache.guard", "--spec-fd", str(spec)]
    with subprocess.Popen(command, pass_fds=(spec, device)) as guard:
        ours = msgspec.structs.replace(before, holder=(guard.pid, start_time(guard.pid)), device=device)
        wait_until(lambda: files.read() == ours, "the guard to name itself", 60)
        assert files.images() == IMAGES
        others = msgspec.structs.replace(before, holder=(os.getpid(), start_time(os.getpid())))
        files.write(others, cast(Any, IMAGES))
        assert guard.wait(60) == 0, "its successor has the device"
    assert files.read() == others
    os.close(spec)
    os.close(device)


def test_a_guard_of_which_it_cannot_be_told_whether_it_lives_is_not_taken_for_gone(daemon: FscacheDaemon) -> None:
    """Two would answer the kernel, each of them a part of what it says."""
    kept = os.memfd_create("kept")
    held = daemon._files.read()
    assert held is not None
    with no_fd_left(os.getpid()), pytest.raises(ScarceError):
        daemon._files.take(kept)
    daemon._files.held.write_bytes(msgspec.json.encode(msgspec.structs.replace(held, holder=(os.getpid(), -1))))
    former = Path("/proc/self/comm").read_text()
    Path("/proc/self/comm").write_text("nydusd: guard")
    try:
        with pytest.raises(CacheError, match="noted without its start time"):
            daemon._files.take(kept)
    finally:
        Path("/proc/self/comm").write_text(former)
    os.close(kept)
    daemon.stop()


def test_a_guard_is_noted_when_it_can_be_told_when_it_was_started(
    daemon: FscacheDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ScarceError):
        daemon._files.write(Held((os.getppid(), -1), 5, {}, []), [])
    daemon._guard.process = cast(Any, type("Process", (), {"pid": os.getppid()}))
    with no_fd_left(os.getpid()):
        daemon._note()
    assert taken(daemon) == (os.getpid(), IMAGES)
    assert daemon._note_at < math.inf
    assert "until it can be written, a successor will not know the images" in caplog.text
    daemon._note()
    assert taken(daemon) == (os.getppid(), [])
    assert daemon._note_at == math.inf
    daemon._note_at, daemon._guard.process = 0.0, None
    daemon._note()
    assert daemon._note_at == math.inf, "without a guard there is nothing to note, nor to be done again and again"
    daemon.stop()


def test_the_former_guard_has_ended_before_the_kernel_says_anything_once_more(
    daemon: FscacheDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may answer by now, and would take a part of it with it."""
    said: list[object] = []
    monkeypatch.setattr(daemon._family, "add", lambda child: said.append(child.role))
    monkeypatch.setattr("nydusd.supervisor.fscache.end", lambda former, _told: said.append(former))
    monkeypatch.setattr(CacheDevice, "restore", lambda _device: said.append("restore"))
    monkeypatch.setattr(daemon._poller, "register", lambda *_: None)
    daemon._bound["/a"] = cast(Any, None)
    assert daemon._device is not None
    daemon._serve(daemon._device, (7, 70))
    daemon._bound.clear()
    assert said == ["guard", (7, 70), "restore"]
    daemon.stop()


def test_what_was_not_answered_is_said_once_more_though_no_image_could_be_had(
    daemon: FscacheDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(daemon._family, "add", lambda _child: None)
    monkeypatch.setattr(CacheDevice, "restore", lambda _device: said.append("restore"))
    monkeypatch.setattr(daemon._poller, "register", lambda *_: None)
    assert daemon._device is not None
    daemon._serve(daemon._device)
    assert said == ["restore"]
    daemon.stop()


def test_a_guard_outlives_a_message_that_cannot_be_read(daemon: FscacheDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernel:
        ours.setblocking(False)
        device = CacheDevice(os.dup(ours.fileno()))
        kernel.send(b"")
        reads = 0

        def read(_device: CacheDevice) -> bytes:
            nonlocal reads
            reads += 1
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(CacheDevice, "read", read)
        kernel.send(b"x")
        Guard(device, daemon._files).serve(0.3)
        device.close()
    assert 1 <= reads < 10
    daemon.stop()


def test_a_guard_asks_again_for_what_somebody_has_open_who_is_stuck(daemon: FscacheDaemon) -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernel:
        ours.setblocking(False)
        kernel.settimeout(10)
        device = CacheDevice(os.dup(ours.fileno()))
        guard = Guard(device, daemon._files)
        for _ in range(3):
            guard.serve(0.0)
            assert kernel.recv(100) == b"restore"
            kernel.send(struct.pack("=IIIIQQ", 7, 2, 32, 5, 0, 4096))
            guard.serve(0.1)
        guard.serve(0.0)
        assert kernel.recv(100) == b"restore"
        guard.serve(0.1)
        kernel.setblocking(False)
        with pytest.raises(BlockingIOError):
            kernel.recv(100)
        device.close()
    daemon.stop()

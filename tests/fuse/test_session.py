"""Mounting, the INIT exchange, unmounting, and what an earlier run left at the mount point."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import MountError
from nydusd.frontends.fuse import protocol as p
from nydusd.frontends.fuse import session as module
from nydusd.frontends.fuse.holders import holders_of
from nydusd.frontends.fuse.session import Session, clear_stale_mount, init_reply, resolve_mountpoint
from tests.support.discipline import detach_mount, mounts_under


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mnt"
    folder.mkdir()
    yield folder
    for _ in range(3):
        detach_mount(str(folder))


def is_mounted(path: Path) -> bool:
    """From the mount table: a stat would wait for ever where nobody serves the mount."""
    return str(path) in mounts_under(path.parent)


def init_request(
    major: int = 7, minor: int = 45, flags: int = 0xFFFFFFFF, flags2: int = 0xFFFFFFFF, ahead: int = 131072
) -> bytes:
    body = p.INIT_IN.pack(major, minor, ahead, flags) + p.INIT_IN_EXT.pack(flags2) + bytes(44)
    return p.IN_HEADER.pack(p.IN_HEADER.size + len(body), p.INIT, 2, 0, 0, 0, 0, 0, 0) + body


def test_init_settles_what_both_want() -> None:
    reply, negotiated = init_reply(init_request())
    length, error, unique = p.OUT_HEADER.unpack_from(reply)
    assert (length, error, unique) == (len(reply), 0, 2) == (80, 0, 2)
    fields = p.INIT_OUT.unpack_from(reply, 16)
    major, minor, ahead, flags, background, _, write, gran, pages, _, flags2, _, _ = fields
    assert (major, minor, ahead, background, write, gran, pages) == (7, 40, 131072, 65535, 4096, 1, 256)
    assert negotiated.flags == flags | flags2 << 32
    assert negotiated.flags & p.HAS_RESEND and negotiated.flags & p.NO_OPEN_SUPPORT


def test_init_of_an_old_kernel_gets_only_what_it_offers() -> None:
    offered = p.ASYNC_READ | p.MAX_PAGES
    _, negotiated = init_reply(init_request(minor=31, flags=offered))
    assert (negotiated.minor, negotiated.flags) == (31, offered)


@pytest.mark.parametrize(
    "request_", [b"", bytes(40), init_request(major=8), init_request(minor=22), init_request()[:50]]
)
def test_init_of_an_unknown_kind_is_refused(request_: bytes) -> None:
    with pytest.raises(MountError, match="FUSE_INIT"):
        init_reply(request_)


@given(st.binary(max_size=120))
def test_init_of_any_bytes_gives_an_answer_or_a_mount_error(request_: bytes) -> None:
    try:
        reply, _ = init_reply(request_)
    except MountError:
        return
    assert len(reply) == 80


def test_mount_clone_unmount(mountpoint: Path) -> None:
    session = Session.mount(str(mountpoint))
    try:
        lanes = session.open_lanes(2)
        assert is_mounted(mountpoint)
        for lane in lanes:
            assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in lane)
        assert fcntl.fcntl(session.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        session.unmount()
        assert not is_mounted(mountpoint)
        with pytest.raises(OSError) as caught:
            os.read(lanes[0].fd, 1 << 20)
        assert caught.value.errno == errno.ENODEV
        session.unmount()
    finally:
        session.close()


def test_read_ahead_can_be_set(mountpoint: Path) -> None:
    session = Session.mount(str(mountpoint), read_ahead_kib=1024)
    try:
        assert Path(f"/sys/class/bdi/{session.device}/read_ahead_kb").read_text() == "1024\n"
    finally:
        session.unmount()
        session.close()


def test_mount_where_there_is_no_folder_names_it(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MountError, match="nothing: mount: No such file or directory"):
        Session.mount(str(tmp_path / "nothing"))
    assert os.listdir("/proc/self/fd") == before


def test_a_mount_in_use_is_detached(mountpoint: Path) -> None:
    session = Session.mount(str(mountpoint))
    try:
        held = os.open(mountpoint, os.O_PATH)
        try:
            session.unmount()
            assert not is_mounted(mountpoint)
        finally:
            os.close(held)
    finally:
        session.close()


def test_unmount_leaves_a_mount_that_took_our_place(mountpoint: Path) -> None:
    ours = Session.mount(str(mountpoint))
    detach_mount(str(mountpoint))
    theirs = Session.mount(str(mountpoint))
    try:
        ours.unmount()
        assert is_mounted(mountpoint)
        theirs.unmount()
        assert not is_mounted(mountpoint)
    finally:
        ours.close()
        theirs.close()


def test_an_aborted_mount_is_unmounted(tmp_path: Path, mountpoint: Path) -> None:
    control = tmp_path / "control"
    control.mkdir()
    session = Session.mount(str(mountpoint))
    try:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", str(control)], check=True)
        try:
            (control / session.device.partition(":")[2] / "abort").write_text("1")
        finally:
            subprocess.run(["umount", str(control)], check=True)
        with pytest.raises(OSError) as caught:
            os.read(session.fd, 1 << 20)
        assert caught.value.errno == errno.ECONNABORTED
        session.unmount()
        assert not is_mounted(mountpoint)
    finally:
        session.close()


def test_adopt_serves_a_session_on_another_copy_of_its_fd(mountpoint: Path) -> None:
    first = Session.mount(str(mountpoint))
    second = Session.adopt(str(mountpoint), os.dup(first.fd), first.negotiated)
    try:
        assert second.device == first.device
        first.close()
        second.open_lanes(1)
        second.unmount()
        assert not is_mounted(mountpoint)
    finally:
        first.close()
        second.close()


def test_adopt_where_nothing_is_mounted(mountpoint: Path) -> None:
    with open(os.devnull) as null, pytest.raises(MountError, match="no FUSE file system"):
        Session.adopt(str(mountpoint), null.fileno(), module.Negotiated(40, 0, 0))


def test_a_dead_mount_is_detached(mountpoint: Path) -> None:
    Session.mount(str(mountpoint)).close()
    Session.mount(str(mountpoint)).close()
    assert clear_stale_mount(str(mountpoint))
    assert not is_mounted(mountpoint)
    assert not clear_stale_mount(str(mountpoint))


def test_a_mount_whose_session_is_still_held_is_left_alone(mountpoint: Path) -> None:
    session = Session.mount(str(mountpoint))
    try:
        with pytest.raises(MountError, match="does not answer, but its session is still held open"):
            clear_stale_mount(str(mountpoint), patience=0.3)
        assert is_mounted(mountpoint)
    finally:
        session.unmount()
        session.close()


HOLD = """
from nydusd.proctitle import set_title
set_title("fork server")
print("ready", flush=True)
input()
"""


def test_who_holds_the_session_of_a_dead_daemon_is_told_and_how_to_end_it(mountpoint: Path) -> None:
    session = Session.mount(str(mountpoint))
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[session.fd]
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        session.close()
        (holder,) = holders_of(session.device)
        assert (holder.pid, holder.title, holder.is_left) == (other.pid, "nydusd: fork server", True)
        with pytest.raises(MountError, match=rf"pid {other.pid} \(nydusd: fork server\).*`kill -9 {other.pid}`"):
            clear_stale_mount(str(mountpoint), patience=0.3)
        other.kill()
    assert holders_of(session.device) == []
    assert clear_stale_mount(str(mountpoint))


def test_a_mount_that_answers_is_left_alone(mountpoint: Path) -> None:
    session = Session.mount(str(mountpoint))
    serve = (
        "import os, sys\n"
        "fd = int(sys.argv[1])\n"
        "while request := os.read(fd, 1 << 20):\n"
        "    os.write(fd, (96).to_bytes(8, 'little') + request[8:16] + bytes(80))\n"
    )
    server = subprocess.Popen([sys.executable, "-ISc", serve, str(session.fd)], pass_fds=[session.fd])
    try:
        with pytest.raises(MountError, match="mounted here already"):
            clear_stale_mount(str(mountpoint), patience=10)
    finally:
        server.kill()
        server.wait()
        session.unmount()
        session.close()


def test_a_mount_of_another_kind_is_no_obstacle(mountpoint: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mountpoint)], check=True)
    assert not clear_stale_mount(str(mountpoint))
    assert is_mounted(mountpoint)


def test_odd_mount_points(tmp_path: Path) -> None:
    odd = tmp_path / "a b\tc\\d\n\u00e9"
    odd.mkdir()
    (tmp_path / "link").symlink_to(odd.name)
    (tmp_path / "chain").symlink_to(tmp_path / "link")
    session = Session.mount(str(tmp_path / "chain"))
    try:
        assert session.mountpoint == str(odd)
        session.unmount()
        assert not is_mounted(odd)
    finally:
        session.close()
        detach_mount(str(odd))


def test_a_loop_of_links_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(MountError, match="too many symbolic links"):
        resolve_mountpoint(str(tmp_path / "a"))


def test_who_may_not_mount_is_told_what_it_takes() -> None:
    code = "from nydusd.frontends.fuse.session import _mount; _mount('/', -1)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, user=65534, group=65534, check=False)
    assert done.stderr.endswith("/: mount: Operation not permitted: it needs root (CAP_SYS_ADMIN)\n")

"""What programs see of a mount: every operation, by real system calls through the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuse.harness import Stage
from tests.fuse.tree import BIG, MANY, noise
from tests.support.discipline import wait_until


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("fuse")) as made:
        yield made


@pytest.fixture
def mnt(stage: Stage) -> Path:
    return stage.mountpoint


def fails_with(code: int, action: Callable[[], object]) -> None:
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == code, caught.value


def test_mount_table_shows_the_options_of_the_reference(mnt: Path) -> None:
    lines = [line for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == str(mnt)]
    assert lines == [
        f"rafs {mnt} fuse ro,nosuid,nodev,noatime,user_id=0,group_id=0,default_permissions,allow_other,max_read=1052672 0 0"
    ]


def test_attributes_are_those_of_the_image(stage: Stage, mnt: Path) -> None:
    st = os.lstat(mnt / "hello")
    node = stage.tree.find(b"hello")
    assert (st.st_ino, st.st_mode, st.st_nlink, st.st_size) == (node.ino, node.mode, 1, node.size)
    assert (st.st_uid, st.st_gid, st.st_blksize, st.st_blocks) == (3_000_000_000, 70_000, 4096, 1)
    assert st.st_mtime_ns == st.st_ctime_ns == st.st_atime_ns == 1_700_000_000_000_000_005
    assert os.lstat(mnt / "zero").st_rdev == os.makedev(1, 5)
    assert os.lstat(mnt / "old").st_mtime == pytest.approx(-3600)


def test_root_shows_its_own_mode_and_inode_number(stage: Stage, mnt: Path) -> None:
    st = os.stat(mnt)
    assert (st.st_ino, stat.S_IMODE(st.st_mode)) == (stage.tree.root_ino, 0o751)
    assert (mnt / "first").read_bytes() == b"I am inode 1\n"
    assert os.lstat(mnt / "first").st_ino == 1


def test_contents(mnt: Path) -> None:
    assert (mnt / "big").read_bytes() == noise("big", BIG)
    assert (mnt / "empty").read_bytes() == b""
    assert Path(os.fsdecode(os.fsencode(mnt) + b"/dir/\xff\xfe bytes")).read_bytes() == b"not UTF-8\n"
    assert (mnt / ("n" * 255)).read_bytes() == b"long name\n"


def test_reads_at_and_across_the_end(mnt: Path) -> None:
    fd = os.open(mnt / "big", os.O_RDONLY)
    try:
        assert os.pread(fd, 100, BIG - 10) == noise("big", BIG)[-10:]
        assert os.pread(fd, 100, BIG) == b""
        assert os.pread(fd, 100, 1 << 60) == b""
    finally:
        os.close(fd)


def test_symbolic_links(mnt: Path) -> None:
    assert os.readlink(mnt / "link") == "dir/nested"
    assert (mnt / "link").read_bytes() == b"nested\n"
    assert os.readlink(mnt / "dangling") == "/nowhere/" + "x" * 3000


def test_absent_names_are_absent_again_and_again(mnt: Path) -> None:
    for _ in range(3):
        fails_with(errno.ENOENT, lambda: os.stat(mnt / "nothing"))
    fails_with(errno.ENAMETOOLONG, lambda: os.stat(mnt / ("n" * 256)))
    fails_with(errno.ENOTDIR, lambda: os.stat(mnt / "hello" / "x"))


def test_statfs(stage: Stage, mnt: Path) -> None:
    found = os.statvfs(mnt)
    assert (found.f_bsize, found.f_namemax, found.f_files) == (512, 255, stage.tree.inode_count)
    assert (found.f_blocks, found.f_bfree, found.f_ffree) == (0, 0, 0)


def test_extended_attributes(mnt: Path) -> None:
    assert sorted(os.listxattr(mnt / "hello")) == ["user.a", "user.empty"]
    assert os.getxattr(mnt / "hello", "user.a") == b"value"
    assert os.getxattr(mnt / "hello", "user.empty") == b""
    assert os.listxattr(mnt / "big") == []
    fails_with(errno.ENODATA, lambda: os.getxattr(mnt / "hello", "user.b"))


def test_extended_attributes_probe_and_short_buffer(mnt: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(mnt / "hello")
    buffer = ctypes.create_string_buffer(3)
    assert libc.getxattr(path, b"user.a", None, ctypes.c_size_t(0)) == 5
    assert libc.getxattr(path, b"user.a", buffer, ctypes.c_size_t(3)) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.listxattr(path, None, ctypes.c_size_t(0)) == len("user.a.user.empty.")
    assert libc.listxattr(path, buffer, ctypes.c_size_t(3)) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_listing_a_large_folder(mnt: Path) -> None:
    names = os.listdir(mnt / "many")
    assert len(names) == len(set(names)) == MANY
    with os.scandir(mnt / "many") as entries:
        assert all(entry.is_file(follow_symlinks=False) for entry in entries)


def test_seekdir_comes_back_to_where_telldir_was(mnt: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    folder = ctypes.c_void_p(libc.opendir(os.fsencode(mnt / "many")))
    assert folder.value

    def next_name() -> bytes | None:
        entry = libc.readdir(folder)
        return ctypes.string_at(entry + 19) if entry else None

    try:
        names: list[bytes] = []
        places: list[int] = []
        while True:
            places.append(libc.telldir(folder))
            name = next_name()
            if name is None:
                break
            names.append(name)
        assert len(names) == MANY + 2
        for index in (0, 1, 2, 33, 1000, 1001, 2999, MANY + 1, 5):
            libc.seekdir(folder, ctypes.c_long(places[index]))
            assert next_name() == names[index]
        libc.seekdir(folder, ctypes.c_long(places[-1]))
        assert next_name() is None
        libc.rewinddir(folder)
        assert next_name() == names[0]
    finally:
        libc.closedir(folder)


def test_nothing_can_be_changed(mnt: Path) -> None:
    hello, new = mnt / "hello", mnt / "new"
    fails_with(errno.EROFS, lambda: os.open(hello, os.O_WRONLY))
    fails_with(errno.EROFS, lambda: os.open(new, os.O_CREAT | os.O_WRONLY))
    fails_with(errno.EROFS, lambda: os.unlink(hello))
    fails_with(errno.EROFS, lambda: os.rmdir(mnt / "dir"))
    fails_with(errno.EROFS, lambda: os.mkdir(new))
    fails_with(errno.EROFS, lambda: os.rename(hello, new))
    fails_with(errno.EROFS, lambda: os.link(hello, new))
    fails_with(errno.EROFS, lambda: os.symlink("x", new))
    fails_with(errno.EROFS, lambda: os.mknod(new))
    fails_with(errno.EROFS, lambda: os.chmod(hello, 0o777))
    fails_with(errno.EROFS, lambda: os.chown(hello, 1, 1))
    fails_with(errno.EROFS, lambda: os.utime(hello))
    fails_with(errno.EROFS, lambda: os.truncate(hello, 0))
    fails_with(errno.EROFS, lambda: os.setxattr(hello, "user.a", b"x"))
    fails_with(errno.EROFS, lambda: os.removexattr(hello, "user.a"))


def test_nothing_can_be_changed_even_after_a_remount_for_writing(tmp_path: Path) -> None:
    with Stage(tmp_path) as stage:
        subprocess.run(["mount", "-i", "-o", "remount,rw", str(stage.mountpoint)], check=True)
        hello, new = stage.mountpoint / "hello", stage.mountpoint / "new"
        fails_with(errno.EROFS, lambda: os.open(new, os.O_CREAT | os.O_WRONLY))
        fails_with(errno.EROFS, lambda: os.unlink(hello))
        fails_with(errno.EROFS, lambda: os.mkdir(new))
        fails_with(errno.EROFS, lambda: os.rename(hello, new))
        fails_with(errno.EROFS, lambda: os.truncate(hello, 0))
        fails_with(errno.EROFS, lambda: os.setxattr(hello, "user.a", b"x"))
        fd = os.open(hello, os.O_RDWR)
        try:
            fails_with(errno.EROFS, lambda: os.pwrite(fd, b"HELLO", 0))
        finally:
            os.close(fd)
        assert hello.read_bytes() == b"hello, world\n"


def test_a_broken_inode_is_listed_and_gives_eio(mnt: Path, expect_log: Callable[..., None]) -> None:
    expect_log(r"mount /: sample: inode \d+: is broken")
    assert "broken" in os.listdir(mnt)
    fails_with(errno.EIO, lambda: os.stat(mnt / "broken"))
    assert (mnt / "hello").read_bytes() == b"hello, world\n"


def test_memory_mapped_file(mnt: Path) -> None:
    with open(mnt / "big", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == noise("big", BIG)


def test_direct_reads(mnt: Path) -> None:
    fd = os.open(mnt / "big", os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, 4 << 20)
        found = os.preadv(fd, [buffer], 0)
        assert buffer[:found] == noise("big", BIG)
        assert os.preadv(fd, [memoryview(buffer)[:8192]], 65536 - 4096) == 8192
        assert buffer[:8192] == noise("big", BIG)[65536 - 4096 : 65536 + 4096]
        buffer.close()
    finally:
        os.close(fd)


def test_sendfile(mnt: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(mnt / "other", "rb") as file:
        assert os.sendfile(ours.fileno(), file.fileno(), 70_000, 20_000) == 20_000
        assert theirs.recv(20_000, socket.MSG_WAITALL) == noise("other", 300_000)[70_000:90_000]


def test_a_program_on_the_mount_runs(mnt: Path) -> None:
    assert subprocess.run([mnt / "script", "well"], capture_output=True, check=True).stdout == b"ran well\n"


def test_seek_hole_and_data_see_a_plain_file(mnt: Path) -> None:
    fd = os.open(mnt / "big", os.O_RDONLY)
    try:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == BIG
    finally:
        os.close(fd)


def test_overlay_on_top(stage: Stage, tmp_path: Path) -> None:
    upper, work, merged = tmp_path / "upper", tmp_path / "work", tmp_path / "merged"
    for folder in (upper, work, merged):
        folder.mkdir()
    options = f"lowerdir={stage.mountpoint},upperdir={upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
    try:
        assert (merged / "big").read_bytes() == noise("big", BIG)
        (merged / "hello").write_text("changed")
        (merged / "third").unlink()
        assert (merged / "hello").read_text() == "changed"
        assert not (merged / "third").exists()
        assert len(os.listdir(merged / "many")) == MANY
        os.rename(merged / "link", merged / "moved")
        assert os.readlink(merged / "moved") == "dir/nested"
    finally:
        subprocess.run(["umount", str(merged)], check=True)
    assert (stage.mountpoint / "hello").read_bytes() == b"hello, world\n"


def test_ps_shows_the_role(stage: Stage, mnt: Path) -> None:
    assert (mnt / "hello").exists()
    pid = stage.processes[0].pid
    wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "nydusd: fuse 0\n", "the title")


def test_a_front_end_that_missed_nothing_has_not_loaded_zeromq(stage: Stage, mnt: Path) -> None:
    assert (mnt / "hello").read_bytes() == b"hello, world\n"
    assert "zmq" not in Path(f"/proc/{stage.processes[0].pid}/maps").read_text()

"""A block device that records what reaches it, and fails when it is told to: ext4 on a loop device on a file of our own FUSE.

The server (`python -m tests.support.disk`) is a process of its own, for a file system that waits for us must not wait for
itself. It notes each write and each flush. What a power cut leaves is made of that by `Recording`: all that was written before
the last flush, and of what came after it any part. The loop device passes flushes on, and has no other cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from tests.support.discipline import detach_mount, wait_until

SIZE = 24 << 20
BLOCK = 4096
"""What a disk writes in one piece."""
GOOD, NO_WRITES, NO_READS = 0, 1, 2
"""What the device does: all that it should, or EIO for writes, or for reads."""
_HEAD = struct.Struct("<BQI")
_WRITE, _FLUSH = 1, 2
_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_ATTR = struct.Struct("=QQQQQQIIIIIIIIII")
_DISK = 2


class Event(NamedTuple):
    """A write of `data` at `offset`; without data: a flush."""

    offset: int
    data: bytes


class Recording:
    """All that has reached a device since it was made."""

    def __init__(self, base: bytes, path: Path) -> None:
        self._base = base
        self.events: list[Event] = []
        raw = path.read_bytes()
        at = 0
        while at < len(raw):
            kind, offset, length = _HEAD.unpack_from(raw, at)
            at += _HEAD.size
            self.events.append(Event(offset, raw[at : at + length] if kind == _WRITE else b""))
            at += length

    def cuts(self) -> list[int]:
        """Numbers of events after which the power may fail: each one after which another disk may be left than before."""
        return [number for number, event in enumerate(self.events, 1) if event.data] + [0]

    def left(self, cut: int, choose: random.Random | None) -> bytes:
        """A disk after a cut behind so many events. What was not flushed is there in part, as `choose` says, or not at all."""
        disk = bytearray(self._base)
        flushed = next((n for n in range(cut, 0, -1) if not self.events[n - 1].data), 0)
        for number, (offset, data) in enumerate(self.events[:cut]):
            for at in range(0, len(data), BLOCK):
                if number < flushed or (choose is not None and choose.random() < 0.5):
                    piece = data[at : at + BLOCK]
                    disk[offset + at : offset + at + len(piece)] = piece
        return bytes(disk)


def make_ext4(path: Path) -> bytes:
    """An empty file system in a file, and its bytes."""
    with open(path, "wb") as file:
        file.truncate(SIZE)
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-N", "64", "-E", "lazy_itable_init=0,nodiscard"]
    subprocess.run([*command, str(path)], check=True, stdout=subprocess.DEVNULL)
    return path.read_bytes()


@contextlib.contextmanager
def mounted(file: Path, point: Path, options: str) -> Iterator[str]:
    """The ext4 in a file, mounted; gives the name of its loop device."""
    point.mkdir(exist_ok=True)
    loop = subprocess.run(
        ["losetup", "-f", "--show", str(file)], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mount", "-t", "ext4", "-o", options, loop, str(point)], check=True)
        try:
            yield loop
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


class Disk:
    """`with Disk(folder) as disk:` has a file system at `disk.path`; `disk.does` says what the device does from now on."""

    def __init__(self, folder: Path, options: str = "commit=1") -> None:
        self._folder = folder / "disk"
        self._folder.mkdir()
        self.path = self._folder / "mnt"
        self._image = self._folder / "image"
        self._log = self._folder / "log"
        self._fuse = self._folder / "fuse"
        self._options = options
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._base = make_ext4(self._image)
        self._log.touch()
        self._fuse.mkdir()
        mode = self._folder / "mode"
        mode.write_bytes(b"\0")
        with open(mode, "r+b") as file:
            self._mode = mmap.mmap(file.fileno(), 1)
        command = [sys.executable, "-m", "tests.support.disk", str(self._folder)]
        server = self._stack.enter_context(subprocess.Popen(command))
        self._stack.callback(detach_mount, str(self._fuse))
        wait_until((self._fuse / "disk").exists, "the device's file", 30)
        assert server.poll() is None
        self.loop = self._stack.enter_context(mounted(self._fuse / "disk", self.path, self._options))
        return self

    def does(self, mode: int) -> None:
        self._mode[0] = mode

    def forget_cached(self, path: Path) -> None:
        """Have the kernel read a file anew from the device."""
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    def recording(self) -> Recording:
        return Recording(self._base, self._log)

    def __exit__(self, *_: object) -> None:
        self.does(GOOD)
        self._stack.close()
        self._mode.close()


class Server:
    """Serves one file; everything is in memory, what was written is in the log."""

    def __init__(self, folder: Path) -> None:
        self._disk = bytearray((folder / "image").read_bytes())
        self._log = open(folder / "log", "ab", buffering=0)  # noqa: SIM115
        with open(folder / "mode", "rb") as file:
            self._mode = mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0".encode()
        point = os.fsencode(folder / "fuse")
        if ctypes.CDLL(None, use_errno=True).mount(b"nydusd-test-disk", point, b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount")

    def run(self) -> None:
        while True:
            try:
                request = os.read(self._fd, (1 << 20) + 4096)
            except OSError as e:
                if e.errno == errno.ENODEV:  # unmounted
                    return
                if e.errno in (errno.ENOENT, errno.EINTR):
                    continue
                raise
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            answer = self._answer(opcode, node, request[_IN.size :])
            if answer is None:
                continue
            code, body = (-answer, b"") if isinstance(answer, int) else (0, answer)
            with contextlib.suppress(FileNotFoundError):
                os.writev(self._fd, [_OUT.pack(_OUT.size + len(body), code, unique), body])

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes | int | None:
        if opcode == 26:  # INIT
            _, minor, read_ahead, _ = struct.unpack_from("=IIII", body)
            return struct.pack(
                "=IIIIHHIIHHI28x", 7, min(minor, 38), read_ahead, 1 << 5 | 1 << 22, 12, 10, 1 << 20, 1, 256, 0, 0
            )
        if opcode == 1:  # LOOKUP
            return (
                struct.pack("=QQQQII", _DISK, 0, 60, 60, 0, 0) + self._attr(_DISK)
                if body == b"disk\0"
                else errno.ENOENT
            )
        if opcode in (3, 4):  # GETATTR, SETATTR
            return struct.pack("=QII", 60, 0, 0) + self._attr(node)
        if opcode in (14, 27):  # OPEN, OPENDIR
            return struct.pack("=QII", 0, 1, 0)  # direct: nothing of it is cached
        if opcode == 15:  # READ
            _, offset, size = struct.unpack_from("=QQI", body)
            return errno.EIO if self._mode[0] & NO_READS else bytes(self._disk[offset : offset + size])
        if opcode == 16:  # WRITE
            _, offset, size = struct.unpack_from("=QQI", body)
            return self._write(offset, body[40 : 40 + size])
        if opcode in (18, 20, 25, 29):  # RELEASE, FSYNC, FLUSH, RELEASEDIR
            if opcode == 20:
                self._log.write(_HEAD.pack(_FLUSH, 0, 0))
            return b""
        return None if opcode in (2, 42) else errno.ENOSYS  # FORGET has no answer

    def _write(self, offset: int, data: bytes) -> bytes | int:
        if self._mode[0] & NO_WRITES:
            return errno.EIO
        self._disk[offset : offset + len(data)] = data
        self._log.write(_HEAD.pack(_WRITE, offset, len(data)) + data)
        return struct.pack("=II", len(data), 0)

    def _attr(self, node: int) -> bytes:
        size, kind = (SIZE, 0o100600) if node == _DISK else (0, 0o040700)
        return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, kind, 1, 0, 0, 0, BLOCK, 0)


if __name__ == "__main__":
    Server(Path(sys.argv[1])).run()

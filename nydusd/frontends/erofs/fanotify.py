"""The kernel's fanotify as this front end uses it: a group that is asked before a range of a cache file is read.

Called by the supervisor and by the front end. What is marked is not a file but a mount: a private copy of the cache file's
own mount, in no folder, through which EROFS alone reads. So the daemon's workers and an operator's tools use the very same
file by its name and raise no event.

What holds after SIGKILL: the group lives as long as any process has its fd. When the last one is closed the kernel lets
every reader pass, also one that waits, and a hole reads as zeros: hence the guard (`guard.py`).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from nydusd.errors import MountError

_CLOEXEC, _NONBLOCK, _PRE_CONTENT, _UNLIMITED_QUEUE, _UNLIMITED_MARKS = 0x1, 0x2, 0x8, 0x10, 0x20
_MARK_ADD, _MARK_REMOVE, _MARK_MOUNT = 0x1, 0x2, 0x10
_PRE_ACCESS = 0x100000
_AT_FDCWD = -100
_OPEN_TREE, _OPEN_TREE_CLONE = 428, 0x1

_METADATA = Struct("=IBBHQii")
"""event_len, version, reserved, metadata_len, mask, fd, pid."""
_MASK = Struct("=q")
_VERSION = 3
_INFO = Struct("=BBH")
"""info_type, pad, length."""
_RANGE = Struct("=BBHIQQ")
"""The same and: pad, offset, count."""
_INFO_RANGE = 6
_ANSWER = Struct("=iI")
_ALLOW, _DENY = 0x1, 0x2
_SENDABLE = (errno.EPERM, errno.EIO, errno.EBUSY, errno.ETXTBSY, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
"""What the kernel takes as the reason of a refusal."""
EVENT_SIZE = _METADATA.size + _RANGE.size
READ_SIZE = 4096
"""Bytes that one read(2) of the group may give."""

_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """A reader waits for `length` bytes at `offset` of the file that `fd` is open on, in the process that took the event.

    `word`: where its mask is in the buffer that it was read into, in pieces of eight bytes, of which each event has some whole
    ones. All masks are the same. Who has found out of which file it is, which only that process can, notes its key there as
    `~key`, which no mask is.
    """

    fd: int
    offset: int
    length: int
    word: int = 0


def open_group() -> int:
    """A new group; its fd is not inheritable and does not block. Raises MountError where the kernel has no such groups."""
    flags = _PRE_CONTENT | _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE | _UNLIMITED_MARKS
    fd: int = _libc.fanotify_init(flags, os.O_RDONLY | os.O_LARGEFILE | os.O_CLOEXEC)
    if fd < 0:
        raise MountError(f"fanotify_init: {os.strerror(ctypes.get_errno())}")
    return fd


def private_mount(path: str) -> int:
    """A file as a mount of its own, in no folder: an O_PATH fd, not inheritable. Raises MountError."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    fd: int = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)
    if fd < 0:
        raise MountError(f"{path}: open_tree: {os.strerror(ctypes.get_errno())}")
    return fd


def path_of(tree: int) -> str:
    """How this process names the file of a private mount, to open it through that mount."""
    return f"/proc/self/fd/{tree}"


def watch(group: int, tree: int) -> None:
    """From now on the group is asked before anything is read through this mount. Raises MountError.

    Only an open file that was opened after this asks.
    """
    code = _mark(group, _MARK_ADD, tree)
    if code in (errno.EOPNOTSUPP, errno.EINVAL):
        raise MountError(
            "fanotify gives no events before reads of this file system: the kernel must be 6.15 or later, and the cache"
            " folder on ext4, xfs or btrfs"
        )
    if code:
        raise MountError(f"fanotify_mark: {os.strerror(code)}")


def unwatch(group: int, tree: int) -> None:
    """All of the file is there: nobody is asked any more. Once is enough; twice is no error. Raises MountError."""
    code = _mark(group, _MARK_REMOVE, tree)
    if code not in (0, errno.ENOENT):
        raise MountError(f"fanotify_mark: {os.strerror(code)}")


def _mark(group: int, flags: int, tree: int) -> int:
    path = os.fsencode(path_of(tree))
    if _libc.fanotify_mark(group, flags | _MARK_MOUNT, ctypes.c_uint64(_PRE_ACCESS), _AT_FDCWD, path) == 0:
        return 0
    return ctypes.get_errno()


def events(buffer: memoryview) -> Iterator[Event]:
    """What is in the buffer that the group was read into; it ends with the first event of length 0.

    An event that says no range, or that is not understood, has the length 0: it can only be refused.
    """
    at = 0
    while at + _METADATA.size <= len(buffer):
        length, version, _, metadata, _, fd, _ = _METADATA.unpack_from(buffer, at)
        if length < _METADATA.size or at + length > len(buffer):
            return
        offset = span = 0
        place, end = at + metadata, at + length
        while version == _VERSION and place + _INFO.size <= end:
            kind, _, size = _INFO.unpack_from(buffer, place)
            if kind == _INFO_RANGE and place + _RANGE.size <= end:
                *_, offset, span = _RANGE.unpack_from(buffer, place)
            place += max(size, _INFO.size)
        if fd >= 0:
            yield Event(fd, offset, span, (at >> 3) + 1)
        at += length


def key_of(buffer: memoryview, event: Event) -> int | None:
    """The key that was noted for an event, None if none was."""
    (word,) = _MASK.unpack_from(buffer, event.word << 3)
    return ~word if word < 0 else None


def answer(group: int, number: int, code: int) -> None:
    """Let the reader of an event pass (0), or fail its read with this errno, or EIO if the kernel takes no such reason.

    Raises OSError; ENOENT: it was answered before.
    """
    word = _ALLOW if not code else _DENY | (code if code in _SENDABLE else errno.EIO) << 24
    os.write(group, _ANSWER.pack(number, word))

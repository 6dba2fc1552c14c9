"""The kernel's calls to make a mount before it is seen: fsopen(2) and what follows, open_tree(2), move_mount(2).

Called by the supervisor. After SIGKILL a mount is either nowhere, and gone with its last fd, or at its place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable

from nydusd.errors import MountError

_MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT = 429, 430, 431, 432
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_RDONLY, _NOSUID, _NODEV, _NOATIME = 0x1, 0x2, 0x4, 0x10
_FROM_EMPTY, _TO_EMPTY, _BENEATH = 0x4, 0x40, 0x200
_STRING_MOST = 255
"""Bytes that fsconfig(2) takes as a string."""
_libc = ctypes.CDLL(None, use_errno=True)


def make_erofs(bootstrap: str, devices: Iterable[str], what: str) -> int:
    """An EROFS of a metadata file over the files that are its devices, in the order of its table; seen nowhere yet: its fd.

    `devices`: paths of 255 bytes at most. Raises MountError, which begins with `what`.
    """
    with contextlib.ExitStack() as opened:
        context = _call(_FSOPEN, b"erofs", _CLOEXEC, what=f"{what}: fsopen")
        opened.callback(os.close, context)
        source = bootstrap
        if len(os.fsencode(bootstrap)) > _STRING_MOST:
            try:
                source = by_number(bootstrap, opened)
            except OSError as e:
                raise MountError(f"{what}: {bootstrap}: {e.strerror}") from e
        _call(_FSCONFIG, context, _SET_FLAG, b"ro", None, 0, what=f"{what}: read-only")
        _call(_FSCONFIG, context, _SET_STRING, b"source", os.fsencode(source), 0, what=f"{what}: {bootstrap}")
        for device in devices:
            _call(_FSCONFIG, context, _SET_STRING, b"device", os.fsencode(device), 0, what=f"{what}: {device}")
        _call(_FSCONFIG, context, _CREATE, None, None, 0, what=f"{what}: mounting {bootstrap} as EROFS")
        flags = _RDONLY | _NOSUID | _NODEV | _NOATIME
        return _call(_FSMOUNT, context, _CLOEXEC, flags, what=f"{what}: fsmount")


def by_number(path: str, opened: contextlib.ExitStack) -> str:
    """What this process may call a file, whatever its path is, as long as `opened` is not closed. Raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return f"/proc/self/fd/{fd}"


def attach(mount: int, place: int, what: str, *, beneath: bool = False) -> None:
    """Have a mount be seen at the folder that `place` is open on; or below the mount that is there. Raises MountError."""
    flags = _FROM_EMPTY | _TO_EMPTY | (_BENEATH if beneath else 0)
    _call(_MOVE_MOUNT, mount, b"", place, b"", flags, what=f"{what}: move_mount")


def open_below(folder: int, path: str) -> int:
    """An O_PATH fd of a folder below another: no symbolic link on the way, nothing above it. Raises OSError.

    Name by name: openat2(2) is not there for services (systemd's RestrictSUIDSGID refuses it, for it cannot see its flags).
    """
    at = os.dup(folder)
    for name in path.split("/"):
        try:
            if name == "..":
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        finally:
            os.close(at)
        at = below
    return at


def _call(number: int, *arguments: object, what: str) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise MountError(f"{what}: {why(ctypes.get_errno())}")
    return result


def why(code: int) -> str:
    """What an errno of a mount means."""
    if code == errno.ENODEV:
        return "this kernel has no EROFS"
    if code == errno.ENOTBLK:
        return "this kernel mounts EROFS from block devices only: it must be 6.12 or later"
    return os.strerror(code)

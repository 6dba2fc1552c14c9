"""Turning `--mountpoint` into the path that is mounted, without touching a file system that may be dead or stopped.

After a crash the mount of the daemon before us can still be there, and any access to its root would hang until we serve
it. So symbolic links are resolved with readlink(2), which only looks the name up in the folder above, and the last
component is asked for its type only when nothing of FUSE is mounted on it.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from nydusd.errors import ConfigError

_MAX_LINKS: Final = 40


def resolve_mountpoint(given: str) -> str:
    """The absolute path without symbolic links. Raises `ConfigError` if it is not an existing folder."""
    if not given or "\0" in given:
        raise ConfigError(f"--mountpoint: {given!r} is not a path")
    path = os.path.abspath(given)
    try:
        for _ in range(_MAX_LINKS):
            path = os.path.join(os.path.realpath(os.path.dirname(path), strict=True), os.path.basename(path))
            target = _link_target(path)
            if target is None:
                break
            path = os.path.normpath(os.path.join(os.path.dirname(path), target))
        else:
            raise ConfigError(f"--mountpoint {given}: too many symbolic links")
        if not has_fuse_mount(path) and not stat.S_ISDIR(os.stat(path).st_mode):
            raise ConfigError(f"--mountpoint {given}: must be a folder")
    except OSError as error:
        raise ConfigError(f"--mountpoint {given}: must be an existing folder: {error.strerror}") from error
    return path


def has_fuse_mount(path: str) -> bool:
    """Whether a FUSE file system is mounted exactly at this absolute path, by /proc/self/mountinfo alone."""
    wanted = os.fsencode(path)
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields, _, kind = line.partition(b" - ")
            if _unescape(fields.split(b" ")[4]) == wanted and kind.split(b" ")[0].startswith(b"fuse"):
                return True
    return False


def _link_target(path: str) -> str | None:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        raise
    except OSError:  # EINVAL: not a link. Anything else about it shows when it is asked for its type.
        return None


def _unescape(text: bytes) -> bytes:
    """The kernel writes space, tab, newline and backslash as three octal digits."""
    for code in (b"\\040", b"\\011", b"\\012", b"\\134"):
        text = text.replace(code, bytes([int(code[1:], 8)]))
    return text

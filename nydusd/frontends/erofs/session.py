"""EROFS mounts over cache files: mounts of one file system each, made, unmounted and told apart; and what all of them share.

Runs in the supervisor. The fds that must outlive it (`Fds`) are held by the guard as well, under the same numbers; a supervisor
that finds the guard of a killed predecessor takes them from there, and readers notice nothing.

What holds after SIGKILL: a mount is in the table before it is made; after that the group lives on in guard and front end, and
whoever reads what is not there waits. The private mounts through which EROFS reads live as long as it does.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import NamedTuple

from nydusd import points
from nydusd.errors import MountError, cache_error
from nydusd.frontends.fuse.session import MNT_DETACH, resolve_mountpoint, umount
from nydusd.storage.state.segment import Identity

from . import fanotify, journal, mount_api, table

_TRIES = 32
"""How often a file system is made until no other one is made in the same millisecond. After that its name is not sure."""


class Fds(NamedTuple):
    """What the guard holds, too: the fanotify group, the journal of its events, the table of mounts."""

    group: int
    journal: int
    table: int

    @classmethod
    def make(cls) -> Fds:
        """Raises MountError."""
        group = fanotify.open_group()
        try:
            return cls(group, journal.create(), table.create())
        except OSError as e:
            os.close(group)
            raise MountError(f"memory for the mounts: {e.strerror}") from e

    def close(self) -> None:
        for fd in self:
            with contextlib.suppress(OSError):
                os.close(fd)


class Range(NamedTuple):
    """A device of the file system: a range of a cache file.

    `file`: which one is meant (`Identity.file`), whatever has its path now.
    """

    path: str
    file: tuple[int, int, int]


def make(group: int, bootstrap: str, ranges: Sequence[Range], what: str) -> tuple[int, tuple[str, ...]]:
    """An EROFS, seen nowhere yet, that reads each range through a private mount, which is marked.

    Also where nothing is missing: it may not be on its disk yet (`synced.py`).

    Gives its fd, and what the kernel calls it. That is only to be seen by what is there that was not before: if there is more
    than one, somebody else has made another meanwhile, and ours is made again. Raises MountError, which begins with `what`.
    """
    trees: list[int] = []
    try:
        for path, file in ranges:
            trees.append(fanotify.private_mount(path))
            _check_file(trees[-1], path, file)
            fanotify.watch(group, trees[-1])
        points.reach("erofs: prepared")
        for left in reversed(range(_TRIES)):
            before = table.instances()
            mount = mount_api.make_erofs(bootstrap, map(fanotify.path_of, trees), what)
            names = tuple(name for name in table.instances() if name not in before)
            if len(names) <= 1 or not left:
                return mount, names
            os.close(mount)
        raise AssertionError
    finally:
        for tree in trees:
            os.close(tree)


def _check_file(tree: int, path: str, file: tuple[int, int, int]) -> None:
    """Raises MountError when a private mount is not of this file: what is said of its ranges was said of another one."""
    try:
        fd = os.open(fanotify.path_of(tree), os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = Identity.of(fd, 0).file
        finally:
            os.close(fd)
    except OSError as e:
        raise MountError(f"{path}: {e.strerror}") from e
    if found != file:
        raise MountError(f"{path}: it was deleted or replaced while it was mounted")


def mount_erofs(mountpoint: str, bootstrap: str, devices: Sequence[str]) -> None:
    """Mount a metadata file over the files that are its blobs, in the order of its table. Raises MountError.

    Not by mount(2): its options end with a page, which is forty blobs of a long path, and a path may have a comma.
    """
    with contextlib.ExitStack() as opened:
        try:
            place = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, place)
            files = [mount_api.by_number(device, opened) for device in devices]
        except OSError as e:
            raise MountError(f"{mountpoint}: {e.filename}: {e.strerror}") from e
        mount = mount_api.make_erofs(bootstrap, files, mountpoint)
        opened.callback(os.close, mount)
        mount_api.attach(mount, place, mountpoint)


def unmount_erofs(mountpoint: str) -> None:
    """Unmount the EROFS at this path, lazily when somebody uses it; none there is no error. Raises MountError."""
    if not top_is_erofs(mountpoint):
        return
    code = umount(resolve_mountpoint(mountpoint), 0)
    if code == errno.EBUSY:
        code = umount(resolve_mountpoint(mountpoint), MNT_DETACH)
    if code not in (0, errno.EINVAL, errno.ENOENT):
        raise MountError(f"{mountpoint}: umount: {os.strerror(code)}")


def detach(mountpoint: str) -> None:
    """Take the mount at this path out of sight, whoever uses it. Raises MountError."""
    code = umount(resolve_mountpoint(mountpoint), MNT_DETACH)
    if code:
        raise MountError(f"{mountpoint}: umount: {os.strerror(code)}")


def is_seen(mountpoint: str, device: str) -> bool:
    """Whether it is the EROFS of this number (`major:minor`) that is seen at this path, mounted there.

    The number alone says little: that of one that is gone is given to the next file system, of whichever kind. Raises as
    `top_mount`.
    """
    try:
        number = os.stat(mountpoint, follow_symlinks=False).st_dev
    except OSError:
        return False
    return f"{os.major(number)}:{os.minor(number)}" == device == top_mount(resolve_mountpoint(mountpoint))


def top_is_erofs(mountpoint: str) -> bool:
    """Whether an EROFS is mounted at exactly this path."""
    return top_mount(resolve_mountpoint(mountpoint)) is not None


def is_mounted(mountpoint: str, device: str) -> bool:
    """Whether the EROFS of this number is mounted at exactly this path, also below what others have mounted there since.

    Raises as `top_mount`.
    """
    return device in _mounts_at(resolve_mountpoint(mountpoint))


def top_mount(mountpoint: str) -> str | None:
    """`major:minor` of the file system last mounted at exactly this path, if it is an EROFS.

    Raises CacheError when that cannot be told, ScarceError when it cannot now: it is not to be taken for none.
    """
    found = _mounts_at(mountpoint)
    return found[-1] if found else None


def _mounts_at(mountpoint: str) -> list[str | None]:
    """What is mounted at exactly this path, the last one on top: None for what is no EROFS. Raises as `top_mount`."""
    wanted = mountpoint
    for char, code in (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012")):
        wanted = wanted.replace(char, code)
    found = []
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                left, _, right = line.partition(" - ")
                fields = left.split(" ")
                if len(fields) > 4 and fields[4] == wanted:
                    found.append(fields[2] if right.startswith("erofs ") else None)
    except OSError as e:
        raise cache_error("/proc/self/mountinfo", e) from e
    return found

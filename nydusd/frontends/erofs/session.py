"""An EROFS mount over cache files that are not complete: its fanotify group, its private mounts, mount(2) and umount2(2).

Runs in the supervisor. All fds that must outlive it are held by the guard as well, under the same numbers; a supervisor that
finds the guard of a killed predecessor takes them from there, and readers notice nothing.

What holds after SIGKILL: before mount(2) nothing is seen; after it the group and the private mounts live on in the guard and
the front end, and whoever reads what is not there waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nydusd import points
from nydusd.errors import MountError, NydusError
from nydusd.frontends.fuse.session import MS_NOATIME, MS_NODEV, MS_NOSUID, MS_RDONLY, resolve_mountpoint

from . import fanotify, journal, record
from .record import Record

MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Fds:
    """What the guard holds, too. `trees` are the private mounts of the cache files, in the order of blobs."""

    group: int
    journal: int
    record: int
    trees: list[int]

    def all(self) -> list[int]:
        return [self.group, self.journal, self.record, *self.trees]

    def close(self) -> None:
        for fd in self.all():
            with contextlib.suppress(OSError):
                os.close(fd)
        self.trees.clear()


class ErofsSession:
    """Made by `prepare`, then `mount`; or by `adopt` from what a killed daemon has left mounted."""

    def __init__(self, fds: Fds, known: Record) -> None:
        self.fds = fds
        self.record = known

    @classmethod
    def prepare(
        cls, mountpoint: str, bootstrap: str, identity: str, files: Sequence[str], complete: Sequence[bool]
    ) -> ErofsSession:
        """Make and mark all that `mount` needs; `complete` says of which cache files nothing is missing. Raises MountError."""
        fds = Fds(-1, -1, -1, [])
        try:
            fds.group = fanotify.open_group()
            fds.journal = journal.create()
            fds.record = record.create()
            facts = []
            for path, whole in zip(files, complete, strict=True):
                fds.trees.append(fanotify.private_mount(path))
                st = os.stat(fanotify.path_of(fds.trees[-1]))
                facts.append((st.st_dev, st.st_ino))
                if not whole:
                    fanotify.watch(fds.group, fds.trees[-1])
            known = Record(resolve_mountpoint(mountpoint), identity, bootstrap, tuple(facts), record.instances())
            record.write(fds.record, known)
            points.reach("erofs: prepared")
        except OSError as e:
            fds.close()
            raise MountError(f"{mountpoint}: cannot prepare the mount: {e.filename or ''} {e.strerror}") from e
        except NydusError:
            fds.close()
            raise
        return cls(fds, known)

    @classmethod
    def adopt(cls, fds: Fds) -> ErofsSession:
        """What a predecessor has left, mounted or not. Raises FormatError when its record cannot be read."""
        session = cls(fds, record.read(fds.record))
        if session.record.names is None:
            session._note()
        return session

    @property
    def mounted(self) -> bool:
        """Whether it is this file system that is seen at the mount point."""
        top = _top_mount(self.record.mountpoint)
        return top is not None and bool(self.record.device) and top == self.record.device

    def mount(self) -> None:
        """mount(2). The guard must hold the fds by now. Raises MountError."""
        devices = [fanotify.path_of(tree) for tree in self.fds.trees]
        try:
            mount_erofs(self.record.mountpoint, self.record.bootstrap, devices)
            points.reach("erofs: mounted")
        except MountError:
            self.record = replace(self.record, names=())  # or what others mount meanwhile would pass for ours
            record.write(self.fds.record, self.record)
            raise
        self._note()
        points.reach("erofs: noted")
        self.record.set_read_ahead(incomplete=True)

    def _note(self) -> None:
        """Write down what mount(2) has made."""
        settled = self.record.settled()
        device = _top_mount(settled.mountpoint) if settled.names else None
        self.record = replace(settled, device=device or "")
        record.write(self.fds.record, self.record)

    def unmount(self) -> bool:
        """Unmount, lazily when somebody uses it. True when the file system is gone; else its group must live on.

        Raises MountError when it cannot be unmounted.
        """
        if self.mounted:
            unmount_erofs(self.record.mountpoint)
            points.reach("erofs: unmounted")
        if not self.record.is_alive():
            return True
        self.record = replace(self.record, ended=True)
        record.write(self.fds.record, self.record)
        return False


def mount_erofs(mountpoint: str, bootstrap: str, devices: Sequence[str]) -> None:
    """mount(2) of a metadata file over the files that are its blobs, in the order of its table. Raises MountError."""
    options = ",".join(f"device={device}" for device in devices)
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME
    arguments = (os.fsencode(bootstrap), os.fsencode(mountpoint), b"erofs", ctypes.c_ulong(flags), options.encode())
    if _libc.mount(*arguments) != 0:
        raise MountError(f"{mountpoint}: mounting {bootstrap} as EROFS: {_why(ctypes.get_errno())}")


def unmount_erofs(mountpoint: str) -> None:
    """Unmount the EROFS at this path, lazily when somebody uses it; none there is no error. Raises MountError."""
    if not top_is_erofs(mountpoint):
        return
    code = _umount(resolve_mountpoint(mountpoint), 0)
    if code == errno.EBUSY:
        code = _umount(resolve_mountpoint(mountpoint), MNT_DETACH)
    if code not in (0, errno.EINVAL, errno.ENOENT):
        raise MountError(f"{mountpoint}: umount: {os.strerror(code)}")


def detach(mountpoint: str) -> None:
    """Take the mount at this path out of sight, whoever uses it. Raises MountError."""
    code = _umount(resolve_mountpoint(mountpoint), MNT_DETACH)
    if code:
        raise MountError(f"{mountpoint}: umount: {os.strerror(code)}")


def top_is_erofs(mountpoint: str) -> bool:
    """Whether an EROFS is mounted at exactly this path."""
    return _top_mount(resolve_mountpoint(mountpoint)) is not None


def _top_mount(mountpoint: str) -> str | None:
    """`major:minor` of the file system last mounted at exactly this path, if it is an EROFS."""
    wanted = mountpoint
    for char, code in (("\\", "\\134"), (" ", "\\040"), ("\t", "\\011"), ("\n", "\\012")):
        wanted = wanted.replace(char, code)
    top = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            left, _, right = line.partition(" - ")
            fields = left.split(" ")
            if len(fields) > 4 and fields[4] == wanted:
                top = fields[2] if right.startswith("erofs ") else None
    return top


def _umount(mountpoint: str, flags: int) -> int:
    """umount2(2); 0 or the errno."""
    return 0 if _libc.umount2(os.fsencode(mountpoint), flags | UMOUNT_NOFOLLOW) == 0 else ctypes.get_errno()


def _why(code: int) -> str:
    if code == errno.ENODEV:
        return "this kernel has no EROFS"
    if code == errno.ENOTBLK:
        return "this kernel mounts EROFS from block devices only: it must be 6.12 or later"
    return os.strerror(code)

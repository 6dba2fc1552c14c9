"""The kernel side of a FUSE mount: mount(2), the INIT exchange, clones of the session's fd, umount2(2).

Runs in the supervisor. It holds the session's fd and the fd of every clone for as long as the mount lives: the kernel
fails the requests that a clone had taken when its *last* fd is closed, so a front end that dies by SIGKILL loses nothing
while the supervisor keeps its own copy: give the same lane to a successor, and the readers get their bytes. If the
supervisor itself is killed, the front ends' copies keep the mount serving what is cached.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import select
import subprocess
import sys
from typing import NamedTuple

from nydusd.errors import MountError

from . import journal
from . import protocol as p

log = logging.getLogger(__name__)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME = 1, 2, 4, 1024
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

MAX_BACKGROUND = 65535
MAX_WRITE = 4096
"""The least the kernel takes; nothing is ever written, and a small one keeps the request buffers small."""

_WANTED = (
    p.ASYNC_READ  # and not ASYNC_DIO: with it, who waits in a direct read(2) cannot even be killed
    | p.DO_READDIRPLUS  # not READDIRPLUS_AUTO: an entry more in a listing costs less than the lookup it saves
    | p.NO_OPEN_SUPPORT
    | p.NO_OPENDIR_SUPPORT
    | p.PARALLEL_DIROPS
    | p.MAX_PAGES
    | p.CACHE_SYMLINKS
    | p.EXPLICIT_INVAL_DATA  # and not AUTO_INVAL_DATA: an image never changes, so cached pages are never stale
    | p.ABORT_ERROR
    | p.INIT_EXT
    | p.HAS_RESEND
)

_libc = ctypes.CDLL(None, use_errno=True)


class Negotiated(NamedTuple):
    """What INIT settled. `flags` holds all 64 bits; both sides agreed on them."""

    minor: int
    flags: int
    max_readahead: int


class Lane(NamedTuple):
    """The fds of one front end: its clone, its journal, and the pipe by which its siblings pass on interrupts.

    The kernel hands FUSE_INTERRUPT to whichever clone reads first, not to the one that has the request: a front end that
    gets one for a request it does not know writes its `unique` to `interrupt_out` of all others.
    """

    fd: int
    journal: int
    interrupt_in: int
    interrupt_out: int


class Session:
    """A FUSE mount and its fds. Made by `mount` or, after a takeover, by `adopt`."""

    def __init__(self, mountpoint: str, fd: int, negotiated: Negotiated, device: str) -> None:
        self.mountpoint = mountpoint
        self.fd = fd
        self.negotiated = negotiated
        self.device = device
        """`major:minor` of the mount, as in /proc/self/mountinfo: how our mount is told from another at the same place."""
        self.lanes: list[Lane] = []

    @classmethod
    def mount(cls, mountpoint: str, *, read_ahead_kib: int | None = None) -> Session:
        """Mount a read-only file system at `mountpoint` and answer the kernel's INIT, so that front ends never see one.

        `read_ahead_kib` sets the mount's read-ahead (the kernel's default is 128); where the kernel does not let us, that
        is only logged. Raises MountError.
        """
        mountpoint = resolve_mountpoint(mountpoint)
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise MountError(
                f"/dev/fuse: {exc.strerror}: is the fuse module loaded, and may this process open it?"
            ) from exc
        try:
            _mount(mountpoint, fd)
            try:
                negotiated = _exchange_init(fd)
                device = _our_device(mountpoint)
            except BaseException:
                umount(mountpoint, MNT_DETACH)
                raise
        except BaseException:
            os.close(fd)
            raise
        session = cls(mountpoint, fd, negotiated, device)
        if read_ahead_kib is not None:
            session._set_read_ahead(read_ahead_kib)
        return session

    @classmethod
    def adopt(cls, mountpoint: str, fd: int, negotiated: Negotiated) -> Session:
        """Take over a mounted session whose fd came from a predecessor; INIT was answered there and never comes again.

        Raises MountError when no FUSE file system is mounted at `mountpoint`. The fd is closed only by `close`.
        """
        mountpoint = resolve_mountpoint(mountpoint)
        os.set_inheritable(fd, False)
        return cls(mountpoint, fd, negotiated, _our_device(mountpoint))

    def open_lanes(self, count: int) -> list[Lane]:
        """Make the fds of `count` front ends, held here until `close`. Raises MountError."""
        for _ in range(count):
            reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self.lanes.append(Lane(-1, -1, reader, writer))
            self.lanes[-1] = Lane(-1, journal.create(), reader, writer)
            self.lanes[-1] = self.lanes[-1]._replace(fd=clone(self.fd, self.mountpoint))
        return self.lanes[-count:] if count else []

    def unmount(self) -> None:
        """Unmount; lazily when the mount is in use; silently when it is gone already or another took its place.

        Raises MountError for any other failure.
        """
        top = _top_mount(self.mountpoint)
        # The number of the device of a mount that is gone may be given to the next.
        if self.is_over() or top is None or top.device != self.device:
            return
        code = umount(self.mountpoint, 0)
        if code == errno.EBUSY:
            code = umount(self.mountpoint, MNT_DETACH)
        if code not in (0, errno.EINVAL, errno.ENOENT):
            raise MountError(f"{self.mountpoint}: umount: {os.strerror(code)}")

    def close(self) -> None:
        """Close all fds held here. If no front end holds one either, whoever still uses the mount gets ENOTCONN."""
        for lane in self.lanes:
            for fd in lane:
                if fd >= 0:
                    os.close(fd)
        self.lanes.clear()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def is_over(self) -> bool:
        """Whether the file system is unmounted for good. Not so if it was aborted by hand: it is dead then, but mounted."""
        poll = select.poll()
        poll.register(self.fd, 0)
        if not any(events & select.POLLERR for _, events in poll.poll(0)):
            return False
        try:
            os.read(self.fd, p.MAX_READ)
        except OSError as e:
            return e.errno == errno.ENODEV
        return False

    def _set_read_ahead(self, kib: int) -> None:
        path = f"/sys/class/bdi/{self.device}/read_ahead_kb"
        try:
            with open(path, "w") as knob:
                knob.write(str(kib))
        except OSError as exc:
            log.warning("%s: cannot set the read-ahead of %s: %s", path, self.mountpoint, exc.strerror)


def clone(of: int, mountpoint: str) -> int:
    """A new fd that reads requests of the same session beside the others. The caller owns it. Raises MountError."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, p.DEV_IOC_CLONE, array.array("I", [of]))
    except OSError as exc:
        os.close(fd)
        raise MountError(f"{mountpoint}: FUSE_DEV_IOC_CLONE: {exc.strerror}") from exc
    return fd


def resolve_mountpoint(path: str) -> str:
    """The absolute path with symbolic links resolved, without a request to a file system mounted at that very path.

    stat(2) of a mount whose daemon is gone can block for ever; readlink(2) of its root fails at once.
    """
    path = os.path.abspath(path)
    for _ in range(40):
        parent, name = os.path.split(path)
        path = os.path.join(os.path.realpath(parent), name)
        try:
            target = os.readlink(path)
        except OSError:
            return path
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    raise MountError(f"{path}: too many symbolic links")


def mounted_device(mountpoint: str) -> str | None:
    """`major:minor` of the FUSE file system that is mounted here, None if there is none."""
    top = _top_mount(resolve_mountpoint(mountpoint))
    return top.device if top is not None and top.fs_type == "fuse" else None


def is_held(mountpoint: str, device: str, *, patience: float = 0.5) -> bool:
    """Whether the FUSE file system with this device is mounted here, nobody serves it, and somebody holds its session."""
    top = _top_mount(resolve_mountpoint(mountpoint))
    return top is not None and top.fs_type == "fuse" and top.device == device and _probe(mountpoint, patience) is None


def clear_stale_mount(mountpoint: str, *, patience: float = 2.0) -> bool:
    """Detach FUSE mounts at `mountpoint` whose daemon is gone for good. True if there was one.

    A mount that answers, or that neither answers nor fails within `patience` seconds (its fd is held somewhere, so a
    takeover can still revive it), is left alone and raises MountError. This process itself never touches the mount,
    which might block it for ever: a child asks for its statfs.
    """
    mountpoint = resolve_mountpoint(mountpoint)
    cleared = False
    while (top := _top_mount(mountpoint)) is not None and top.fs_type == "fuse":
        state = _probe(mountpoint, patience)
        if state == 0:
            raise MountError(
                f"{mountpoint}: a FUSE file system ({top.source}) is mounted here already: unmount it first"
            )
        if state is None:
            from .holders import holders_of, told

            raise MountError(
                f"{mountpoint}: the FUSE file system ({top.source}) mounted here does not answer, but its session is still"
                f" held open: take it over, or unmount it with umount -l. It is held by {told(holders_of(top.device))}"
            )
        if state not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountError(f"{mountpoint}: the FUSE file system mounted here: {os.strerror(state)}")
        code = umount(mountpoint, MNT_DETACH)
        if code not in (0, errno.EINVAL, errno.ENOENT):
            raise MountError(f"{mountpoint}: cannot detach the dead mount: {os.strerror(code)}")
        log.warning("%s: detached a dead FUSE mount", mountpoint)
        cleared = True
    return cleared


def _probe(mountpoint: str, patience: float) -> int | None:
    """errno of statfs(2) in a child, 0 for success, None when it did not return in time."""
    code = "import os,sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as e: os._exit(e.errno)\nos._exit(0)"
    child = subprocess.Popen([sys.executable, "-ISc", code, mountpoint], cwd="/", stdin=subprocess.DEVNULL)
    try:
        return child.wait(patience)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a request that was taken and is not answered
            child.wait(patience)
        return None


def _mount(mountpoint: str, fd: int) -> None:
    options = (
        "default_permissions,allow_other,"
        f"max_read={p.MAX_READ},user_id={os.geteuid()},group_id={os.getegid()},rootmode=40000,fd={fd}"
    )
    flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME
    if _libc.mount(b"rafs", os.fsencode(mountpoint), b"fuse", ctypes.c_ulong(flags), options.encode()) != 0:
        code = ctypes.get_errno()
        needs = ": it needs root (CAP_SYS_ADMIN)" if code == errno.EPERM else ""
        raise MountError(f"{mountpoint}: mount: {os.strerror(code)}{needs}")


def umount(mountpoint: str, flags: int) -> int:
    """umount2(2), of no symbolic link; 0 or the errno."""
    return 0 if _libc.umount2(os.fsencode(mountpoint), flags | UMOUNT_NOFOLLOW) == 0 else ctypes.get_errno()


def _exchange_init(fd: int) -> Negotiated:
    """Read the kernel's INIT, the first request of a session, and answer it. Raises MountError."""
    try:
        request = os.read(fd, max(p.MIN_READ_BUFFER, p.MAX_READ))
    except OSError as exc:
        raise MountError(f"FUSE_INIT was not received: {exc.strerror}") from exc
    reply, negotiated = init_reply(request)
    try:
        os.write(fd, reply)
    except OSError as exc:
        raise MountError(f"FUSE_INIT: the kernel refused the answer: {exc.strerror}") from exc
    return negotiated


def init_reply(request: bytes) -> tuple[bytes, Negotiated]:
    """The answer to an INIT request and what it settles. Raises MountError when this kernel cannot be served."""
    if len(request) < p.IN_HEADER.size + p.INIT_IN.size:
        raise MountError(f"FUSE_INIT: {len(request)} bytes are too few")
    _, opcode, unique, _, _ = p.REQUEST.unpack_from(request, 0)
    major, minor, max_readahead, offered = p.INIT_IN.unpack_from(request, p.IN_HEADER.size)
    if opcode != p.INIT or major != p.KERNEL_VERSION or minor < p.OLDEST_MINOR_VERSION:
        raise MountError(
            f"FUSE_INIT: opcode {opcode}, version {major}.{minor}; need INIT of 7.{p.OLDEST_MINOR_VERSION} on"
        )
    after = p.IN_HEADER.size + p.INIT_IN.size
    if offered & p.INIT_EXT and len(request) >= after + p.INIT_IN_EXT.size:
        offered |= p.INIT_IN_EXT.unpack_from(request, after)[0] << 32
    flags = offered & _WANTED
    minor = min(minor, p.KERNEL_MINOR_VERSION)
    body = p.INIT_OUT.pack(
        p.KERNEL_VERSION,
        minor,
        max_readahead,
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        MAX_WRITE,
        1,  # time_gran: mtimes are in nanoseconds
        p.PAGES_A_REQUEST,
        0,
        flags >> 32,
        0,
        0,
    )
    header = p.OUT_HEADER.pack(p.OUT_HEADER.size + len(body), 0, unique)
    return header + body, Negotiated(minor, flags, max_readahead)


class _MountEntry(NamedTuple):
    device: str
    fs_type: str
    source: str


def _top_mount(mountpoint: str) -> _MountEntry | None:
    """The mount last made at exactly this path, from /proc/self/mountinfo."""
    wanted = os.fsencode(mountpoint)
    top: _MountEntry | None = None
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            left, _, right = line.partition(b" - ")
            fields, tail = left.split(b" "), right.split(b" ")
            if len(fields) < 5 or len(tail) < 2 or _unescape(fields[4]) != wanted:
                continue
            top = _MountEntry(fields[2].decode(), tail[0].decode(), os.fsdecode(_unescape(tail[1])))
    return top


def _unescape(field: bytes) -> bytes:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    for code, char in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        field = field.replace(code, char)
    return field


def _our_device(mountpoint: str) -> str:
    top = _top_mount(mountpoint)
    if top is None or top.fs_type != "fuse":
        raise MountError(f"{mountpoint}: no FUSE file system is mounted here")
    return top.device

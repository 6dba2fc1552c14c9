"""/dev/cachefiles, open: the kernel's cache as one process of ours serves it.

Held by the supervisor, which answers, and by the guard, which does nothing while the supervisor lives. When its last
descriptor is closed the cache is dead: whoever reads what is not in the page cache gets an error (ENOBUFS), never zeros, until
the file system is mounted anew.
"""

from __future__ import annotations

import errno
import fcntl
import os

from nydusd.errors import MountError

from . import messages

PATH = "/dev/cachefiles"


class CacheDevice:
    """`fd` is not inheritable and does not block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def begin(cls, folder: str, tag: str | None) -> CacheDevice:
        """Open the device and bind the cache folder to it. Raises MountError, and FormatError for a strange name."""
        try:
            device = cls(os.open(PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise BusyError(f"{PATH}: another process has it open: one daemon a machine can serve fscache") from e
            raise MountError(f"{PATH}: {e.strerror}") from e
        command = b""
        try:
            for command in messages.setup(folder, tag):
                os.write(device.fd, command)
        except OSError as e:
            device.close()
            more = ""
            if e.errno == errno.EOPNOTSUPP:
                more = "; the folder must be on ext4 or xfs, and the kernel must have CONFIG_CACHEFILES_ONDEMAND"
            raise MountError(f"{PATH}: `{command.decode(errors='replace')}`: {e.strerror}{more}") from e
        except BaseException:
            device.close()
            raise
        return device

    def restore(self) -> bool:
        """Have the kernel say again what nobody has answered; False where it cannot."""
        try:
            os.write(self.fd, messages.RESTORE)
        except OSError:
            return False
        return True

    def read(self) -> bytes:
        """The next message, empty if there is none now. Raises OSError.

        The descriptor that an OPEN brings is inheritable, as the kernel makes it.
        """
        try:
            return os.read(self.fd, messages.READ_SIZE)
        except BlockingIOError:
            return b""

    def opened(self, number: int, size: int) -> bool:
        """Answer an OPEN: the file's size, or a negative errno. False if nobody waits for it any more."""
        try:
            os.write(self.fd, messages.copen(number, size))
        except OSError:
            return False
        return True

    def close(self) -> None:
        os.close(self.fd)


class BusyError(MountError):
    """Another process has the device open."""


def completed(fd: int, number: int) -> bool:
    """Answer a READ: what is in the file by now is there. False if nobody waits for it any more."""
    try:
        fcntl.ioctl(fd, messages.READ_COMPLETE, number)
    except OSError:
        return False
    return True


def lacks(fd: int, offset: int, end: int) -> bool:
    """Whether a hole of the kernel's file begins before `end`, from `offset` on. Raises OSError."""
    return offset < end and os.lseek(fd, offset, os.SEEK_HOLE) < end

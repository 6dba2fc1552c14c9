"""Having the kernel forget what it knows of a FUSE mount. Runs in the supervisor; nothing here waits for a front end.

Needed only where a folder of an image turns into something else: another image is mounted on it or taken away, or the image
at the root is. All other places where mounts come and go are looked up anew at each use (see `pseudo`). FUSE_NOTIFY_INVAL_ENTRY
is not used: it waits for the lock of the folder, which whoever looks something up there holds until a front end
has answered, and the front end may be dead and wait for the supervisor.
"""

from __future__ import annotations

import ctypes
import logging
import os

from . import protocol as p
from .session import MS_NOATIME, MS_NODEV, MS_NOSUID, MS_RDONLY

log = logging.getLogger(__name__)

MS_REMOUNT = 32
_libc = ctypes.CDLL(None, use_errno=True)


def forget_names(mountpoint: str) -> None:
    """Drop all names that nobody uses now: a mount with its own options once more (MS_REMOUNT) does that.

    A name that is in use at this moment (a folder that somebody is in) stays until it is not.
    """
    flags = MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOATIME
    if _libc.mount(b"rafs", os.fsencode(mountpoint), b"fuse", ctypes.c_ulong(flags), None) != 0:
        log.warning("%s: the kernel may show old names: %s", mountpoint, os.strerror(ctypes.get_errno()))


def forget_attributes(fd: int, node: int, what: str) -> None:
    """Have the attributes of a node asked for anew, and with them the listing of a folder."""
    body = p.NOTIFY_INVAL_INODE_OUT.pack(node, -1, 0)
    try:
        os.write(fd, p.OUT_HEADER.pack(p.OUT_HEADER.size + len(body), p.NOTIFY_INVAL_INODE, 0) + body)
    except FileNotFoundError:
        pass  # it does not know the node
    except OSError as e:
        log.warning("%s: the kernel may show old attributes: %s", what, e.strerror)

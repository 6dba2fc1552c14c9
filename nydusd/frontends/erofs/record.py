"""What is known of an EROFS mount of ours, in memory that outlives the supervisor: one memfd, held by the guard as well.

Written by the supervisor, read by the guard, by a front end that is left alone, and by the next supervisor. Written to the
half that is not in use, then one store of eight bytes makes it the other: after SIGKILL either the old or the new is there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from struct import Struct
from struct import error as StructError
from typing import Any

from nydusd.errors import FormatError

log = logging.getLogger(__name__)

_HEAD = Struct("=II")
"""Half (0 or 1), length."""
_HALF = 1 << 20
_BDI = "/sys/class/bdi"
_KIND = "erofs-"
_READ_AHEAD_KIB = 2048
"""While a blob is incomplete: each page that is not in the page cache asks us, so that few large reads are better."""
_READ_AHEAD_USUAL_KIB = 128


@dataclass(frozen=True, slots=True)
class Record:
    """`identity` names the metadata, `files` are (device, inode) of each blob's cache file, in the order of blobs.

    `before` are the kernel's EROFS instances that were there before ours was made; `names` are ours, None while it is not
    known whether ours was made. `device` is the mount's `major:minor`. `ended`: the daemon was stopped, not killed.
    """

    mountpoint: str
    identity: str
    bootstrap: str
    files: tuple[tuple[int, int], ...]
    before: tuple[str, ...]
    names: tuple[str, ...] | None = None
    device: str = ""
    ended: bool = False

    def settled(self) -> Record:
        """The same, `names` filled in by a look at what is there now."""
        if self.names is not None:
            return self
        return replace(self, names=tuple(name for name in instances() if name not in self.before))

    def is_alive(self) -> bool:
        """Whether somebody uses the file system still, here or in another mount namespace."""
        names = self.settled().names
        return names is None or any(os.path.exists(f"{_BDI}/{name}") for name in names)

    def set_read_ahead(self, incomplete: bool) -> None:
        """Set the file system's read-ahead; where that cannot be it is only logged."""
        set_read_ahead(self.settled().names or (), _READ_AHEAD_KIB if incomplete else _READ_AHEAD_USUAL_KIB)


def set_read_ahead(names: Iterable[str], kib: int = _READ_AHEAD_KIB) -> None:
    """The same for instances by their names."""
    for name in names:
        path = f"{_BDI}/{name}/read_ahead_kb"
        try:
            with open(path, "w") as knob:
                knob.write(str(kib))
        except OSError as e:
            log.warning("%s: the read-ahead cannot be set: %s", path, e.strerror)


def instances() -> tuple[str, ...]:
    """The EROFS instances without a block device, as the kernel numbers them; no number is used twice."""
    return tuple(name for name in os.listdir(_BDI) if name.startswith(_KIND))


def create() -> int:
    """An empty record's fd, not inheritable. The caller closes it. Raises OSError."""
    fd = os.memfd_create("nydusd-mount", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096 + 2 * _HALF)
    return fd


def write(fd: int, record: Record) -> None:
    """Raises OSError."""
    content = json.dumps(asdict(record)).encode()
    half = 1 - _HEAD.unpack(os.pread(fd, _HEAD.size, 0))[0]
    os.pwrite(fd, content, 4096 + half * _HALF)
    os.pwrite(fd, _HEAD.pack(half, len(content)), 0)


def read(fd: int) -> Record:
    """Raises FormatError when there is none, or one of another version."""
    head = os.pread(fd, _HEAD.size, 0)
    try:
        half, length = _HEAD.unpack(head)
        raw: dict[str, Any] = json.loads(os.pread(fd, length, 4096 + half * _HALF))
        files = tuple((int(device), int(inode)) for device, inode in raw.pop("files"))
        names = raw.pop("names")
        before = tuple(raw.pop("before"))
        return Record(**raw, files=files, before=before, names=None if names is None else tuple(names))
    except (ValueError, KeyError, TypeError, StructError) as e:
        raise FormatError("mount record", "content", f"cannot be read: {e}") from e

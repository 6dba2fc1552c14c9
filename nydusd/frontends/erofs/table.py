"""What of a daemon the kernel's EROFS has mounted, in memory that outlives the supervisor: one memfd, held by the guard as
well.

Written by the supervisor, read by front end and guard, and by the next supervisor. There are two halves; what is written
goes to the one that is not in use, then one store of eight bytes makes it the other: after SIGKILL either the old or the new
is there. It holds no credentials: those are in the supervisor's own records.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from struct import Struct
from struct import error as StructError
from typing import Any

from nydusd.errors import FormatError

log = logging.getLogger(__name__)

_REVISION = Struct("=Q")
"""How often it was written. Its lowest bit is the number of the half."""
_LENGTH = Struct("=Q")
_HALF = 64 << 20
"""Bytes of a half; only what is written costs memory."""
_START = 4096
_BDI = "/sys/class/bdi"
_KIND = "erofs-"
_READ_AHEAD_KIB = 2048
"""While a blob is incomplete: each page that is not in the page cache asks us, so that few large reads are better."""
_READ_AHEAD_USUAL_KIB = 128
_OLD: dict[str, Any] = {"before": ()}
"""What daemons of before 2026-11-26 read of a mount, and nobody else."""
_MORE = ("birth", "verifies", "listed")
"""What is said of a file that daemons of before 2026-11-27 do not know."""


@dataclass(frozen=True, slots=True)
class File:
    """A blob of a mount. `handle` and `segment`: how the supervisor and shared memory call it; `data`: path of its cache file.

    `cuts`: where its ranges begin, in order; the kernel reads each through a private mount of its own. `key`: its number in the
    journal, one for each blob of each mount; no other one has it ever. `birth` tells the cache file from another one that was
    given its number (`Identity.birth`), None: not known. `verifies`: digests are checked of what is found on disk. `listed`: it
    is known that the image's files refer to no chunk but those that it lists.
    """

    key: int
    blob_id: str
    handle: int
    segment: str
    data: str
    device: int
    inode: int
    cuts: tuple[int, ...] = (0,)
    birth: int | None = None
    verifies: bool = False
    listed: bool = False


@dataclass(frozen=True, slots=True)
class Mounted:
    """One mount. `place`: as the API calls it; `identity` names the metadata.

    `names` is how the kernel calls the file system, None while it may not be made yet: then nobody has seen it, and it ends
    with who makes it. `device` is the mount's `major:minor`. `gone`: unmounted by us, and used still.
    """

    index: int
    place: str
    mountpoint: str
    identity: str
    files: tuple[File, ...]
    names: tuple[str, ...] | None = None
    device: str = ""
    gone: bool = False

    def is_alive(self) -> bool:
        """Whether somebody uses the file system still, here or in another mount namespace."""
        return any(os.path.exists(f"{_BDI}/{name}") for name in self.names or ())

    def set_read_ahead(self, *, incomplete: bool) -> None:
        """Set the file system's read-ahead; where that cannot be it is only logged."""
        set_read_ahead(self.names or (), _READ_AHEAD_KIB if incomplete else _READ_AHEAD_USUAL_KIB)


@dataclass(frozen=True, slots=True)
class Table:
    """All mounts. `folders`: what was made for them to be mounted on; `ended`: the daemon was stopped, not killed.

    `next` is above the index of each mount that there ever was, as far as its writers have known of it.
    `segments`: names and inodes of what was spared when the daemon ended, since it says which chunks are there.
    """

    mounts: tuple[Mounted, ...] = ()
    folders: tuple[str, ...] = ()
    ended: bool = False
    next: int = 1
    segments: tuple[tuple[str, int], ...] = ()
    revision: int = field(default=0, compare=False)

    def alive(self) -> bool:
        """Whether anybody uses any of the file systems."""
        return any(mounted.is_alive() for mounted in self.mounts)


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
    """An empty table's fd, not inheritable. The caller closes it. Raises OSError."""
    fd = os.memfd_create("nydusd-mounts", os.MFD_CLOEXEC)
    os.ftruncate(fd, _START + 2 * _HALF)
    write(fd, Table())
    return fd


def write(fd: int, table: Table) -> None:
    """Replace what is there. Raises OSError, FormatError for more than there is room for."""
    mounts = [asdict(mounted) | _OLD for mounted in table.mounts]
    # Beside the mounts: a daemon of before 2026-11-27 that goes on with them takes no other keys there. It drops these.
    more = {file["key"]: [file.pop(name) for name in _MORE] for mounted in mounts for file in mounted["files"]}
    raw = {"ended": table.ended, "folders": table.folders, "mounts": mounts, "next": table.next, "more": more}
    content = json.dumps(raw | {"segments": table.segments}).encode()
    if len(content) + _LENGTH.size > _HALF:
        raise FormatError("table of mounts", "size", f"{len(content)} bytes, {_HALF} at most: too many mounts")
    revision = revision_of(fd) + 1
    os.pwrite(fd, _LENGTH.pack(len(content)) + content, _START + (revision & 1) * _HALF)
    os.pwrite(fd, _REVISION.pack(revision), 0)


def revision_of(fd: int) -> int:
    """How often it was written. Raises FormatError."""
    raw = os.pread(fd, _REVISION.size, 0)
    if len(raw) != _REVISION.size:
        raise FormatError("table of mounts", "size", "it is of another version")
    return int(_REVISION.unpack(raw)[0])


def read(fd: int) -> Table:
    """Raises FormatError when there is none, or one of another version."""
    while True:
        revision = revision_of(fd)
        start = _START + (revision & 1) * _HALF
        try:
            (length,) = _LENGTH.unpack(os.pread(fd, _LENGTH.size, start))
            content = os.pread(fd, min(length, _HALF), start + _LENGTH.size)
        except (StructError, OSError) as e:
            raise FormatError("table of mounts", "content", f"cannot be read: {e}") from e
        if revision_of(fd) == revision:  # nobody has begun to write this half again
            return _parse(content, revision)


def _parse(content: bytes, revision: int) -> Table:
    try:
        raw = json.loads(content)
        more = raw.get("more", {})
        mounts = tuple(_mounted(each, more) for each in raw["mounts"])
        segments = tuple((str(name), int(inode)) for name, inode in raw.get("segments", ()))  # another release has none
        following = int(raw.get("next", 1))
        return Table(mounts, tuple(raw["folders"]), bool(raw["ended"]), following, segments, revision)
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise FormatError("table of mounts", "content", f"cannot be read: {e!r}") from e


def _mounted(raw: dict[str, Any], more: dict[str, list[Any]]) -> Mounted:
    names = raw.pop("names")
    files = tuple(
        File(**(each | {"cuts": tuple(each["cuts"])} | dict(zip(_MORE, more.get(str(each["key"]), ()), strict=False))))
        for each in raw.pop("files")
    )
    raw.pop("before", None)  # of another release
    return Mounted(**raw, files=files, names=None if names is None else tuple(names))

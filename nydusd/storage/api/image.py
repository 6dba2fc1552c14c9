"""What a mount must know of an image before anybody reads it: its metadata file found and checked, its blobs listed.

`inspect` runs in the supervisor for the image of the command line, before there are workers, and in a fetch worker for
images that come by the API: it reads a disk and parses what others wrote. After SIGKILL in the middle, an extracted
bootstrap is either there and whole, or not there (a temporary file may stay, which the next one takes).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

from nydusd.errors import CacheError, FormatError
from nydusd.formats import BootstrapKind, detect, open_bootstrap
from nydusd.formats.blob_id import blob_id_from_path
from nydusd.formats.model import BlobInfo
from nydusd.formats.rafs_v6_super import SLOT_SIZE, SLOTS_OFFSET
from nydusd.formats.superblock import S_IFDIR, S_IFMT
from nydusd.storage.cache.spec import info_from_json, info_to_json
from nydusd.storage.state.lock import start_time
from nydusd.storage.state.temporary import temporary_of

log = logging.getLogger(__name__)

_DEVICES = Struct("<H")
_DEVICES_AT = 1024 + 86
_FILLER = b"x" * 64
_NO_FOLDER = (
    *(errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL),
    *(errno.EACCES, errno.EPERM),
)
"""Why a folder cannot be made, if it is the path that is wrong."""


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The metadata of an image. `bootstrap` is the file that holds it: the source, or what was extracted from it.

    `identity` names the source file and its state: two images with the same one are the same. `facts` are those of the
    superblock.
    """

    bootstrap: str
    extracted: bool
    size: int
    path_id: str
    identity: str
    version: int
    has_xattr: bool
    has_prefetch_table: bool
    facts: dict[str, Any]
    blobs: Sequence[BlobInfo]

    def to_json(self) -> dict[str, Any]:
        names = [name for name in self.__slots__ if name != "blobs"]
        return {name: getattr(self, name) for name in names} | {"blobs": [info_to_json(blob) for blob in self.blobs]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ImageFacts:
        return cls(**{**raw, "blobs": [info_from_json(blob) for blob in raw["blobs"]]})


def inspect(source: str, folders: Sequence[str]) -> ImageFacts:
    """The facts of the image at `source`: a bootstrap, or a blob that holds one.

    What is extracted from a blob is kept in the first of `folders` that takes it. Raises FormatError, CacheError.
    """
    path_id = blob_id_from_path(source)
    path, extracted, identity = _metadata(source, path_id, folders)
    view = mapped(path)
    bootstrap = open_bootstrap(view, path, path_id, extracted=extracted)
    bootstrap.inode(bootstrap.root_ino)
    return ImageFacts(
        bootstrap=path,
        extracted=extracted,
        size=len(view),
        path_id=path_id,
        identity=identity,
        version=bootstrap.version,
        has_xattr=bootstrap.has_xattr,
        has_prefetch_table=bool(bootstrap.prefetch_inodes()),
        facts=bootstrap.superblock_facts(),
        blobs=list(bootstrap.blobs),
    )


def mapped(path: str) -> memoryview:
    """The bytes of a metadata file. Raises FormatError."""
    try:
        with open(path, "rb") as f:
            return memoryview(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ))
    except (OSError, ValueError) as e:  # ValueError: it is empty
        raise FormatError(path, "bootstrap", f"cannot be read: {getattr(e, 'strerror', None) or e}") from e


def is_folder(facts: ImageFacts, path: Sequence[bytes]) -> bool:
    """Whether the image has a folder at this path. Raises FormatError when the metadata on the way is broken."""
    image = open_bootstrap(mapped(facts.bootstrap), facts.bootstrap, facts.path_id, extracted=facts.extracted)
    ino: int | None = image.root_ino
    for name in path:
        if ino is None or image.inode(ino).mode & S_IFMT != S_IFDIR:
            return False
        ino = image.lookup(ino, name)
    return ino is not None and image.inode(ino).mode & S_IFMT == S_IFDIR


def identity_of(st: os.stat_result) -> str:
    """The identity of an image whose source file is in this state."""
    return f"{st.st_dev}:{st.st_ino}:{st.st_size}:{st.st_mtime_ns}"


def _metadata(source: str, path_id: str, folders: Sequence[str]) -> tuple[str, bool, str]:
    """The file that holds the bootstrap: the source, or (True) what is extracted from it if the source is a blob."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for its writer.
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as e:
        raise FormatError(source, "bootstrap", f"cannot be opened: {getattr(e, 'strerror', e)}") from e
    try:
        st = os.fstat(fd)
        if not stat.S_ISREG(st.st_mode):
            raise FormatError(source, "bootstrap", "is not a regular file")
        identity = identity_of(st)
        if detect(memoryview(os.pread(fd, 4096, 0))) is not BootstrapKind.BLOB:
            return os.path.abspath(source), False, identity
        from nydusd.storage.cache.load import extract_bootstrap

        def read(offset: int, size: int) -> bytes:
            return os.pread(fd, size, offset)

        content = name_device(extract_bootstrap(read, st.st_size, source), path_id)
    finally:
        os.close(fd)
    return _store(content, f"{path_id}.image.boot", folders), True, identity


def name_device(content: bytes, blob_id: str) -> bytes:
    """A bootstrap that was in this blob, with its id in the device slot where a builder had to write a filler.

    The kernel's cache (fscache) asks for blobs by the names in these slots; nobody else looks at them.
    """
    if detect(memoryview(content)[:4096]) is not BootstrapKind.V6:
        return content
    (count,) = _DEVICES.unpack_from(content, _DEVICES_AT)
    for at in range(SLOTS_OFFSET, min(SLOTS_OFFSET + count * SLOT_SIZE, len(content)), SLOT_SIZE):
        if content[at : at + len(_FILLER)] == _FILLER:
            return (
                content[:at]
                + os.fsencode(blob_id).ljust(len(_FILLER), b"\0")[: len(_FILLER)]
                + content[at + len(_FILLER) :]
            )
    return content


def make_folder(folder: str) -> None:
    """Have a cache folder. Raises CacheError for a path that can be none, not for a disk that takes nothing now."""
    try:
        os.makedirs(folder, exist_ok=True)
    except ValueError as e:
        raise CacheError(f"cache folder {folder!r}: not a path", errno.EINVAL) from e
    except OSError as e:
        if e.errno in _NO_FOLDER:
            raise CacheError(f"cache folder {folder}: cannot be made: {e.strerror}", e.errno) from e


def _store(content: bytes, name: str, folders: Sequence[str]) -> str:
    """Keep an extracted bootstrap for the processes that map it."""
    for folder in folders:
        target = Path(folder) / name
        try:
            with temporary_of(target) as (file, temporary):
                file.write(content)
                file.flush()
                os.replace(temporary, target)
            _remove_left(target)
        except OSError as e:
            if folder == folders[-1]:
                raise CacheError(f"bootstrap {target} cannot be written: {e.strerror}", e.errno) from e
            log.warning("bootstrap %s cannot be written: %s", target, e.strerror)
        else:
            return str(target)
    raise CacheError(f"bootstrap {name}: no folder to keep it in")


def _remove_left(target: Path) -> None:
    """Remove what earlier releases have left that were killed over it: there, each process had a temporary file of its own."""
    for left in target.parent.glob(f"{glob.escape(target.name)}.*.tmp"):
        pid = left.suffixes[-2][1:]
        if pid.isdecimal() and not start_time(int(pid)):
            with contextlib.suppress(OSError):
                left.unlink()

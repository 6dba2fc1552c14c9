"""Images as the kernel's EROFS is to read them: whether it can, which files and ranges of them are its devices. Used by the
supervisor.

Nothing is kept here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nydusd.errors import UnsupportedError, cache_error
from nydusd.formats.rafs_v6_super import HEAD_MOST, check_addresses
from nydusd.frontends.erofs.session import Range
from nydusd.frontends.erofs.table import File, Mounted
from nydusd.storage.state.segment import Identity

if TYPE_CHECKING:
    from nydusd.storage.api.image import ImageFacts
    from nydusd.storage.cache.blob_cache import BlobCache
    from nydusd.supervisor.images import Image

_BLOBS_MOST = 255


def check(image: Image) -> None:
    """Raises UnsupportedError for an image that the kernel cannot mount from cache files, and as `check_places`."""
    if image.metadata.version != 6:
        raise UnsupportedError(
            f"{image.source}: the kernel mounts images of RAFS v6 only, this is v{image.metadata.version}: use `nydusd fuse`"
        )
    if any(not cache.caches for cache in image.caches):
        raise UnsupportedError("EROFS reads cache files: configure a cache of type blobcache with a work_dir")
    if len(image.caches) > _BLOBS_MOST:
        raise UnsupportedError(f"{image.source}: {len(image.caches)} blobs, {_BLOBS_MOST} at most")
    check_places(image.metadata)


def check_places(facts: ImageFacts) -> None:
    """Raises FormatError for a v6 image whose folders the kernel would read from blobs, CacheError without one."""
    try:
        with open(facts.bootstrap, "rb", buffering=0) as f:
            head = f.read(HEAD_MOST)
    except OSError as e:
        raise cache_error(f"bootstrap {facts.bootstrap}", e) from e
    check_addresses(head, facts.size, facts.bootstrap)


def file_at(path: str) -> tuple[int, int, int]:
    """What tells the cache file at this path from others (`Identity.file`). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return Identity.of(fd, 0).file
    finally:
        os.close(fd)


def is_fillable(cache: BlobCache) -> bool:
    """Whether what is fetched comes into the cache file that is there: its shared memory is of that very file.

    It is of none where the file could not be used, and of another one where that was deleted or replaced.
    """
    with contextlib.suppress(OSError):
        return cache.segment is not None and cache.segment.identity.file == file_at(str(cache.spec.data_path))
    return False


def is_of(mounted: Mounted, image: Image) -> bool:
    """Whether what is mounted is this image, at its place, with the cache files that are there now."""
    if (mounted.place, mounted.identity) != (image.place, image.metadata.identity):
        return False
    files = []
    for cache in image.caches:
        with contextlib.suppress(OSError):
            st = os.stat(str(cache.spec.data_path))
            files.append((st.st_dev, st.st_ino))
    return [(file.device, file.inode) for file in mounted.files] == files


def files_of(
    image: Image,
    index: int,
    cuts: Sequence[Sequence[int]],
    listed: Sequence[bool] = (),
    former: Sequence[File] = (),
) -> tuple[File, ...]:
    """The blobs of an image as front ends know them. `listed`: see `File`, nothing if it is not known. Raises OSError.

    `former`: how these very files were known.
    """
    listed = listed or [file.listed for file in former] or [False] * len(cuts)
    files = []
    for number, (cache, of_blob) in enumerate(zip(image.caches, cuts, strict=True)):
        path = str(cache.spec.data_path)
        st = os.stat(path)
        birth = former[number].birth if former else None
        if cache.segment is not None and cache.segment.identity.file[:2] == (st.st_dev, st.st_ino):
            birth = cache.segment.identity.birth
        names = cache.spec.info.blob_id, cache.handle, cache.spec.segment, path
        more = tuple(of_blob), birth, cache.spec.always_verify, listed[number]
        files.append(File(index << 8 | number, *names, st.st_dev, st.st_ino, *more))
    return tuple(files)


def ranges_of(caches: Sequence[BlobCache], cuts: Sequence[Sequence[int]]) -> list[Range]:
    """The devices of an image: of each blob its ranges."""
    found = []
    for cache, of_blob in zip(caches, cuts, strict=True):
        assert cache.segment is not None
        found += [Range(str(cache.spec.data_path), cache.segment.identity.file)] * len(of_blob)
    return found

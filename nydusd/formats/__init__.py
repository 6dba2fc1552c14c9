"""Parsers of the image formats: bytes in, plain data out. No I/O, no state but what is derived from the bytes."""

from __future__ import annotations

from nydusd.errors import FormatError
from nydusd.formats.detect import BootstrapKind, describe_magic, detect
from nydusd.formats.model import Bootstrap

__all__ = ["BootstrapKind", "detect", "open_bootstrap"]


def open_bootstrap(buf: memoryview, where: str, path_id: str | None = None, *, extracted: bool = False) -> Bootstrap:
    """The parser for the metadata in `buf`, which is used and not copied.

    `where` names the file in messages. `path_id` is `blob_id_from_path` of its name, and `extracted` says that the
    metadata was taken out of the blob of that name: only then blobs of images from before tar and TOC marks are called
    so; those marked as holding metadata are in any case.

    Raises `FormatError` for metadata that breaks the format, and for a file that holds none: when `detect` says BLOB,
    the caller must extract the metadata first.
    """
    kind = detect(buf)
    # Imported here because a daemon that serves only one version needs only that parser.
    if kind is BootstrapKind.V6:
        from nydusd.formats.rafs_v6 import RafsV6

        return RafsV6(buf, where, path_id, extracted=extracted)
    if kind is BootstrapKind.V5:
        from nydusd.formats.rafs_v5 import RafsV5

        return RafsV5(buf, where, path_id, extracted=extracted)
    raise FormatError(where, "superblock.magic", describe_magic(buf))

"""Writes an image as one disk image: its metadata, and behind it the plain data of its blobs where the metadata says.

Runs in the process of the command. The kernel's EROFS mounts such a file or device without a daemon. What nobody stored
(chunks that a merged image does not use, the room between blobs) is a hole.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from nydusd.formats.rafs_v6 import RafsV6
from nydusd.formats.rafs_v6_super import SLOT_SIZE, SLOTS_OFFSET
from nydusd.formats.superblock import SuperFlag
from nydusd.image.errors import ImageError
from nydusd.image.output import Output, folder_of
from nydusd.image.reader import ImageReader
from nydusd.image.verity import Verity, add_verity

_MAPPED_AT = 68


class Exported(NamedTuple):
    """Length of the disk image in bytes; its dm-verity data, if that was asked for."""

    size: int
    verity: Verity | None


def export_block(reader: ImageReader, target: Path, *, verity: bool = False) -> Exported:
    """Write the disk image, with `verity` also the digests of its blocks behind it.

    Raises `ImageError` for an image that is none for the kernel.
    """
    bootstrap, data = reader.bootstrap, reader.data
    if not isinstance(bootstrap, RafsV6):
        raise ImageError("RAFS v5 is no file system of the kernel: only v6 images can be exported")
    with Output(folder_of(target.parent)) as out:
        out.put(0, data)
        size = len(data)
        for blob in bootstrap.blobs:
            slot = SLOTS_OFFSET + SLOT_SIZE * blob.index + _MAPPED_AT
            block = 512 if blob.is_tarfs else 4096
            begin = int.from_bytes(data[slot : slot + 4], "little") * block
            if begin < size:
                raise ImageError(
                    f"blob {blob.blob_id}: its place in a disk image, {begin}, is not behind what is before it"
                )
            opened = reader.blob(blob.index)
            for chunk in opened.described():
                out.put(begin + opened.record(chunk).uoff, opened.plain(chunk))
            reader.let_go(blob.index)
            size = begin + -(-blob.uncompressed_size // block) * block
        out.extend(size)
        found = None
        if verity:
            found = add_verity(out, size, 512 if bootstrap.flags & SuperFlag.TARFS else 4096)
            size = found.size
        out.publish(target)
    return Exported(size, found)

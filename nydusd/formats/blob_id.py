"""Blob ids: which are safe to use as names, and where the id of a blob with inlined metadata comes from.

Pure functions over untrusted text. A blob id becomes a file name in the cache folder and a part of backend paths and
URLs, so what is no plain name is refused here, once, for all who use it later.
"""

from __future__ import annotations

import os.path
import re

from nydusd.errors import FormatError
from nydusd.formats.model import BlobFeature

MAX_BLOB_ID = 128
"""Longer ids would, with the longest suffix of a cache file, come too near to the 255 bytes of a file name."""

_PLAIN = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]*", re.ASCII)


def check_blob_id(where: str, field: str, raw: bytes) -> str:
    """The id as text. Raises `FormatError` unless it is 1 to 128 ASCII letters, digits and `_ . -`, no dot or dash first.

    Builders write 64 lower-case hex digits; converters are free to take other names.
    """
    text = raw.decode("ascii", "backslashreplace")
    if len(raw) > MAX_BLOB_ID or not _PLAIN.fullmatch(text):
        raise FormatError(
            where,
            field,
            f"{text[:MAX_BLOB_ID]!r} must be 1 to {MAX_BLOB_ID} letters, digits, '_', '.' or '-', no '.' or '-' first",
        )
    return text


def blob_id_from_path(path: str) -> str:
    """The blob id in the name of a metadata or blob file: its last component without any extension."""
    name = os.path.basename(path)
    while (stem := os.path.splitext(name)[0]) != name:
        name = stem
    return name


def takes_path_id(features: int, *, extracted: bool) -> bool:
    """Whether a blob is called after the file that its bootstrap was in, and not by the id in the blob table.

    A builder that writes the bootstrap into the blob cannot know the blob's digest yet, so the table holds a filler
    when INLINED_FS_META is set (unless the blob is EXTERNAL, or SEPARATE: then its data is a layer with an id of its
    own). Blobs from before CAP_TAR_TOC carry no such mark, so for them it counts that the bootstrap was in fact
    `extracted` from a blob.
    """
    if features & BlobFeature.INLINED_FS_META:
        return not features & (BlobFeature.EXTERNAL | BlobFeature.SEPARATE)
    return extracted and not features & BlobFeature.CAP_TAR_TOC

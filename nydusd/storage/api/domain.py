"""Images of one domain of fscache that share a blob: do their metadata agree over it, and who lists which of its chunks?

The kernel has one file a blob in a domain and does not say for which image it asks, so all of them are served by one table
of chunks (`workers/prepare.py`). Run by a worker before an image is bound, and by the supervisor in its start. Keeps nothing.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence

from nydusd.errors import FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import BlobFeature, BlobInfo, RawChunk
from nydusd.storage.api.image import ImageFacts

_KIND = (
    BlobFeature.ALIGNED
    | BlobFeature.CHUNK_INFO_V2
    | BlobFeature.ZRAN
    | BlobFeature.SEPARATE
    | BlobFeature.BATCH
    | BlobFeature.ENCRYPTED
    | BlobFeature.TARFS
)
_FIELDS = (
    "chunk_count",
    "uncompressed_size",
    "compressor",
    "digester",
    "cipher",
    "cipher_key",
    "cipher_iv",
    "ci_compressor",
    "ci_offset",
    "ci_compressed_size",
    "ci_uncompressed_size",
    "meta_blob_id",
)
"""What a blob is decoded by."""
_CRC = 0x10
_NO_DIGEST = bytes(32)


def additions(new: ImageFacts, others: Sequence[tuple[str, ImageFacts]], domain: str) -> set[str]:
    """The blobs of an image of which it lists chunks that none of the others (place, facts) lists.

    Raises FormatError when it says something else of a blob than one of them.
    """
    found: set[str] = set()
    for info in new.blobs:
        known: dict[int, tuple[RawChunk, str]] = {}
        shared = False
        for place, other in others:
            for there in other.blobs:
                if there.blob_id != info.blob_id:
                    continue
                shared = True
                if not os.path.exists(other.bootstrap):
                    continue  # somebody has removed it, and what it has listed is known to nobody any more
                if field := _differs(info, there):
                    raise _contradiction(new, info, domain, f"has another {field} than in the image {place}")
                for chunk in _listed(other, there):
                    known.setdefault(chunk.index, (chunk, place))
        if not shared:
            continue
        for chunk in _listed(new, info):
            if chunk.index not in known:
                found.add(info.blob_id)
            elif why := _chunk_differs(info, chunk, known[chunk.index][0]):
                place = known[chunk.index][1]
                raise _contradiction(new, info, domain, f"chunk {chunk.index} has {why} than in the image {place}")
    return found


def _contradiction(new: ImageFacts, info: BlobInfo, domain: str, why: str) -> FormatError:
    advice = "images of a domain must agree over the blobs that they share: give it another domain_id"
    return FormatError(new.bootstrap, f"blob {info.blob_id}", f"{why}, which is in the domain {domain}, too; {advice}")


def _listed(facts: ImageFacts, info: BlobInfo) -> Iterator[RawChunk]:
    """The chunks of a blob that an image lists. Raises FormatError."""
    try:
        with open(facts.bootstrap, "rb") as f:
            view = memoryview(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ))
    except (OSError, ValueError) as e:
        raise FormatError(facts.bootstrap, "bootstrap", f"cannot be read: {getattr(e, 'strerror', None) or e}") from e
    image = open_bootstrap(view, facts.bootstrap, facts.path_id, extracted=facts.extracted)
    return (chunk for chunk in image.raw_chunks() if chunk.blob_index == info.index)


def _differs(one: BlobInfo, other: BlobInfo) -> str:
    """The name of a field in which two descriptions of a blob differ so that they cannot be decoded alike."""
    if one.features & _KIND != other.features & _KIND:
        return "kind (its feature bits)"
    return next((name for name in _FIELDS if getattr(one, name) != getattr(other, name)), "")


def _chunk_differs(info: BlobInfo, one: RawChunk, other: RawChunk) -> str:
    """In what two records of a chunk contradict each other. Where the blob has chunk information, that says where it is."""
    if one.digest != other.digest and _NO_DIGEST not in (one.digest, other.digest):
        return "another digest"
    if one.crc != other.crc and one.flags & other.flags & _CRC:
        return "another checksum"
    if (one.uoff, one.usize) != (other.uoff, other.usize):
        return "another place"
    if not info.has_ci and one._replace(file_offset=0, blob_index=0) != other._replace(file_offset=0, blob_index=0):
        return "another place in the stored blob"
    return ""

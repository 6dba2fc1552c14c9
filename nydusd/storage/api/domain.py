"""Images of one domain of fscache that share a blob: do their metadata agree over it, and who lists which of its chunks?

The kernel has one file a blob in a domain and does not say for which image it asks, so all of them are served by one table
of chunks (`workers/prepare.py`). Run by a worker before an image is bound, and by the supervisor in its start. Keeps nothing.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from struct import Struct

from nydusd.errors import FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import BlobFeature, BlobInfo, RawChunk
from nydusd.storage.api.image import ImageFacts, mapped

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


class Tables:
    """What the images of one domain list of their blobs, in the order in which they are bound, and the next compared with that.

    Each image's table is read once at most, and not at all before one is compared that has a blob in common with others: so
    many images cost what their tables are long, not what each pair of them is. `blobs`: those that several of them have; of
    others nothing is kept.
    """

    def __init__(self, domain: str, blobs: Collection[str]) -> None:
        self._domain = domain
        self._blobs = frozenset(blobs)
        self._unread: deque[tuple[str, ImageFacts]] = deque()
        self._places: list[str] = []
        """Of those that were read."""
        self._known: dict[str, _Known] = {}
        """By blob, if an image has it."""
        self._compared: tuple[ImageFacts, _Listed] | None = None
        """The last that was compared, and its table."""

    def know(self, place: str, facts: ImageFacts) -> None:
        """This image is bound."""
        if self._compared is not None and self._compared[0] is facts:
            self._learn(place, *self._compared)
        else:
            self._unread.append((place, facts))
        self._compared = None

    def additions(self, new: ImageFacts) -> set[str]:
        """The blobs of an image of which it lists chunks that none of those that are known lists.

        Raises FormatError when it says something else of a blob than one of them.
        """
        if self._blobs.isdisjoint(info.blob_id for info in new.blobs):
            return set()
        while self._unread:
            place, facts = self._unread[0]
            # If somebody has removed it, what it has listed is known to nobody any more.
            self._learn(place, facts, self._listed(facts) if os.path.exists(facts.bootstrap) else None)
            self._unread.popleft()
        listed = self._listed(new)
        found: set[str] = set()
        for info in new.blobs:
            known = self._known.get(info.blob_id)
            if known is None:
                continue
            for there, place in known.descriptions.values():
                if field := _differs(info, there):
                    raise _contradiction(new, info, self._domain, f"has another {field} than in the image {place}")
            for chunk in listed[info.index]:
                packed = known.chunks.get(chunk.index)
                if packed is None:
                    found.add(info.blob_id)
                elif packed[: _RECORD.size] != _packed(chunk) and (
                    why := _chunk_differs(info, chunk, _unpacked(packed, chunk))
                ):
                    place = self._places[_ORDER.unpack_from(packed, _RECORD.size)[0]]
                    why = f"chunk {chunk.index} has {why} than in the image {place}"
                    raise _contradiction(new, info, self._domain, why)
        self._compared = new, listed
        return found

    def _learn(self, place: str, facts: ImageFacts, listed: _Listed | None) -> None:
        """From now on what this image lists is known."""
        order = _ORDER.pack(len(self._places))
        self._places.append(place)
        for info in facts.blobs:
            if info.blob_id not in self._blobs:
                continue
            known = self._known.setdefault(info.blob_id, _Known())
            if listed is None:
                continue
            known.descriptions.setdefault(_description(info), (info, place))
            for chunk in listed[info.index]:
                if chunk.index not in known.chunks:
                    known.chunks[chunk.index] = _packed(chunk) + order

    def _listed(self, facts: ImageFacts) -> _Listed:
        """The chunks that an image lists of these blobs, by the blob's index. Raises FormatError."""
        listed: _Listed = {info.index: [] for info in facts.blobs if info.blob_id in self._blobs}
        for chunk in _chunks_of(facts):
            if (of := listed.get(chunk.blob_index)) is not None:
                of.append(chunk)
        return listed


def additions(new: ImageFacts, others: Sequence[tuple[str, ImageFacts]], domain: str) -> set[str]:
    """`Tables.additions` of an image, where the others (place, facts) are known."""
    tables = Tables(domain, {info.blob_id for info in new.blobs})
    for place, facts in others:
        tables.know(place, facts)
    return tables.additions(new)


class _Known:
    """What is known of a blob: the ways in which it is described, each by the first who does, and chunks by their index.

    Of a chunk: its record, `_packed`, a quarter of what it takes as a tuple; and which image was the first to list it.
    """

    __slots__ = ("chunks", "descriptions")

    def __init__(self) -> None:
        self.descriptions: dict[tuple[object, ...], tuple[BlobInfo, str]] = {}
        self.chunks: dict[int, bytes] = {}


_Listed = dict[int, list[RawChunk]]
_RECORD = Struct("<32sIIIQQI")
_ORDER = Struct("<I")


def _packed(chunk: RawChunk) -> bytes:
    """All that two records of one chunk can differ in."""
    return _RECORD.pack(chunk.digest, chunk.flags, chunk.csize, chunk.usize, chunk.coff, chunk.uoff, chunk.crc)


def _unpacked(packed: bytes, other: RawChunk) -> RawChunk:
    """The record again, with the blob's index and the place in a file as in another one of that chunk."""
    digest, flags, csize, usize, coff, uoff, crc = _RECORD.unpack_from(packed)
    return other._replace(digest=digest, flags=flags, csize=csize, usize=usize, coff=coff, uoff=uoff, crc=crc)


def _contradiction(new: ImageFacts, info: BlobInfo, domain: str, why: str) -> FormatError:
    advice = "images of a domain must agree over the blobs that they share: give it another domain_id"
    return FormatError(new.bootstrap, f"blob {info.blob_id}", f"{why}, which is in the domain {domain}, too; {advice}")


def _chunks_of(facts: ImageFacts) -> Iterator[RawChunk]:
    """The chunk table of an image. Raises FormatError."""
    view = mapped(facts.bootstrap)
    return open_bootstrap(view, facts.bootstrap, facts.path_id, extracted=facts.extracted).raw_chunks()


def _description(info: BlobInfo) -> tuple[object, ...]:
    """All that `_differs` looks at."""
    return (info.features & _KIND, *(getattr(info, name) for name in _FIELDS))


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

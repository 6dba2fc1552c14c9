"""Chunks that are in blobs already: those of a parent image, and those of a chunk dictionary. In memory.

A chunk is the same if digest and length are; it is kept as the packed record that images have. Blobs of the dictionary
come into the blob table when the first of their chunks is used; the parent's are all in it from the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from struct import Struct

from nydusd.errors import ConfigError
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobInfo, Bootstrap, Digester
from nydusd.image.blob import renumbered
from nydusd.image.errors import ImageError
from nydusd.image.load import standalone
from nydusd.image.reader import load_metadata

_USIZE_AT = 44
_INDEX = Struct("<I")
_INDEX_AT = 32


class KnownChunks:
    """What is stored, and the blob table as far as it is known. `blobs` grows as dictionary blobs are used."""

    def __init__(self, blobs: Sequence[BlobInfo] = ()) -> None:
        self.blobs: list[BlobInfo | None] = list(blobs)
        self._chunks: dict[bytes, bytes] = {}
        self._dictionary: dict[bytes, bytes] = {}
        self._dictionary_blobs: list[BlobInfo] = []
        self._places: dict[int, int] = {}

    def add(self, digest: bytes, record: bytes) -> None:
        """A chunk that is stored, with its index in our blob table."""
        self._chunks.setdefault(digest, record)

    def add_dictionary(self, bootstrap: Bootstrap, digester: Digester, folder: Path | None) -> None:
        """Chunks of another image that may be used; those hashed by another algorithm cannot be compared."""
        for chunk in bootstrap.raw_chunks():
            if bootstrap.blobs[chunk.blob_index].digester == digester:
                self._dictionary.setdefault(chunk.digest, CHUNK_INFO.pack(*chunk))
        self._dictionary_blobs = [standalone(info, folder) for info in bootstrap.blobs]

    def digests(self) -> frozenset[bytes]:
        """Of all chunks that are known now: workers need not pack these."""
        return frozenset((*self._chunks, *self._dictionary))

    def find(self, digest: bytes, size: int) -> bytes | None:
        """The stored chunk's record, with its index in our blob table; None if it is new.

        Raises `ImageError` if a chunk of this digest has another length: the image that says so is damaged.
        """
        found = self._dictionary.get(digest)
        if found is not None:
            found = self._from_dictionary(found)
        else:
            found = self._chunks.get(digest)
            if found is None:
                return None
        (usize,) = _INDEX.unpack_from(found, _USIZE_AT)
        if usize != size:
            raise ImageError(f"chunk {digest.hex()}: {usize} bytes in an image that is built upon, and {size} here")
        return found

    def _from_dictionary(self, record: bytes) -> bytes:
        (index,) = _INDEX.unpack_from(record, _INDEX_AT)
        place = self._places.get(index)
        if place is None:
            info = self._dictionary_blobs[index]
            place = next((at for at, blob in enumerate(self.blobs) if blob and blob.blob_id == info.blob_id), -1)
            if place < 0:
                place = self.reserve()
                self.blobs[place] = renumbered(info, place)
            self._places[index] = place
        return record[:_INDEX_AT] + _INDEX.pack(place) + record[_INDEX_AT + _INDEX.size :]

    def forget(self) -> None:
        """All is stored: only the blob table is still needed."""
        self._chunks = {}
        self._dictionary = {}

    def reserve(self) -> int:
        """A place in the blob table, to be filled in later."""
        self.blobs.append(None)
        return len(self.blobs) - 1


def open_dictionary(argument: str, version: int, chunk_size: int) -> Bootstrap:
    """The image that `--chunk-dict` names: `bootstrap=PATH` or `PATH`. Raises `ConfigError` if it does not fit."""
    kind, equals, path = argument.partition("=")
    if not equals:
        path = argument
    elif kind != "bootstrap":
        raise ConfigError(f"--chunk-dict: {kind!r} is unknown: give bootstrap=PATH, or PATH")
    _, bootstrap = load_metadata(Path(path))
    check_fits("--chunk-dict", bootstrap, version, chunk_size)
    return bootstrap


def check_fits(option: str, bootstrap: Bootstrap, version: int, chunk_size: int) -> None:
    """Raises `ConfigError` if chunks of that image cannot be used in an image of this version and chunk size."""
    if bootstrap.version != version:
        raise ConfigError(f"{option}: an image of version {bootstrap.version}; the new one has {version}")
    if bootstrap.chunk_size != chunk_size:
        raise ConfigError(f"{option}: chunks of {bootstrap.chunk_size:#x} bytes; the new image's have {chunk_size:#x}")
    if any(blob.is_tarfs for blob in bootstrap.blobs):
        raise ConfigError(f"{option}: a tarfs image, whose data has no chunks")

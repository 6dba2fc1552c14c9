"""Images made of images: chunks moved from an image's blobs into a new one, and the bootstrap that refers to it.

Runs in the process of the command (merge, optimize, compact). Every chunk that is moved is verified on the way. The old blobs
are only read; a new one has its name when it is complete, and bootstraps are written after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from nydusd.codec.crc import crc32c
from nydusd.codec.digest import hasher_for
from nydusd.codec.pack import pack
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobFeature, BlobInfo, Bootstrap, ChunkFlag, Compressor, RawChunk
from nydusd.formats.superblock import SuperFlag, flags_compressor, flags_digester
from nydusd.image.blob import BlobSettings, BlobWriter, fresh_key, renumbered
from nydusd.image.bootstrap_v5 import BootstrapV5
from nydusd.image.bootstrap_v6 import BootstrapV6
from nydusd.image.chunking import Packed, Piece
from nydusd.image.errors import ImageError
from nydusd.image.load import standalone
from nydusd.image.node import Node, names
from nydusd.image.output import Output, folder_of, write_file
from nydusd.image.reader import BlobReader, ImageReader
from nydusd.storage.cache.chunk_table import is_legacy_stargz

_GROUPED = ChunkFlag.BATCH | ChunkFlag.ZRAN
_COPIED_FLAGS = (
    SuperFlag.COMPRESSOR_NONE
    | SuperFlag.COMPRESSOR_LZ4
    | SuperFlag.COMPRESSOR_GZIP
    | SuperFlag.COMPRESSOR_ZSTD
    | SuperFlag.DIGESTER_BLAKE3
    | SuperFlag.DIGESTER_SHA256
    | SuperFlag.EXPLICIT_UID_GID
)

Place = tuple[int, int]
"""A chunk: the index of its blob, and its own in that blob."""


class NewBlob:
    """A blob that is made of chunks of others. `with NewBlob(...) as blob: blob.move(chunk); ...; blob.finish()`.

    `moved` says of each chunk that was moved, by its old place, what it is now. The blob's place in the new blob table is
    `index`.
    """

    def __init__(self, reader: ImageReader, settings: BlobSettings, folder: Path, index: int) -> None:
        self._reader = reader
        self._settings = settings
        self._folder = folder_of(folder)
        self._cipher = settings.cipher()
        self._out = Output(self._folder)
        self._writer = BlobWriter(self._out, settings, lambda: index)
        self.moved: dict[Place, RawChunk] = {}
        self._by_content: dict[tuple[bytes, int], RawChunk] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.__exit__(kind, error, trace)

    @property
    def stored(self) -> int:
        """Bytes of chunk data so far."""
        return self._writer.stored

    def move(self, chunk: RawChunk) -> None:
        """Have a chunk in this blob, once. Raises what reading it raises."""
        place = chunk.blob_index, chunk.index
        if place in self.moved:
            return
        source = self._reader.blob(chunk.blob_index)
        packed, data, size = self._packed(source, chunk.index)
        found = self._by_content.get((packed.digest, size))
        if found is None:
            piece = Piece(b"", None, chunk.file_offset, size, size, 0, False)
            record = self._writer.add(piece, packed, memoryview(data))
            found = self._by_content[packed.digest, size] = RawChunk._make(CHUNK_INFO.unpack(record))
        self.moved[place] = found

    def _packed(self, source: BlobReader, number: int) -> tuple[Packed, bytes, int]:
        """A chunk as it is to be stored, and its plain length. What is stored so already is not packed again."""
        settings, info, record = self._settings, source.info, source.record(number)
        compressed = bool(record.flags & ChunkFlag.COMPRESSED)
        if (
            record.flags & _GROUPED
            or is_legacy_stargz(info)
            or info.cipher
            or settings.cipher_key
            or (compressed and info.compressor != settings.compressor)
        ):
            plain = source.plain(number)
            stored, compressed = pack(settings.compressor, plain)
            if self._cipher is not None:
                stored = self._cipher.encrypt(stored)
        else:
            stored, plain = source.stored_and_plain(number)
        digest = source.digest(number) if info.digester == settings.digester else b""
        if not any(digest):
            digest = hasher_for(settings.digester)(plain)
        crc = record.crc if record.flags & ChunkFlag.CRC else crc32c(plain)
        return Packed(digest, crc, len(stored), compressed), stored, len(plain)

    def finish(self, *, prefetched: bool = False) -> BlobInfo:
        """Give the blob its name, its digest, and its entry for the blob table. `prefetched`: v5 readers read it ahead."""
        writer = self._writer
        if prefetched:
            writer.prefetch_size = writer.stored
        writer.finish_data()
        writer.add_toc()
        blob_id = self._out.digest().hex()
        info = writer.info(blob_id)
        self._out.publish(self._folder / blob_id)
        return info


def settings_like(bootstrap: Bootstrap, blobs: Collection[BlobInfo], *, prefetch: bool = False) -> BlobSettings:
    """How a new blob stores chunks of these blobs. With one that is encrypted among them it is encrypted, by a new key.

    Raises `ImageError` for a v5 image whose data is gzip: a new chunk of it cannot be written.
    """
    compressors = {blob.compressor for blob in blobs}
    compressor = compressors.pop() if len(compressors) == 1 else Compressor.ZSTD
    if bootstrap.version == 5:
        compressor = flags_compressor(bootstrap.flags)
        if compressor == Compressor.GZIP:
            raise ImageError("the data is a gzip layer, and RAFS v5 cannot have blobs with other compression beside it")
    elif compressor == Compressor.GZIP:
        compressor = Compressor.ZSTD
    key, iv = fresh_key() if any(blob.cipher for blob in blobs) else (b"", b"")
    return BlobSettings(
        version=bootstrap.version,
        compressor=compressor,
        digester=flags_digester(bootstrap.flags),
        chunk_size=bootstrap.chunk_size,
        aligned=bootstrap.version == 6 or any(blob.features & BlobFeature.ALIGNED for blob in blobs),
        toc=bool(blobs) and all(blob.features & BlobFeature.INLINED_CHUNK_DIGEST for blob in blobs),
        prefetch=prefetch,
        cipher_key=key,
        cipher_iv=iv,
    )


def blobs_of(reader: ImageReader, folder: Path | None) -> list[BlobInfo]:
    """The blob table of an image, as that of another one may have it."""
    blobs = [standalone(blob, folder) for blob in reader.bootstrap.blobs]
    for blob in blobs:
        if blob.is_tarfs:
            raise ImageError(f"blob {blob.blob_id}: a tar that the kernel mounts; its data cannot be in another place")
        if not blob.chunk_count and reader.bootstrap.version == 5:
            # Of an image without the extended table. Its chunks can be counted only while all are referred to.
            table = reader.blob(blob.index).table
            known = replace(blob, chunk_count=table.count, uncompressed_size=table.uncompressed_size)
            blobs[blob.index] = replace(known, compressed_size=reader.blob(blob.index).size())
    return blobs


def with_chunks(tree: Node) -> Iterable[Node]:
    """The nodes of all files with content, once each."""
    done: set[int] = set()
    for name in names(tree):
        node = name.node
        if node.packed and id(node) not in done:
            done.add(id(node))
            yield node


def replace_chunks(tree: Node, moved: Mapping[Place, RawChunk]) -> None:
    """Have all files refer to the chunks that took the places of theirs."""
    for node in with_chunks(tree):
        node.set_chunks(moved.get((chunk.blob_index, chunk.index), chunk) for chunk in node.chunks)


def renumber(tree: Node, places: Sequence[int]) -> None:
    """Give the chunks of a tree the blob indexes of another table."""
    for node in with_chunks(tree):
        node.set_chunks(chunk._replace(blob_index=places[chunk.blob_index]) for chunk in node.chunks)


def used_blobs(tree: Node, blobs: Sequence[BlobInfo]) -> list[BlobInfo]:
    """The blobs that the tree refers to, in their order; the tree is renumbered to this table."""
    used = sorted({chunk.blob_index for node in with_chunks(tree) for chunk in node.chunks})
    places = [-1] * len(blobs)
    for place, index in enumerate(used):
        places[index] = place
    renumber(tree, places)
    return [renumbered(blobs[index], place) for place, index in enumerate(used)]


def write_bootstrap(
    target: Path, tree: Node, blobs: Sequence[BlobInfo], like: Bootstrap, prefetch: Sequence[Node] = ()
) -> None:
    """Write the metadata of a tree, with all that is not said here as in another image."""
    flags, size = like.flags & _COPIED_FLAGS, like.chunk_size
    bootstrap: BootstrapV5 | BootstrapV6
    if like.version == 5:
        digester = blobs[0].digester if blobs else flags_digester(like.flags)
        bootstrap = BootstrapV5(tree, blobs, flags=flags, chunk_size=size, digester=digester, prefetch=prefetch)
    else:
        encrypted = any(blob.cipher for blob in blobs)
        flags |= SuperFlag.AES_128_XTS if encrypted else SuperFlag.NOT_ENCRYPTED
        tarfs = bool(like.flags & SuperFlag.TARFS)
        bootstrap = BootstrapV6(tree, blobs, flags=flags, chunk_size=size, prefetch=prefetch, tarfs=tarfs)
    write_file(target, bootstrap.pack())

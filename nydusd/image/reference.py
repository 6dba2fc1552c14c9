"""Images whose data stays where it is: in a gzip layer (zran), a plain tar, or a tarfs. Only metadata is written.

Runs in the process of the command. The layer is read once, for its digest and, if it is packed, for its plain form, which
goes to a file without a name: so it may come through a pipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nydusd.codec.errors import CodecError
from nydusd.codec.gzip_index import Border, GzipIndex
from nydusd.formats.blob_meta import align_page, pack_v2
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobFeature, BlobInfo, Compressor
from nydusd.image.blob import MAX_CHUNKS, BlobSettings, BlobWriter
from nydusd.image.chunking import Packed, Piece
from nydusd.image.errors import CannotReferError, ImageError, SourceError, show
from nydusd.image.node import Node
from nydusd.image.output import Output
from nydusd.image.tar.spool import GZIP_MAGIC, ZSTD_MAGIC, OpenTar, pieces_of
from nydusd.image.zran import ZranContexts

_TARFS_BLOCK = 512
_COMPRESSED, _HAS_CRC = 0x1, 0x10
_V2_COMPRESSED, _V2_ZRAN, _V2_CRC = 0x1, 0x2, 0x10


class Layer(OpenTar):
    """A layer: its `digest` and `length` as well. `borders` of a gzip layer.

    Raises `ImageError` for one that cannot be read, or cannot be referred to.
    """

    def __init__(self, path: Path, folder: Path, *, tarfs: bool) -> None:
        self.borders: list[Border] = []
        self.is_gzip = False
        self.length = 0
        self._tarfs = tarfs
        self._hash = hashlib.sha256()
        super().__init__(path, folder)
        self.digest = self._hash.hexdigest()

    @property
    def compressor(self) -> Compressor:
        return Compressor.NONE if self._tarfs else Compressor.GZIP

    def _prepare(self, folder: Path) -> int:
        begin = self._begin()
        pieces = self._hashed(pieces_of(begin, self._file, self.path))
        if begin.startswith(ZSTD_MAGIC) or (self._tarfs and begin.startswith(GZIP_MAGIC)):
            kind = "a plain tar" if self._tarfs else "a tar, plain or packed with gzip"
            raise CannotReferError(f"{self.path}: {kind} is needed to refer to it")
        if begin.startswith(GZIP_MAGIC):
            self.is_gzip = True
            index = GzipIndex()
            try:
                size = self._spool(index.inflate(pieces), folder)
            except CodecError as error:
                raise ImageError(f"{self.path}: {error}") from error
            self.borders = index.borders
            return size
        if not self._file.seekable():
            return self._spool(pieces, folder)
        for _ in pieces:
            pass
        return self.length

    def _hashed(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._hash.update(piece)
            self.length += len(piece)
            yield piece


def tar_position(node: Node) -> int:
    """Where the data of a file begins in the tar."""
    return node.segments[0][2] if node.segments else 0


def _position(piece: Piece) -> int:
    """Where a chunk is in the tar. Raises `CannotReferError` for one that is not there in one piece."""
    segments = piece.segments or ()
    if len(segments) != 1 or segments[0][:2] != (piece.offset, piece.size):
        raise CannotReferError(
            f"{show(piece.member)}: a sparse file, whose holes are not in the layer: use tar-rafs or targz-rafs"
        )
    return segments[0][2]


class ReferenceWriter(BlobWriter):
    """The chunk information of a layer, in a file of its own (the meta blob)."""

    def __init__(
        self, out: Output, settings: BlobSettings, reserve: Callable[[], int], layer: Layer, blob_id: str
    ) -> None:
        super().__init__(out, settings, reserve)
        self._layer = layer
        self._blob_id = blob_id
        self._zran = ZranContexts(layer.borders, layer.fd) if layer.is_gzip else None

    @property
    def table_id(self) -> str:
        return self._blob_id or self._layer.digest

    def add(self, piece: Piece, packed: Packed, data: memoryview) -> bytes:
        if self.count >= MAX_CHUNKS:
            raise ImageError(f"more than {MAX_CHUNKS} chunks in one blob: take a larger chunk size")
        if self.index < 0:
            self.index = self._reserve()
        position = _position(piece)
        crc = packed.crc
        flags = _HAS_CRC if crc else 0
        if self._zran is not None:
            try:
                context, offset, coff, csize = self._zran.place(position, piece.size)
            except CannotReferError as error:
                raise CannotReferError(f"{show(piece.member)}: {error}") from error
            except ImageError as error:
                raise SourceError(piece.member, str(error)) from error
            flags |= _COMPRESSED
            csize = min(csize, 0xFFFFFF)  # a hint only: the context says what to read
            bits, value = _V2_COMPRESSED | _V2_ZRAN, context << 32 | offset
        else:
            coff, csize = position, piece.size
            bits, value = _V2_CRC if crc else 0, crc
        self._ci += pack_v2(coff, self._uoff, csize, piece.size, bits, value)
        if self._settings.toc:
            self._digests += packed.digest
        record = CHUNK_INFO.pack(
            packed.digest, self.index, flags, csize, piece.size, coff, self._uoff, piece.offset, self.count, crc
        )
        self._uoff += align_page(piece.size)
        self.count += 1
        return record

    def finish_data(self) -> bytes:
        if self._zran is not None:
            self._contexts = bytearray(self._zran.pack())
        return super().finish_data()

    def _context_count(self) -> int:
        return self._zran.count if self._zran is not None else 0

    def info(self, blob_id: str) -> BlobInfo:
        found = replace(super().info(blob_id), compressed_size=self._layer.length)
        if self._settings.inline:
            return found
        return replace(found, meta_digest=self._out.digest(), meta_size=self._out.position)


class TarfsWriter(ReferenceWriter):
    """Nothing but places in the tar: no chunk information, no digests."""

    @property
    def is_file(self) -> bool:
        return False

    def add_all(self, nodes: Sequence[Node]) -> None:
        """Give all files their chunks. Raises `SourceError` for a sparse file."""
        size = self._settings.chunk_size
        for node in nodes:
            if not node.size:
                continue
            if not node.segments or len(node.segments) != 1 or node.segments[0][:2] != (0, node.size):
                raise SourceError(node.path, "a sparse file, whose holes are not in the tar: use tar-rafs")
            if self.index < 0:
                self.index = self._reserve()
            at = node.segments[0][2]
            records = []
            for offset in range(0, node.size, size):
                if self.count >= MAX_CHUNKS:
                    raise ImageError(f"more than {MAX_CHUNKS} chunks in one blob: take a larger chunk size")
                length = min(size, node.size - offset)
                place = at + offset
                records.append(
                    CHUNK_INFO.pack(bytes(32), self.index, 0, length, length, place, place, offset, self.count, 0)
                )
                self.count += 1
            node.packed = b"".join(records)

    def finish_data(self) -> bytes:
        if self._layer.size % _TARFS_BLOCK:
            raise ImageError(f"the tar has {self._layer.size} bytes, which is no whole number of {_TARFS_BLOCK}")
        return b""

    def info(self, blob_id: str) -> BlobInfo:
        size = self._layer.length
        return replace(
            super().info(blob_id),
            features=int(BlobFeature.TARFS | BlobFeature.CAP_TAR_TOC),
            compressed_size=size,
            uncompressed_size=size,
            ci_compressor=Compressor.LZ4_BLOCK,
            meta_digest=b"",
            meta_size=0,
        )

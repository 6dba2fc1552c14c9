"""Writes a native blob: chunks in order, equal ones once, then chunk information, digests and the tail.

Runs in the process of the command, over what the workers packed. Small chunks of a batch are packed here, as only here
is known which of them are new. The bytes depend on the chunks and their order alone.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from struct import Struct
from typing import Protocol

from nydusd.codec.cipher import XtsCipher
from nydusd.codec.pack import pack
from nydusd.formats.blob_meta import CI_HEADER_SIZE, CiHeader, align_page, pack_header, pack_v1, pack_v2
from nydusd.formats.chunk_info import CHUNK_INFO
from nydusd.formats.model import BlobFeature, BlobInfo, Cipher, Compressor, Digester
from nydusd.formats.toc import ENTRY_BLOB, ENTRY_BOOTSTRAP, ENTRY_DIGEST, ENTRY_META, ENTRY_META_HEADER, TocEntry
from nydusd.formats.write.tail import pack_tar_header, pack_toc_entry
from nydusd.image.batches import BatchPacker
from nydusd.image.chunking import Packed, Piece
from nydusd.image.errors import ImageError
from nydusd.image.output import Output

MAX_CHUNKS = 0xFFFFFE
"""The largest index, all ones in 24 bits, means none."""

INLINED_ID = "x" * 64
"""Stands in the blob table of a bootstrap inside the blob: the id is not known yet. Readers take the file's name."""

_BATCH = Struct("<II32x")
_TOC_NAME = "rafs.blob.toc"
_COMPRESSED, _ENCRYPTED, _HAS_CRC = 0x1, 0x4, 0x10
_V2_COMPRESSED, _V2_BATCH, _V2_ENCRYPTED, _V2_CRC = 0x1, 0x4, 0x8, 0x10


@dataclass(frozen=True)
class BlobSettings:
    """How chunks are stored. `batch_size` 0 means no batches; `aligned` chunks begin at pages of the plain blob; `separate`:
    the chunks are in another file, a layer, and with `zran` that is a gzip stream with contexts; `prefetch`: all that is in it
    is to be read ahead."""

    version: int
    compressor: Compressor
    digester: Digester
    chunk_size: int
    batch_size: int = 0
    aligned: bool = True
    inline: bool = False
    toc: bool = False
    separate: bool = False
    zran: bool = False
    prefetch: bool = False
    cipher_key: bytes = b""
    cipher_iv: bytes = b""

    @property
    def features(self) -> int:
        bits = BlobFeature.CAP_TAR_TOC
        if self.version == 6:
            bits |= BlobFeature.ALIGNED
        if self.batch_size:
            bits |= BlobFeature.BATCH | BlobFeature.CHUNK_INFO_V2
        if self.cipher_key:
            bits |= BlobFeature.ENCRYPTED | BlobFeature.CHUNK_INFO_V2
        if self.separate:
            bits |= BlobFeature.SEPARATE | BlobFeature.CHUNK_INFO_V2
        if self.zran:
            bits |= BlobFeature.ZRAN
        if self.prefetch:
            bits |= BlobFeature.IS_SEPARATED_WITH_PREFETCH_FILES
        if self.inline:
            bits |= BlobFeature.INLINED_FS_META
        if self.toc:
            bits |= BlobFeature.HAS_TOC
        if self.toc or self.inline:
            bits |= BlobFeature.HAS_TAR_HEADER
        return int(bits)

    @property
    def ci_compressor(self) -> Compressor:
        """Nothing new is packed with gzip."""
        return Compressor.ZSTD if self.separate else self.compressor

    def cipher(self) -> XtsCipher | None:
        return XtsCipher(self.cipher_key, self.cipher_iv) if self.cipher_key else None


class Plain(Protocol):
    """Where plain chunks go, too: the cache file of a blob that is made together with it."""

    def put(self, at: int, data: bytes | memoryview) -> None: ...


class BlobWriter:
    """One blob. `add` chunks, then `finish_data`, then the tail. `reserve` gives it its place in the blob table when it
    gets its first chunk."""

    def __init__(
        self,
        out: Output,
        settings: BlobSettings,
        reserve: Callable[[], int],
        plain: Plain | None = None,
        threads: int = 1,
    ) -> None:
        """`threads` pack batches; `close` ends them."""
        self._out = out
        self._plain = plain
        self._settings = settings
        self._reserve = reserve
        self.index = -1
        self._cipher = settings.cipher()
        self._v1 = settings.version == 6 and not settings.features & BlobFeature.CHUNK_INFO_V2
        self._v2 = settings.version == 6 and not self._v1
        self._flags = _ENCRYPTED if self._cipher else 0
        self._ci = bytearray()
        self._digests = bytearray()
        self._batch = bytearray()
        self._batched: list[tuple[int, int, int]] = []  # of each chunk in it: uncompressed offset, size, place
        self._threads = threads
        self._packer: BatchPacker[tuple[int, list[tuple[int, int, int]]]] | None = None
        self._contexts = bytearray()
        self._coff = 0
        self._uoff = 0
        self.count = 0
        self._toc: list[TocEntry] = []
        self._header = CiHeader(0, Compressor.NONE, 0, 0, 0, 0, 0, 0, 0)
        self._toc_size, self._toc_digest = 0, bytes(32)
        self.prefetch_size = 0

    @property
    def table_id(self) -> str:
        """What the blob table calls the blob, if that is not the digest of what is written here."""
        return ""

    @property
    def is_file(self) -> bool:
        """Whether what is written here is to be kept."""
        return True

    @property
    def stored(self) -> int:
        """Bytes of chunk data so far."""
        return self._coff

    @property
    def plain_size(self) -> int:
        return self._uoff

    def add(self, piece: Piece, packed: Packed, data: memoryview) -> bytes:
        """Store a new chunk; its record. `data` is its stored form, or the chunk itself for a small one."""
        if self.count >= MAX_CHUNKS:
            raise ImageError(f"more than {MAX_CHUNKS} chunks in one blob: take a larger chunk size")
        if self.index < 0:
            self.index = self._reserve()
        crc, uoff, size, number = packed.crc, self._uoff, piece.size, self.count
        flags = self._flags | _HAS_CRC if crc else self._flags  # readers refuse a checksum of 0
        if self._plain is not None:
            self._plain.put(uoff, data)
        if piece.small:
            coff = csize = 0
            self._add_small(size, data)
        else:
            self._flush_batches()
            coff, csize = self._store(data), len(data)
            if packed.compressed:
                flags |= _COMPRESSED
            if self._v1:
                self._ci += pack_v1(coff, uoff, csize, size)
            elif self._v2:
                self._ci += pack_v2(coff, uoff, csize, size, _v2_flags(flags), crc)
        if self._settings.toc:
            self._digests += packed.digest
        self._uoff += align_page(size) if self._settings.aligned else size
        self.count += 1
        return CHUNK_INFO.pack(packed.digest, self.index, flags, csize, size, coff, uoff, piece.offset, number, crc)

    def _add_small(self, size: int, data: memoryview) -> None:
        if self._batch and len(self._batch) + size >= self._settings.batch_size:
            self._flush_batch()
        self._batched.append((self._uoff, size, len(self._batch)))
        self._batch += data

    def _flush_batch(self) -> None:
        """Have the batch packed. Its place, and so its chunks' records, are known when those before it are stored."""
        if self._packer is None:
            self._packer = BatchPacker(self._settings.compressor, self._threads, self._store_batch)
        self._packer.pack(bytes(self._batch), (len(self._batch), self._batched))
        self._batch.clear()
        self._batched = []

    def _store_batch(self, stored: bytes, what: tuple[int, list[tuple[int, int, int]]]) -> None:
        size, chunks = what
        if self._cipher is not None:
            stored = self._cipher.encrypt(stored)
        at = self._store(stored)
        bits = _V2_COMPRESSED | _V2_BATCH | (_V2_ENCRYPTED if self._cipher else 0)
        number = len(self._contexts) // _BATCH.size
        for uoff, usize, place in chunks:
            self._ci += pack_v2(at, uoff, 0, usize, bits, number << 32 | place)
        self._contexts += _BATCH.pack(len(stored), size)

    def _flush_batches(self) -> None:
        if self._batch:
            self._flush_batch()
        if self._packer is not None:
            self._packer.drain()

    def close(self) -> None:
        """End the threads, also after an error."""
        if self._packer is not None:
            self._packer.close()
            self._packer = None

    def _store(self, data: bytes | memoryview) -> int:
        at = self._coff
        self._out.write(data)
        self._coff += len(data)
        return at

    def finish_data(self) -> bytes:
        """Everything behind the chunks but the bootstrap and the table of contents; the plain chunk information.

        Empty for a blob without chunks, and for v5, which has none.
        """
        self._flush_batches()
        settings = self._settings
        out = self._out
        if not self.count:
            return b""
        if (settings.inline or settings.toc) and not settings.separate:
            out.write(pack_tar_header(ENTRY_BLOB, self._coff))
            if settings.toc:
                self._entry(ENTRY_BLOB, Compressor.NONE, out.digest(), 0, self._coff, self._uoff)
        if settings.version == 5:
            return b""
        ci = bytes(self._ci + self._contexts)
        stored, compressed = pack(settings.ci_compressor, ci)
        compressor = settings.ci_compressor if compressed else Compressor.NONE
        if self._cipher is not None:
            stored = self._cipher.encrypt(stored)
        self._set_header(compressor, out.position, len(stored), len(ci))
        header = pack_header(self._header)
        at = out.write(stored)
        out.write(self._cipher.encrypt(header) if self._cipher is not None else header)
        if settings.inline or settings.toc:
            out.write(pack_tar_header(ENTRY_META, len(stored) + CI_HEADER_SIZE))
        if settings.toc:
            self._entry(ENTRY_META, compressor, hashlib.sha256(ci).digest(), at, len(stored), len(ci))
            digest = hashlib.sha256(header).digest()
            self._entry(ENTRY_META_HEADER, Compressor.NONE, digest, at + len(stored), CI_HEADER_SIZE, CI_HEADER_SIZE)
            digests = bytes(self._digests)
            at = out.write(digests, hashed=False)  # the id of a blob leaves them out
            out.write(pack_tar_header(ENTRY_DIGEST, len(digests)))
            digest = hashlib.sha256(digests).digest()
            self._entry(ENTRY_DIGEST, Compressor.NONE, digest, at, len(digests), len(digests))
        return ci

    def _set_header(self, compressor: Compressor, offset: int, stored: int, plain: int) -> None:
        self._header = CiHeader(
            features=self._final_features(),
            ci_compressor=compressor,
            entries=self.count,
            ci_offset=offset,
            ci_compressed_size=stored,
            ci_uncompressed_size=plain,
            ctx_offset=len(self._ci) if self._settings.batch_size or self._settings.zran else 0,
            ctx_size=len(self._contexts),
            ctx_count=self._context_count(),
        )

    def _context_count(self) -> int:
        return len(self._contexts) // _BATCH.size

    @property
    def header(self) -> CiHeader:
        return self._header

    def _final_features(self) -> int:
        digests = BlobFeature.INLINED_CHUNK_DIGEST if self._settings.toc and self.count else 0
        return self._settings.features | digests

    def add_bootstrap(self, bootstrap: bytes | bytearray) -> None:
        """Put the bootstrap into the blob: as it is, or packed if there is a table of contents that says so."""
        stored, compressed = pack(Compressor.ZSTD, bytes(bootstrap)) if self._settings.toc else (bootstrap, False)
        at = self._out.write(stored)
        self._out.write(pack_tar_header(ENTRY_BOOTSTRAP, len(stored)))
        if self._settings.toc:
            compressor = Compressor.ZSTD if compressed else Compressor.NONE
            digest = hashlib.sha256(bootstrap).digest()
            self._entry(ENTRY_BOOTSTRAP, compressor, digest, at, len(stored), len(bootstrap))

    def add_toc(self) -> None:
        """End the blob with the table of contents, if it is to have one."""
        if not self._settings.toc or not self._toc:
            return
        table = b"".join(pack_toc_entry(entry) for entry in self._toc)
        tail = table + pack_tar_header(_TOC_NAME, len(table))
        self._out.write(tail)
        self._toc_size, self._toc_digest = len(tail), hashlib.sha256(tail).digest()

    def _entry(self, name: str, compressor: Compressor, digest: bytes, offset: int, stored: int, plain: int) -> None:
        self._toc.append(TocEntry(name, compressor, digest, offset, stored, plain))

    def info(self, blob_id: str) -> BlobInfo:
        """The entry of the blob table, as far as it is known now."""
        settings, header = self._settings, self._header
        return BlobInfo(
            index=self.index,
            blob_id=blob_id,
            features=self._final_features(),
            chunk_size=settings.chunk_size,
            chunk_count=self.count,
            compressor=settings.compressor,
            digester=settings.digester,
            cipher=Cipher.AES_128_XTS if settings.cipher_key else Cipher.NONE,
            compressed_size=self._out.position,
            uncompressed_size=self._uoff,
            ci_compressor=header.ci_compressor,
            ci_offset=header.ci_offset,
            ci_compressed_size=header.ci_compressed_size,
            ci_uncompressed_size=header.ci_uncompressed_size,
            toc_size=self._toc_size,
            toc_digest=self._toc_digest,
            meta_digest=b"",
            meta_size=0,
            prefetch_offset=0,
            prefetch_size=self.prefetch_size,
            cipher_key=settings.cipher_key,
            cipher_iv=settings.cipher_iv,
            meta_blob_id=blob_id,
        )


def _v2_flags(flags: int) -> int:
    bits = _V2_COMPRESSED if flags & _COMPRESSED else 0
    bits |= _V2_CRC if flags & _HAS_CRC else 0
    return bits | _V2_ENCRYPTED if flags & _ENCRYPTED else bits


def renumbered(info: BlobInfo, index: int) -> BlobInfo:
    """The same blob at another place of a blob table."""
    return replace(info, index=index)


def fresh_key() -> tuple[bytes, bytes]:
    """A random key and IV of AES-128-XTS, whose key halves must differ."""
    while (key := secrets.token_bytes(32))[:16] == key[16:]:
        pass
    return key, secrets.token_bytes(16)

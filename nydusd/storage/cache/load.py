"""Load a blob's metadata from wherever it is stored: chunk information, digest array, inlined bootstrap.

Run by fetch workers. `read(offset, size)` gives exactly `size` bytes of the stored object that holds the metadata or
raises `BackendError`; nothing here opens files. What is returned was decrypted, unpacked and checked.
"""

from __future__ import annotations

from collections.abc import Callable

from nydusd.codec.cipher import XtsCipher
from nydusd.codec.compress import Buffer, decompress
from nydusd.codec.digest import sha256
from nydusd.codec.errors import CodecError
from nydusd.errors import FormatError
from nydusd.formats import toc
from nydusd.formats.blob_meta import (
    CI_HEADER_SIZE,
    CiHeader,
    align_page,
    check_ci_sizes,
    pack_header,
    parse_header,
    validate_header,
)
from nydusd.formats.model import MAX_CHUNKS, BlobInfo, Cipher

Read = Callable[[int, int], Buffer]


def load_ci(info: BlobInfo, read: Read) -> tuple[CiHeader, bytes]:
    """Header and unpacked chunk information of a v6 blob, with one read from the object `info.meta_blob_id`.

    The records themselves are checked when the chunk table is built. Raises `FormatError`, and what `read` raises.
    """
    where = f"blob {info.meta_blob_id}"
    check_ci_sizes(info, where)
    raw = memoryview(read(info.ci_offset, info.ci_compressed_size + CI_HEADER_SIZE))
    stored: Buffer = raw[: info.ci_compressed_size]
    head: Buffer = raw[info.ci_compressed_size :]
    try:
        if info.cipher != Cipher.NONE:
            cipher = XtsCipher(info.cipher_key, info.cipher_iv)
            stored, head = cipher.decrypt(stored), cipher.decrypt(head)
        header = parse_header(head, where)
        validate_header(header, info, where)
        return header, bytes(decompress(info.ci_compressor, stored, info.ci_uncompressed_size))
    except CodecError as error:
        raise FormatError(where, "chunk information", str(error)) from error


def meta_file_bytes(header: CiHeader, ci: Buffer) -> bytes:
    """The content of `<id>.blob.meta`: chunk information padded with zeros to 4096, then the plain header."""
    return b"".join((ci, bytes(align_page(len(ci)) - len(ci)), pack_header(header)))


def parse_meta_file(buf: Buffer, info: BlobInfo, where: str) -> tuple[CiHeader, bytes]:
    """The inverse of `meta_file_bytes`. Raises `FormatError` if it is not the metadata of this blob, or not whole."""
    check_ci_sizes(info, where)
    body = align_page(info.ci_uncompressed_size)
    if len(buf) != body + CI_HEADER_SIZE:
        raise FormatError(where, "size", f"{len(buf)} bytes; {body + CI_HEADER_SIZE} expected")
    header = parse_header(memoryview(buf)[body:], where)
    validate_header(header, info, where)
    return header, bytes(buf[: info.ci_uncompressed_size])


def load_digest_array(info: BlobInfo, read: Read, blob_size: int) -> bytes:
    """The 32-byte digests of all chunks, from a blob with INLINED_CHUNK_DIGEST; `blob_size` is the object's length.

    Raises `FormatError` if the blob has no such array, or if it is not the one its table of contents promises.
    """
    where = f"blob {info.meta_blob_id}"
    tail = read(*_tail(blob_size, info.toc_size))
    entries = toc.parse_toc(tail, blob_size, where, toc_size=info.toc_size, toc_digest=info.toc_digest)
    entry = entries.get(toc.ENTRY_DIGEST)
    if entry is None:
        raise FormatError(where, "toc", f"no entry {toc.ENTRY_DIGEST!r}: the blob has no digest array")
    if not 0 < info.chunk_count <= MAX_CHUNKS:
        raise FormatError(where, "chunk_count", f"{info.chunk_count}; it must be 1 to {MAX_CHUNKS}")
    if entry.uncompressed_size != 32 * info.chunk_count or entry.stored_size != entry.uncompressed_size:
        raise FormatError(
            where,
            toc.ENTRY_DIGEST,
            f"{entry.uncompressed_size} bytes stored in {entry.stored_size}; "
            f"{32 * info.chunk_count} for {info.chunk_count} chunks, stored as they are, expected",
        )
    array = bytes(read(entry.offset, entry.stored_size))
    if entry.digest is not None and sha256(array) != entry.digest:
        raise FormatError(where, toc.ENTRY_DIGEST, f"its sha256 is not {entry.digest.hex()}")
    return array


def extract_bootstrap(read: Read, blob_size: int, where: str) -> bytes:
    """The bootstrap inside a blob of `blob_size` bytes, unpacked; its digest is checked if the blob gives one.

    Raises `FormatError` if there is none or it is damaged, `UnsupportedError` above 1 GiB.
    """
    found = toc.locate_bootstrap(read(*_tail(blob_size, 0)), blob_size, where)
    try:
        plain = bytes(decompress(found.compressor, read(found.offset, found.stored_size), found.uncompressed_size))
    except CodecError as error:
        raise FormatError(where, toc.ENTRY_BOOTSTRAP, str(error)) from error
    if found.digest is not None and sha256(plain) != found.digest:
        raise FormatError(where, toc.ENTRY_BOOTSTRAP, f"its sha256 is not {found.digest.hex()}, which the TOC says")
    return plain


def _tail(blob_size: int, toc_size: int) -> tuple[int, int]:
    """Offset and length of the tail to read: the TOC if its size is known, else what surely holds one."""
    size = toc_size if toc.MIN_TOC_SIZE <= toc_size <= min(toc.MAX_TOC_SIZE, blob_size) else toc.tail_size(blob_size)
    return blob_size - size, size

"""Loading metadata from a blob: chunk information plain, packed and encrypted; digest arrays; inlined bootstraps."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import tarfile
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nydusd.codec.cipher import XtsCipher
from nydusd.errors import FormatError
from nydusd.formats.blob_meta import pack_header, pack_v1, pack_v2
from nydusd.formats.model import BlobFeature, BlobInfo, Compressor
from nydusd.storage.cache.load import extract_bootstrap, load_ci, load_digest_array, meta_file_bytes, parse_meta_file
from tests.support.blobs import V2, blob_info, header_for

KEY, IV = bytes(range(32)), b"\x05" * 16
DATA = b"chunk data " * 10
CI = b"".join(pack_v1(i, i * 4096, 1, 2) for i in range(300))


def reader_of(blob: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        assert offset >= 0 and offset + size <= len(blob), "read outside of the blob"
        return blob[offset : offset + size]

    return read


def make(
    ci: bytes = CI, *, compressor: Compressor = Compressor.NONE, encrypted: bool = False, features: int = 1
) -> tuple[BlobInfo, bytes]:
    """A blob table entry and the blob: data, stored chunk information, header."""
    stored = zstandard.compress(ci) if compressor == Compressor.ZSTD else ci
    info = blob_info(
        ci=ci,
        features=features | (int(BlobFeature.ENCRYPTED) if encrypted else 0),
        chunk_count=len(ci) // (24 if features & V2 else 16),
        ci_offset=len(DATA),
        ci_compressor=compressor,
        ci_compressed_size=len(stored),
        key=KEY if encrypted else b"",
        iv=IV if encrypted else b"",
    )
    header = pack_header(header_for(info))
    if encrypted:
        cipher = XtsCipher(KEY, IV)
        stored, header = cipher.encrypt(stored), cipher.encrypt(header)
    return info, DATA + stored + header + b"tail"


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.ZSTD])
def test_chunk_information_is_loaded_with_one_read(compressor: Compressor) -> None:
    info, blob = make(compressor=compressor)
    calls = []

    def read(offset: int, size: int) -> bytes:
        calls.append((offset, size))
        return reader_of(blob)(offset, size)

    assert load_ci(info, read) == (header_for(info), CI)
    assert calls == [(len(DATA), info.ci_compressed_size + 4096)]


@pytest.mark.parametrize("compressor", [Compressor.NONE, Compressor.ZSTD])
def test_both_parts_of_an_encrypted_blob_are_decrypted(compressor: Compressor) -> None:
    ci = b"".join(pack_v2(i, i * 4096, 1, 2, 9, 0) for i in range(300))
    info, blob = make(ci, compressor=compressor, encrypted=True, features=V2)
    assert load_ci(info, reader_of(blob)) == (header_for(info), ci)
    wrong_key = dataclasses.replace(info, cipher_key=KEY[::-1])
    with pytest.raises(FormatError, match="magics"):
        load_ci(wrong_key, reader_of(blob))
    with pytest.raises(FormatError, match="aes-128-xts"):
        load_ci(dataclasses.replace(info, cipher_key=bytes(32)), reader_of(blob))


def test_damaged_chunk_information_is_a_format_error() -> None:
    info, blob = make(compressor=Compressor.ZSTD)
    broken = blob[: len(DATA)] + b"\0\0\0\0" + blob[len(DATA) + 4 :]
    with pytest.raises(FormatError, match="chunk information: zstd"):
        load_ci(info, reader_of(broken))


def test_a_bomb_in_place_of_chunk_information_is_refused() -> None:
    info, _ = make()
    bomb = zstandard.compress(bytes(64 << 20))
    info = dataclasses.replace(info, ci_compressor=Compressor.ZSTD, ci_compressed_size=len(bomb))
    with pytest.raises(FormatError, match="the frame claims 67108864 bytes"):
        load_ci(info, reader_of(DATA + bomb + pack_header(header_for(info))))


def test_wrong_sizes_are_refused_before_anything_is_read() -> None:
    info, _ = make()
    for changed in ({"chunk_count": 299}, {"ci_uncompressed_size": 1 << 60}, {"ci_compressed_size": 1 << 60}):
        with pytest.raises(FormatError):
            load_ci(dataclasses.replace(info, **changed), reader_of(b""))  # type: ignore[arg-type]


# --- <id>.blob.meta ------------------------------------------------------------------------------------------------


def test_meta_file_has_the_known_layout() -> None:
    info, _ = make()
    content = meta_file_bytes(header_for(info), CI)
    assert len(content) == 8192 + 4096
    assert content[:4800] == CI and not any(content[4800:8192]) and content[8192:] == pack_header(header_for(info))
    assert parse_meta_file(content, info, "meta") == (header_for(info), CI)


def test_meta_files_that_are_not_whole_or_not_of_this_blob_are_refused() -> None:
    info, _ = make()
    content = meta_file_bytes(header_for(info), CI)
    for wrong in (content[:-1], content + b"\0", b"", bytes(len(content))):
        with pytest.raises(FormatError):
            parse_meta_file(wrong, info, "meta")
    with pytest.raises(FormatError, match="ci_offset"):
        parse_meta_file(content, dataclasses.replace(info, ci_offset=1), "meta")


@given(position=st.integers(0, 59) | st.integers(4092, 4095), bit=st.integers(0, 7))
def test_a_changed_bit_in_a_header_is_noticed_or_harmless(position: int, bit: int) -> None:
    info, _ = make()
    content = bytearray(meta_file_bytes(header_for(info), CI))
    content[8192 + position] ^= 1 << bit
    # features (4..8) and the context fields (40..60) mean nothing in a blob without contexts
    if 4 <= position < 8 or 40 <= position < 60:
        assert parse_meta_file(content, info, "meta")[1] == CI
    else:
        with pytest.raises(FormatError):
            parse_meta_file(content, info, "meta")


# --- digest array and bootstrap ------------------------------------------------------------------------------------


def tar_header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def with_toc(body: bytes, name: bytes, stored: int, plain: bytes, flags: int) -> bytes:
    """`body` and a TOC whose one entry is the last `stored` bytes of it."""
    digest = hashlib.sha256(plain).digest()
    entry = struct.pack("<II16s32sQQQ48x", flags, 0, name, digest, len(body) - stored, stored, len(plain))
    return body + entry + tar_header("rafs.blob.toc", 128)


ARRAY = bytes(range(64)) + b"z" * (300 * 32 - 64)


def test_digest_array_is_found_and_checked() -> None:
    info, _ = make()
    blob = with_toc(DATA + ARRAY, b"blob.digest", len(ARRAY), ARRAY, 1)
    assert load_digest_array(info, reader_of(blob), len(blob)) == ARRAY
    known = dataclasses.replace(info, toc_size=640, toc_digest=hashlib.sha256(blob[-640:]).digest())
    assert load_digest_array(known, reader_of(blob), len(blob)) == ARRAY
    broken = blob.replace(b"zzz", b"zyz", 1)
    with pytest.raises(FormatError, match=r"blob\.digest: its sha256"):
        load_digest_array(info, reader_of(broken), len(broken))
    with pytest.raises(FormatError, match="9568 for 299 chunks"):
        load_digest_array(dataclasses.replace(info, chunk_count=299), reader_of(blob), len(blob))
    other = with_toc(DATA, b"blob.meta", 10, DATA[:10], 1)
    with pytest.raises(FormatError, match=r"no entry 'blob\.digest'"):
        load_digest_array(info, reader_of(other), len(other))


@pytest.mark.parametrize("toc_size", [1, 511, 0x10001, 1 << 31])
def test_impossible_toc_sizes_do_not_lead_outside_of_the_blob(toc_size: int) -> None:
    info, _ = make()
    blob = with_toc(DATA + ARRAY, b"blob.digest", len(ARRAY), ARRAY, 1)
    with pytest.raises(FormatError, match="the blob table says"):
        load_digest_array(dataclasses.replace(info, toc_size=toc_size), reader_of(blob), len(blob))


BOOTSTRAP = b"superblock and inodes " * 400


def test_bootstrap_inside_a_blob_is_extracted_in_every_form() -> None:
    raw = DATA + BOOTSTRAP + tar_header("image.boot", len(BOOTSTRAP))
    assert extract_bootstrap(reader_of(raw), len(raw), "blob") == BOOTSTRAP
    plain = with_toc(DATA + BOOTSTRAP, b"image.boot", len(BOOTSTRAP), BOOTSTRAP, 1)
    assert extract_bootstrap(reader_of(plain), len(plain), "blob") == BOOTSTRAP
    packed = zstandard.compress(BOOTSTRAP)
    packed_blob = with_toc(DATA + packed, b"image.boot", len(packed), BOOTSTRAP, 2)
    assert extract_bootstrap(reader_of(packed_blob), len(packed_blob), "blob") == BOOTSTRAP


def test_damaged_bootstraps_are_refused() -> None:
    blob = with_toc(DATA + BOOTSTRAP, b"image.boot", len(BOOTSTRAP), BOOTSTRAP, 1)
    broken = blob.replace(b"superblock", b"Superblock", 1)
    with pytest.raises(FormatError, match=r"image\.boot: its sha256"):
        extract_bootstrap(reader_of(broken), len(broken), "blob")
    packed = with_toc(DATA + b"not zstd", b"image.boot", 8, BOOTSTRAP, 2)
    with pytest.raises(FormatError, match=r"image\.boot: zstd"):
        extract_bootstrap(reader_of(packed), len(packed), "blob")
    for small in (b"", b"x" * 100, b"x" * 511, b"x" * 5000):
        with pytest.raises(FormatError, match="tail"):
            extract_bootstrap(reader_of(small), len(small), "blob")

"""Digests, CRC-32C and AES-128-XTS against published values and values that the reference's code gave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.codec.cipher import XtsCipher
from nydusd.codec.crc import crc32c
from nydusd.codec.digest import digest
from nydusd.codec.errors import CodecError
from nydusd.formats.model import Digester

KEY = b"\x0c" * 31 + b"\x0a"
IV = bytes(16)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_crc32c_has_the_check_value(kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
    assert crc32c(kind(b"123456789")) == 0xE3069283


def test_digests_have_the_published_values() -> None:
    empty_sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    empty_blake3 = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest(Digester.SHA256, b"").hex() == empty_sha256
    assert digest(Digester.BLAKE3, memoryview(b"")).hex() == empty_blake3


@pytest.mark.parametrize(
    ("plain", "stored"),
    [
        (b"1", "1df853e84717cce491f7bcb79c9edfb42ed2"),
        (b"1" * 16, "9540c7af157157d78f9124ebeef9189b"),
        (b"1" * 17, "67a2d8fcc3beed670bb626feab5a03f295"),
    ],
)
def test_xts_gives_the_known_ciphertexts(plain: bytes, stored: str) -> None:
    cipher = XtsCipher(KEY, IV)
    assert cipher.encrypt(plain).hex() == stored
    assert cipher.decrypt(memoryview(bytes.fromhex(stored))) == plain


@given(plain=st.binary(max_size=200).filter(lambda plain: not (len(plain) == 18 and plain.endswith(b"\x78\x90"))))
def test_xts_round_trip(plain: bytes) -> None:
    cipher = XtsCipher(bytes(range(32)), b"\x01" * 16)
    stored = cipher.encrypt(plain)
    assert len(stored) == (18 if 0 < len(plain) < 16 else len(plain))
    assert (cipher.decrypt(stored) if stored else b"") == plain


def test_padding_that_is_none_is_refused() -> None:
    cipher = XtsCipher(KEY, IV)
    stored = cipher.encrypt(b"x" * 15 + b"\x10" + b"\x78\x90")
    with pytest.raises(CodecError, match="padding of 16"):
        cipher.decrypt(stored)


@pytest.mark.parametrize("length", [0, 1, 15, (1 << 24) + 1])
def test_units_that_xts_cannot_hold_are_refused(length: int) -> None:
    with pytest.raises(CodecError, match="a unit has 16 to"):
        XtsCipher(KEY, IV).decrypt(bytes(length))


@pytest.mark.parametrize(("key", "iv"), [(bytes(32), IV), (b"k" * 31, IV), (KEY, b"i" * 15), (b"", b"")])
def test_unusable_keys_are_refused(key: bytes, iv: bytes) -> None:
    with pytest.raises(CodecError, match="aes-128-xts"):
        XtsCipher(key, iv)

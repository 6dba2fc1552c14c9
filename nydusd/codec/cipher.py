"""AES-128-XTS as images use it. Run by workers that meet an encrypted blob: `cryptography` is imported only then.

Every chunk, the chunk information and its header are one XTS data unit each, all with the same key and the same tweak
(the blob's IV); lengths that are not a multiple of 16 use ciphertext stealing, which XTS defines from 16 bytes up.
Shorter inputs are padded to 16 with bytes of value 16 - length, then 0x78 0x90 is appended: 18 bytes are encrypted.
"""

from __future__ import annotations

from nydusd.codec.compress import Buffer
from nydusd.codec.errors import CodecError

_BLOCK = 16
_PADDED = 18
_PADDING_MARK = b"\x78\x90"
_MAX_UNIT = 1 << 24
"""Most bytes of one XTS data unit (2**20 blocks), a rule of the XTS standard."""


class XtsCipher:
    """One blob's key and IV. Raises `CodecError` if they cannot be used (lengths, or equal key halves)."""

    def __init__(self, key: bytes, iv: bytes) -> None:
        if len(key) != 32 or len(iv) != 16:
            raise CodecError(f"aes-128-xts: key of {len(key)} and IV of {len(iv)} bytes; 32 and 16 are needed")
        if key[:16] == key[16:]:
            raise CodecError("aes-128-xts: both halves of the key are equal, which XTS forbids")
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
        from cryptography.hazmat.primitives.ciphers.modes import XTS

        self._cipher = Cipher(AES(key), XTS(iv))

    def encrypt(self, plain: Buffer) -> bytes:
        """The stored form of `plain`: as long, or 18 bytes for 1 to 15. Empty input stays empty."""
        if not plain:
            return b""
        data = bytes(plain)
        if len(data) < _BLOCK:
            data = data.ljust(_BLOCK, bytes((_BLOCK - len(data),))) + _PADDING_MARK
        self._check(data)
        encryptor = self._cipher.encryptor()
        return encryptor.update(data) + encryptor.finalize()

    def decrypt(self, data: Buffer) -> bytes:
        """The bytes that were encrypted. 18 bytes that end like padding are taken as padded, as the format has it.

        Raises `CodecError` for fewer than 16 bytes, more than 16 MiB, or padding that is not one.
        """
        self._check(data)
        decryptor = self._cipher.decryptor()
        plain = decryptor.update(data) + decryptor.finalize()
        if len(plain) == _PADDED and plain.endswith(_PADDING_MARK):
            pad = plain[_BLOCK - 1]
            if pad >= _BLOCK:
                raise CodecError(f"aes-128-xts: padding of {pad} bytes; it must be below 16")
            return plain[: _BLOCK - pad]
        return plain

    @staticmethod
    def _check(data: Buffer) -> None:
        if not _BLOCK <= len(data) <= _MAX_UNIT:
            raise CodecError(f"aes-128-xts: {len(data)} bytes; a unit has 16 to {_MAX_UNIT}")

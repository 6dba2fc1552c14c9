"""The error of this package: bytes that do not decode. Raised in workers; callers add blob and chunk and re-raise."""

from __future__ import annotations

from nydusd.errors import NydusError


class CodecError(NydusError):
    """Bytes do not decode to what was promised (stream, length, padding), or a key cannot be used."""

"""The number fields of tar headers. Pure."""

from __future__ import annotations

from nydusd.image.errors import ImageError


def number(field: bytes, what: str) -> int:
    """Octal digits with spaces and NULs around them, or a binary number (first bit set). Empty is 0.

    Raises `ImageError` that says `what` is wrong.
    """
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:  # two's complement of all bits but the mark
            value -= 1 << (8 * len(field) - 1)
        return value
    digits = field.split(b"\0", 1)[0].strip(b" ") or field.strip(b"\0 ")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise ImageError(f"{what}: {field!r} is no octal number")
    return int(digits, 8)


def decimal(text: bytes, what: str) -> int:
    """A decimal number as PAX headers have it, without sign."""
    if not text or len(text) > 20 or text.strip(b"0123456789"):
        raise ImageError(f"{what}: {text[:40]!r} is no number")
    return int(text)


def timestamp(text: bytes, what: str) -> tuple[int, int]:
    """Seconds and nanoseconds of a PAX time such as `-1.25`, rounded down."""
    sign = text.startswith(b"-")
    whole, _, part = text.lstrip(b"-").partition(b".")
    if part.strip(b"0123456789"):
        raise ImageError(f"{what}: {text[:40]!r} is no time")
    seconds, fraction = decimal(whole or b"0", what), part[:9].ljust(9, b"0")
    nanoseconds = int(fraction)
    if not sign:
        return seconds, nanoseconds
    if part[9:].strip(b"0"):
        nanoseconds += 1
    total = -(seconds * 10**9 + nanoseconds)
    return total // 10**9, total % 10**9

"""What the kernel says on /dev/cachefiles, and how it is answered. Pure.

One message a read(2), in the machine's byte order. OPEN brings a descriptor of the file that the kernel wants filled, and is
answered by `copen`; READ names a range that must be in that file before it is answered; CLOSE has no answer.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from nydusd.errors import FormatError

READ_SIZE: Final = 4096
"""Bytes that a message has at most: the kernel's limit is 1024."""
READ_COMPLETE: Final = 0x40049801
"""The ioctl on a file's descriptor that answers a READ: its argument is the number of the message."""
_HEADER = Struct("=IIII")
_OPEN = Struct("=IIII")
_READ = Struct("=QQ")
_OPEN_CODE, _CLOSE_CODE, _READ_CODE = 0, 1, 2
_WHERE = "/dev/cachefiles"
_VOLUME = b"erofs,"


class Open(NamedTuple):
    """The kernel opens a file: `domain` and `key` say which, `fd` is our descriptor of it."""

    number: int
    object_id: int
    domain: str
    key: str
    fd: int


class Close(NamedTuple):
    """The kernel needs the file no more."""

    number: int
    object_id: int


class Read(NamedTuple):
    """A reader waits for a range of a file."""

    number: int
    object_id: int
    offset: int
    length: int


def parse(raw: bytes) -> Open | Close | Read:
    """One message. Raises FormatError for what is none, see `refused`."""
    if len(raw) < _HEADER.size:
        raise FormatError(_WHERE, "message", f"{len(raw)} bytes, a header has {_HEADER.size}")
    number, code, length, object_id = _HEADER.unpack_from(raw)
    if length != len(raw):
        raise FormatError(_WHERE, "length", f"{length}, but {len(raw)} bytes were read")
    body = raw[_HEADER.size :]
    if code == _OPEN_CODE:
        return _open(number, object_id, body)
    if code == _CLOSE_CODE:
        return Close(number, object_id)
    if code != _READ_CODE:
        raise FormatError(_WHERE, "opcode", f"{code}, known are {_OPEN_CODE} to {_READ_CODE}")
    if len(body) < _READ.size:
        raise FormatError(_WHERE, "read", f"{len(body)} bytes, {_READ.size} expected")
    offset, count = _READ.unpack_from(body)
    return Read(number, object_id, offset, count)


def _open(number: int, object_id: int, body: bytes) -> Open:
    if len(body) < _OPEN.size:
        raise FormatError(_WHERE, "open", f"{len(body)} bytes, {_OPEN.size} at least expected")
    volume_size, key_size, fd, _flags = _OPEN.unpack_from(body)
    keys = body[_OPEN.size :]
    if volume_size + key_size > len(keys):
        raise FormatError(_WHERE, "open", f"keys of {volume_size} and {key_size} bytes in {len(keys)}")
    volume = keys[:volume_size].split(b"\0", 1)[0]
    key = keys[volume_size : volume_size + key_size].rstrip(b"\0")
    if not volume.startswith(_VOLUME):
        raise FormatError(_WHERE, "volume", f"{volume[:64]!r} is not of EROFS")
    domain = volume.removeprefix(_VOLUME)
    return Open(number, object_id, domain.decode(errors="replace"), key.decode(errors="replace"), fd)


def refused(raw: bytes) -> tuple[int, int] | None:
    """Number and descriptor of an OPEN that `parse` does not understand, for its refusal; None if it is not even that."""
    if len(raw) < _HEADER.size + _OPEN.size:
        return None
    number, code, _, _ = _HEADER.unpack_from(raw)
    return (number, _OPEN.unpack_from(raw, _HEADER.size)[2]) if code == _OPEN_CODE else None


def copen(number: int, size: int) -> bytes:
    """The answer to OPEN: the file's size in bytes, or a negative errno."""
    return b"copen %d,%d" % (number, size)


RESTORE: Final = b"restore"
"""Have the kernel say again what nobody has answered."""


def setup(folder: str, tag: str | None) -> list[bytes]:
    """The commands that begin a cache in this folder, in their order. Raises FormatError for what cannot be said."""
    for field, text in (("folder", folder), ("tag", tag or "")):
        if "\n" in text or len(text.encode(errors="surrogateescape")) > 4000:
            raise FormatError(_WHERE, field, f"{text[:64]!r} cannot be told to the kernel")
    commands = [b"dir " + folder.encode(errors="surrogateescape")]
    if tag is not None:
        commands.append(b"tag " + tag.encode(errors="surrogateescape"))
    return [*commands, b"bind ondemand"]

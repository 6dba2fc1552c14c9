"""The bytes of the NBD protocol: fixed newstyle negotiation, simple replies, reads only. Pure: no sockets.

All numbers are big-endian. A client that breaks the rules in a way that leaves no telling where its next message begins is to
be disconnected (`ProtocolError`); anything else is answered with an error.
"""

from __future__ import annotations

import errno
from struct import Struct
from typing import Final, NamedTuple

GREETING: Final = b"NBDMAGIC" + b"IHAVEOPT" + b"\0\x03"
"""With the flags FIXED_NEWSTYLE and NO_ZEROES."""
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">8sII")
REQUEST: Final = Struct(">IHHQQI")
REPLY: Final = Struct(">IIQ")
_OPTION_REPLY = Struct(">QIII")
_EXPORT = Struct(">HQH")
_BLOCKS = Struct(">HIII")
_KNOWN_FLAGS, _NO_ZEROES = 0x3, 0x2
_REQUEST_MAGIC, _REPLY_MAGIC, _OPTION_REPLY_MAGIC = 0x25609513, 0x67446698, 0x3E889045565A9
_OPTION_MAGIC = b"IHAVEOPT"
_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO = 1, 2, 3, 6, 7
_ACK, _SERVER = 1, 2
_INFO_REPLY = 3
_UNSUPPORTED, _INVALID, _UNKNOWN = 0x80000001, 0x80000003, 0x80000006
_INFO_EXPORT, _INFO_BLOCKS = 0, 3
_FLAGS = 0x1 | 0x2 | 0x100
"""HAS_FLAGS, READ_ONLY, CAN_MULTI_CONN."""
OPTION_MOST: Final = 8192
"""Bytes of an option's data: a name has 4096 at most."""
READ_MOST: Final = 32 << 20
"""Bytes of one read, as the protocol wants it."""
PAYLOAD_MOST: Final = 32 << 20
"""Bytes that come with a write, which is refused."""
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = 0, 1, 2, 3, 4, 5, 6


class ProtocolError(Exception):
    """The client cannot be followed any more."""


class Request(NamedTuple):
    """A command; `cookie` names it in the reply, `slot` is its place in the connection's memory."""

    kind: int
    cookie: int
    offset: int
    length: int
    slot: int = 0


class Export(NamedTuple):
    """What is exported: bytes, and the size of its blocks."""

    size: int
    block: int


def client_flags(raw: bytes) -> bool:
    """Whether the client wants no zeros behind the reply to EXPORT_NAME. Raises ProtocolError."""
    (flags,) = CLIENT_FLAGS.unpack(raw)
    if flags & ~_KNOWN_FLAGS or not flags & 1:
        raise ProtocolError(f"client flags {flags:#x}")
    return bool(flags & _NO_ZEROES)


def option_length(head: bytes) -> int:
    """Bytes of data behind the head of an option. Raises ProtocolError."""
    magic, _, length = OPTION.unpack(head)
    if magic != _OPTION_MAGIC:
        raise ProtocolError(f"option magic {magic!r}")
    if length > OPTION_MOST:
        raise ProtocolError(f"an option of {length} bytes")
    return int(length)


class Answer(NamedTuple):
    """What to send after an option; `serve`: commands come next; `end`: the client goes."""

    data: bytes
    serve: bool = False
    end: bool = False


def option(head: bytes, data: bytes, export: Export, no_zeroes: bool) -> Answer:
    """The answer to an option."""
    _, kind, _ = OPTION.unpack(head)
    if kind == _EXPORT_NAME:
        if data not in NAMES:
            return Answer(b"", end=True)  # the protocol has no other way to refuse
        return Answer(_EXPORT.pack(0, export.size, _FLAGS)[2:] + (b"" if no_zeroes else bytes(124)), serve=True)
    if kind == _ABORT:
        return Answer(_option_reply(kind, _ACK), end=True)
    if kind == _LIST:
        if data:
            return Answer(_option_reply(kind, _INVALID))
        name = NAMES[0]
        return Answer(_option_reply(kind, _SERVER, len(name).to_bytes(4, "big") + name) + _option_reply(kind, _ACK))
    if kind in (_INFO, _GO):
        return _info(kind, data, export)
    return Answer(_option_reply(kind, _UNSUPPORTED))


NAMES: Final = (b"", b"image")
"""Of the one export, the default first."""


def _info(kind: int, data: bytes, export: Export) -> Answer:
    """INFO and GO: name, then 16-bit numbers of what the client wants to know."""
    length = int.from_bytes(data[:4], "big")
    name, rest = data[4 : 4 + length], data[4 + length :]
    if len(data) < 6 or len(name) != length or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
        return Answer(_option_reply(kind, _INVALID))
    if name not in NAMES:
        return Answer(_option_reply(kind, _UNKNOWN))
    out = _option_reply(kind, _INFO_REPLY, _EXPORT.pack(_INFO_EXPORT, export.size, _FLAGS))
    out += _option_reply(kind, _INFO_REPLY, _BLOCKS.pack(_INFO_BLOCKS, 1, export.block, READ_MOST))
    return Answer(out + _option_reply(kind, _ACK), serve=kind == _GO)


def _option_reply(kind: int, code: int, data: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, kind, code, len(data)) + data


def request(raw: bytes | memoryview, slot: int = 0) -> Request:
    """A command's head. Raises ProtocolError."""
    magic, _flags, kind, cookie, offset, length = REQUEST.unpack(raw)
    if magic != _REQUEST_MAGIC:
        raise ProtocolError(f"request magic {magic:#x}")
    if kind == WRITE and length > PAYLOAD_MOST:
        raise ProtocolError(f"a write of {length} bytes")
    return Request(kind, cookie, offset, length, slot)


def refusal(asked: Request, export: Export) -> int:
    """The errno for a command that is not done, 0 for one that is."""
    if asked.kind in (WRITE, TRIM, ZEROES):
        return errno.EPERM
    if asked.kind not in (READ, FLUSH, CACHE, DISC):
        return errno.EINVAL
    if asked.kind in (READ, CACHE):
        if not 0 < asked.length <= READ_MOST:
            return errno.EINVAL
        if asked.offset + asked.length > export.size:
            return errno.EINVAL
    return 0


def reply(cookie: int, code: int) -> bytes:
    """The head of a reply; the data of a read follow it if `code` is 0."""
    return REPLY.pack(_REPLY_MAGIC, code if code in _SENDABLE else errno.EIO if code else 0, cookie)


_SENDABLE = (0, errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW)
"""The errnos that the protocol has."""

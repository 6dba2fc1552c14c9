"""The stored chunk map, in the reference's format, and the record of identity beside it.

`<blob>.blob.data.chunk_map`: a 4096-byte header (u32 magic 0x424D4150, u32 version 1, u32 magic2 0x434D4150, u32 all-ready
marker 0 or 0x4D4D4150, zeros) and ceil(n/8) bytes of bits, most significant bit first. Its size is exact.

Only a checkpoint writes it (`checkpoint`), in this order: fdatasync of the data file, then the bits, then fdatasync of
the map, then the record. So a bit on disk implies its data on disk, whatever is killed or loses power when.
The record `<blob>.blob.data.chunk_map.nydusd` (a line of JSON, then our own bits) says which data file the map was written
for and which bits are ours. Those are believed; bits that another daemon has set are believed only chunk by chunk, after
the digest was checked (state VERIFY). In both cases a chunk with a hole in its range is not there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

from nydusd.errors import CacheError
from nydusd.storage.state.segment import EMPTY, READY, VERIFY, Identity

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<IIII")
_MAGIC, _VERSION, _MAGIC2, _ALL_READY = 0x424D4150, 1, 0x434D4150, 0x4D4D4150
HEADER_SIZE = 4096

_F_OFD_SETLKW = 38
_FLOCK = struct.Struct("hhqqi4x")
_BITS = [bytes(READY if byte >> (7 - bit) & 1 else EMPTY for bit in range(8)) for byte in range(256)]
_JUDGE = {(EMPTY, EMPTY): EMPTY, (EMPTY, READY): EMPTY, (READY, READY): READY, (READY, EMPTY): VERIFY}
_RECORD_LIMIT = 4096


def record_path(path: Path) -> Path:
    """Where the identity record of a map lies."""
    return path.with_name(path.name + ".nydusd")


def _lock(fd: int) -> None:
    """Wait for the map's lock; it ends when the fd is closed, so also when its holder is killed."""
    fcntl.fcntl(fd, _F_OFD_SETLKW, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))


def _set_aside(path: Path, why: str) -> None:
    bad = path.with_name(path.name + ".bad")
    log.warning("chunk map %s: %s; renamed to %s, starting empty", path, why, bad.name)
    os.replace(path, bad)


def _fault(raw: bytes, count: int) -> str | None:
    """What is wrong with a map file's bytes, or None."""
    size = HEADER_SIZE + (count + 7) // 8
    if len(raw) != size:
        return f"size is {len(raw)}, {size} expected for {count} chunks"
    if not any(raw):
        return None
    magic, version, magic2, _all_ready = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        return f"magic is {magic:#x}, {_MAGIC:#x} expected"
    if version > _VERSION:
        return f"version is {version}, at most {_VERSION} expected"
    if version == _VERSION and magic2 != _MAGIC2:
        return f"magic2 is {magic2:#x}, {_MAGIC2:#x} expected"
    if count % 8 and raw[-1] & (0xFF >> count % 8):
        return "padding bits in the last byte are set"
    return None


def _own_bits(path: Path, identity: Identity, count: int) -> bytes:
    """The bits that our last checkpoint wrote for this very data file; none set if there is no such record."""
    nothing = bytes((count + 7) // 8)
    try:
        with open(record_path(path), "rb") as f:
            head, _, bits = f.read(_RECORD_LIMIT + len(nothing)).partition(b"\n")
        record = json.loads(head)
    except (OSError, ValueError, RecursionError):
        return nothing
    return bits if record == _record(identity, bits) and len(bits) == len(nothing) else nothing


def _record(identity: Identity, bits: bytes) -> dict[str, object]:
    return {"version": 1, "mode": "plain", "size": identity.size, "inode": identity.ino, "crc": zlib.crc32(bits)}


def load(path: Path, count: int, identity: Identity) -> bytearray:
    """The state of each chunk as the stored map tells it: EMPTY, READY, or VERIFY.

    A missing map is empty; one of wrong size, magic, version or with stray bits is set aside. Never raises for bad content.
    """
    state = bytearray(count)
    try:
        with open(path, "rb") as f:
            raw = f.read(HEADER_SIZE + (count + 7) // 8 + 1)
    except FileNotFoundError:
        return state
    if not raw:
        return state
    fault = _fault(raw, count)
    if fault is not None:
        _set_aside(path, fault)
        return state
    bits = raw[HEADER_SIZE:]
    if _HEADER.unpack_from(raw)[3] == _ALL_READY:
        # The reference believes this marker and does not look at the bits.
        bits = _pack(range(count), count)
    if any(bits):
        own = _own_bits(path, identity, count)
        claimed = b"".join(map(_BITS.__getitem__, bits))[:count]
        trusted = b"".join(map(_BITS.__getitem__, own))[:count]
        state[:] = bytes(map(_JUDGE.__getitem__, zip(claimed, trusted, strict=True)))
    return state


def drop_holes(fd: int, state: bytearray, ranges: Iterable[tuple[int, int]], size: int) -> int:
    """Clear each chunk whose range (offset, length) of the data file has a hole; gives how many were cleared.

    Costs one SEEK_HOLE a run of data, not one a chunk. A file system without holes reports none, and proves nothing.
    """
    dropped = 0
    data_start, data_end = 0, 0
    for chunk, (offset, length) in enumerate(ranges):
        if state[chunk] == EMPTY:
            continue
        end = offset + length
        if not data_start <= offset < data_end:
            try:
                data_start = os.lseek(fd, offset, os.SEEK_DATA)
                data_end = os.lseek(fd, data_start, os.SEEK_HOLE)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise CacheError(f"looking for holes: {e.strerror}", e.errno or 0) from e
                data_start = data_end = size
        if not (data_start <= offset and end <= data_end):
            state[chunk] = EMPTY
            dropped += 1
    return dropped


def _pack(ready: Iterable[int], count: int) -> bytes:
    bits = bytearray((count + 7) // 8)
    for chunk in ready:
        bits[chunk >> 3] |= 0x80 >> (chunk & 7)
    return bytes(bits)


def checkpoint(path: Path, data_fd: int, ready: list[int], count: int, identity: Identity) -> None:
    """Store that these chunks are in the data file. Bits that the file has gained from others since are kept.

    Raises CacheError. Killed at any instant, the map holds old bits, new bits, or some of the new bits: each of them true.
    """
    try:
        os.fdatasync(data_fd)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise CacheError(f"checkpoint of {path}: {e.strerror}", e.errno) from e
    try:
        _lock(fd)
        size = HEADER_SIZE + (count + 7) // 8
        old = os.pread(fd, size + 1, 0)
        own = bits = _pack(ready, count)
        if len(old) == size and _fault(old, count) is None:
            bits = bytes(a | b for a, b in zip(own, old[HEADER_SIZE:], strict=True))
        complete = _pack(range(count), count) == bits
        os.posix_fallocate(fd, 0, size)
        if len(old) > size:
            os.ftruncate(fd, size)
        _pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _MAGIC2, 0), 0)
        _pwrite(fd, bits, HEADER_SIZE)
        os.fdatasync(fd)
        if complete:
            _pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _MAGIC2, _ALL_READY), 0)
            os.fdatasync(fd)
        _write_record(path, json.dumps(_record(identity, own)).encode() + b"\n" + own)
    except OSError as e:
        raise CacheError(f"checkpoint of {path}: {e.strerror}", e.errno) from e
    finally:
        os.close(fd)


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _write_record(path: Path, record: bytes) -> None:
    target = record_path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            f.write(record)
            f.flush()
            os.fdatasync(f.fileno())
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise

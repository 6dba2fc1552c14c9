"""The stored chunk map, in the reference's format, and the record of identity beside it.

`<blob>.blob.data.chunk_map`: a 4096-byte header (u32 magic 0x424D4150, u32 version 1, u32 magic2 0x434D4150, u32 all-ready
marker 0 or 0x4D4D4150, zeros) and ceil(n/8) bytes of bits, most significant bit first. Its size is exact.

Only a checkpoint writes it (`checkpoint`), in this order: fdatasync of the data file, then the bits, then fdatasync of
the map, then the record. So a bit on disk implies its data on disk, whatever is killed or loses power when. Checkpoints
of several daemons in one cache folder take turns by a lock on the map, which ends with its holder. The file is never made
shorter, and a bit is cleared only to make room (`clear`), when nobody else uses the blob: a reference daemon may have the map
mapped. A map that claims what is not there is renamed and a new one begun.

The record `<blob>.blob.data.chunk_map.nydusd` (a line of JSON, then our own bits) says which data file and which layout of
chunks the map was written for, and which bits are ours. Those are believed; bits that another daemon has set are believed
only chunk by chunk, after the digest was checked (state VERIFY). In both cases a chunk with a hole in its range is not there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from nydusd import points
from nydusd.errors import CacheError
from nydusd.storage.state.segment import EMPTY, READY, VERIFY, Identity

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<IIII")
_MAGIC, _VERSION, _MAGIC2, _ALL_READY = 0x424D4150, 1, 0x434D4150, 0x4D4D4150
HEADER_SIZE = 4096

_F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi4x")
_LOCK_PATIENCE = 10.0
"""Seconds to wait for another daemon's checkpoint of the same map."""
_TRIES = 5
_BITS = [bytes(READY if byte >> (7 - bit) & 1 else EMPTY for bit in range(8)) for byte in range(256)]
_JUDGE = {(EMPTY, EMPTY): EMPTY, (EMPTY, READY): EMPTY, (READY, READY): READY, (READY, EMPTY): VERIFY}
_RECORD_LIMIT = 4096


class UnsyncedError(CacheError):
    """The data file could not be brought to its disk. Some of its bytes may be lost, and the kernel says so only once."""


def record_path(path: Path) -> Path:
    """Where the identity record of a map lies."""
    return path.with_name(path.name + ".nydusd")


def _temporary(path: Path) -> Path:
    """Where the next record of a map is written; a writer that was killed leaves it for the next one."""
    return path.with_name(path.name + ".nydusd.tmp")


def _aside(path: Path) -> Path:
    """What a map or data file is renamed to that must not be believed."""
    return path.with_name(path.name + ".bad")


def set_aside(path: Path, why: str) -> None:
    """Rename a map that must not be believed to `*.bad`."""
    bad = _aside(path)
    log.warning("chunk map %s: %s; renamed to %s, starting empty", path, why, bad.name)
    try:
        os.replace(path, bad)
    except OSError as e:
        log.warning("chunk map %s cannot be renamed: %s", path, e.strerror)


def forget_deleted(path: Path) -> bool:
    """Remove the record of a map that somebody has deleted; whether the map may be there still. Never raises.

    A garbage collector knows the names of the reference's files only. So what was set aside goes, too, with what it was of.
    """
    data = path.with_suffix("")
    left = [record_path(path), _temporary(path), _aside(path)]
    try:
        if path.exists():
            return True
        for file in left if data.exists() else (*left, _aside(data)):
            if file.exists():  # to remove what is not there waits for a disk that stands still, too
                file.unlink(missing_ok=True)
    except OSError as e:
        log.warning("what is left of %s cannot be removed: %s", path, e.strerror)
        return True
    return False


def forget_layout(path: Path) -> None:
    """Remove the record of a map, on disk when this returns: the data file is about to be written by another table of chunks.

    Raises OSError. What the map claims is believed from then on after its digest was checked only.
    """
    record_path(path).unlink(missing_ok=True)
    points.reach("map: record removed")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, count: int, identity: Identity) -> bytearray:
    """The state of each chunk as the stored map tells it: EMPTY, READY, or VERIFY.

    A missing map is empty, and so is one that cannot be read; one of wrong size, magic, version or with stray bits is
    set aside. Never raises for what it finds.
    """
    state = bytearray(count)
    try:
        raw = _read(path, HEADER_SIZE + (count + 7) // 8 + 1)
    except FileNotFoundError:
        return state
    except OSError as e:
        log.warning("chunk map %s cannot be read: %s; starting empty", path, e.strerror)
        return state
    fault = _fault(raw, count)
    if fault is not None:
        set_aside(path, fault)
        return state
    bits = raw[HEADER_SIZE:]
    if raw and _HEADER.unpack_from(raw)[3] == _ALL_READY:
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
        if state[chunk] == EMPTY or not length:
            continue
        end = offset + length
        if not data_start <= offset < data_end:
            try:
                data_start = os.lseek(fd, offset, os.SEEK_DATA)
                data_end = os.lseek(fd, data_start, os.SEEK_HOLE)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise CacheError(f"looking for holes: {e.strerror}", e.errno) from e
                data_start = data_end = size
        if not (data_start <= offset and end <= data_end):
            state[chunk] = EMPTY
            dropped += 1
    return dropped


def checkpoint(
    path: Path,
    data_fd: int,
    ready: list[int],
    count: int,
    identity: Identity,
    synced: Callable[[], None] = lambda: None,
) -> None:
    """Store that these chunks are in the data file. Bits that the file has gained from others since are kept.

    `synced` is called when the data is on its disk.

    Raises CacheError; UnsyncedError when the data itself is in doubt. Killed at any instant, the map holds old bits, new
    bits, or some of the new bits: each of them true.
    """
    try:
        os.fdatasync(data_fd)
    except OSError as e:
        raise UnsyncedError(f"data file of {path}: {e.strerror}", e.errno) from e
    points.reach("map: data synced")
    synced()
    own = _pack(ready, count)
    try:
        fd, raw = _open_locked(path, count)
        try:
            _store_bits(fd, raw, own, complete=own == _pack(range(count), count))
            _store_record(path, identity, own)
        except OSError:
            if not raw:
                path.unlink(missing_ok=True)  # half made: the reference would not mount with it
            raise
        finally:
            os.close(fd)
    except OSError as e:
        raise CacheError(f"checkpoint of {path}: {e.strerror}", e.errno) from e


def clear(path: Path, chunks: Iterable[int], count: int, identity: Identity) -> int:
    """Take chunks out of the stored map and of the record; on disk when this returns. Gives how many of ours are left.

    Only for a data file that nobody else uses, and before the chunks' bytes are given up. Raises CacheError. Killed at any
    instant, the map claims some of what it claimed before: all of it is still there.
    """
    gone = _pack(chunks, count)
    try:
        if not path.exists():
            if record_path(path).exists():  # somebody has deleted the map, and another may make one that claims these
                forget_layout(path)
            return 0
        fd, raw = _open_locked(path, count)
        try:
            own = bytes(a & ~b & 0xFF for a, b in zip(_own_bits(path, identity, count), gone, strict=True))
            if any(raw):
                every = _HEADER.unpack_from(raw)[3] == _ALL_READY
                bits = _pack(range(count), count) if every else raw[HEADER_SIZE:]
                _pwrite(fd, bytes(a & ~b & 0xFF for a, b in zip(bits, gone, strict=True)), HEADER_SIZE)
                points.reach("map: bits cleared")
                # The reference believes the marker and does not look at the bits.
                _pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _MAGIC2, 0), 0)
                points.reach("map: marker cleared")
                os.fdatasync(fd)
            _store_record(path, identity, own)
        finally:
            os.close(fd)
    except OSError as e:
        raise CacheError(f"chunk map {path}: {e.strerror}", e.errno) from e
    return sum(byte.bit_count() for byte in own)


def _read(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a regular file. Raises OSError, and does not wait for the writer of a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.pread(fd, limit, 0)
    finally:
        os.close(fd)


def _fault(raw: bytes, count: int) -> str | None:
    """What is wrong with a map file's bytes, or None. No bytes at all are a map that is about to be made."""
    size = HEADER_SIZE + (count + 7) // 8
    if not raw:
        return None
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


def recorded_layout(path: Path) -> str:
    """The layout of chunks for which our last checkpoint of this map was made (a hash, in hex); "" if that is not known."""
    try:
        head, _, bits = _read(record_path(path), _RECORD_LIMIT + (1 << 22)).partition(b"\n")
        record = json.loads(head)
        return str(record["layout"]) if record["crc"] == zlib.crc32(bits) else ""
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return ""


def _own_bits(path: Path, identity: Identity, count: int) -> bytes:
    """The bits that our last checkpoint wrote for this very data file; none set if there is no such record."""
    nothing = bytes((count + 7) // 8)
    try:
        head, _, bits = _read(record_path(path), _RECORD_LIMIT + len(nothing)).partition(b"\n")
        record = json.loads(head)
    except (OSError, ValueError, RecursionError):
        return nothing
    return bits if record == _record(identity, bits) and len(bits) == len(nothing) else nothing


def _record(identity: Identity, bits: bytes) -> dict[str, object]:
    return {
        "version": 1,
        "mode": "plain",
        "size": identity.size,
        "inode": identity.ino,
        "birth": identity.birth,
        "layout": identity.layout.hex(),
        "crc": zlib.crc32(bits),
    }


def _pack(ready: Iterable[int], count: int) -> bytes:
    bits = bytearray((count + 7) // 8)
    for chunk in ready:
        bits[chunk >> 3] |= 0x80 >> (chunk & 7)
    return bytes(bits)


def _open_locked(path: Path, count: int) -> tuple[int, bytes]:
    """The map file, made if it is not there, locked until it is closed, and its bytes: sound ones, or none.

    Raises OSError.
    """
    for _ in range(_TRIES):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            lock(fd)
            here = path.stat()
            if os.path.samestat(here, os.fstat(fd)):
                raw = os.pread(fd, HEADER_SIZE + (count + 7) // 8 + 1, 0)
                fault = _fault(raw, count)
                if fault is None:
                    return fd, raw
                set_aside(path, fault)
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.EBUSY, "others keep replacing it")


def lock(fd: int) -> None:
    """Wait for the lock of a map or data file; it ends with the fd, so also when its holder is killed. Raises OSError."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)  # F_OFD_SETLKW has no time-out, and whoever may open the file may hold its lock


def _store_bits(fd: int, raw: bytes, own: bytes, *, complete: bool) -> None:
    """Add our bits to a map whose bytes are `raw` (sound, or none). The header of a new one is there before its bits."""
    os.posix_fallocate(fd, 0, HEADER_SIZE + len(own))
    points.reach("map: allocated")
    marker = _HEADER.unpack_from(raw)[3] if raw else 0
    if not any(raw):
        _pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _MAGIC2, 0), 0)
        points.reach("map: header written")
    _pwrite(fd, bytes(a | b for a, b in zip(own, raw[HEADER_SIZE:] or bytes(len(own)), strict=True)), HEADER_SIZE)
    points.reach("map: bits written")
    os.fdatasync(fd)
    points.reach("map: bits synced")
    if complete and marker != _ALL_READY:
        _pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, _MAGIC2, _ALL_READY), 0)
        points.reach("map: marker written")
        os.fdatasync(fd)


def _store_record(path: Path, identity: Identity, own: bytes) -> None:
    target = record_path(path)
    temporary = _temporary(path)  # one writer at a time: the map is locked
    try:
        with open(temporary, "wb") as f:
            f.write(json.dumps(_record(identity, own)).encode() + b"\n" + own)
            f.flush()
            os.fdatasync(f.fileno())
        points.reach("map: record written")
        os.replace(temporary, target)
        points.reach("map: record named")
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done

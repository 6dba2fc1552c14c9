"""The jobs `survey` and `evict`: keep a cache folder within its quota. Run in a fetch worker, because they wait for disks.

`survey` looks how much is there. If that is too much, it removes files of blobs that no mount uses, least recently used first,
and names chunks of mounted blobs that could go. `evict` takes chunks out that the supervisor has claimed for that (the
order of steps is in `nydusd/storage/state/eviction.py`).

What holds after SIGKILL: files of a blob are removed map first, so the rest is never believed; both jobs may be done again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nydusd import points
from nydusd.errors import CacheError, NydusError, StaleCacheError
from nydusd.ipc.messages import Json
from nydusd.storage.state import map_file
from nydusd.storage.state.eviction import punch, used_by_others
from nydusd.storage.state.segment import READY, Segment
from nydusd.storage.state.temporary import is_still
from workers.blobs import OpenBlobs

log = logging.getLogger(__name__)

_DATA = ".blob.data"
_PARTS = (
    *(".blob.data.chunk_map", ".blob.data.chunk_map.nydusd", ".blob.data.chunk_map.nydusd.tmp", _DATA),
    *(".blob.meta", ".blob.meta.tmp"),
    *(".blob.data.chunk_map.bad", ".blob.data.bad"),
)
"""Files of a blob, in the order of their removal; two of them are left by writers that were killed, the last were set aside.

The bootstrap taken out of one stays: a mount may have it mapped."""
_MOST = 20_000
"""Chunks named by one survey."""
_IDLE = 600
"""Seconds after which a blob counts as unused as a whole: it goes before single chunks of busier ones."""


_BLOCK = 4096


class _File(NamedTuple):
    """A blob's data file: what it takes on disk, and when it was last used."""

    blob_id: str
    size: int
    used: float


class _Victim(NamedTuple):
    """A chunk that could go; in the order of going."""

    group: int
    touched: int
    handle: int
    chunk: int
    size: int


def survey(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: folder, limit, target (bytes), unused (remove all that is unused), mounted {blob id: [{handle, segment}, ...]}, now,
    keep (seconds), strays, pids.

    Answer: used (bytes, after what was removed), removed (blob ids), freed (bytes), victims {handle: chunks}.
    """
    folder = Path(job["folder"])
    files = _files(folder)
    used = sum(file.size for file in files)
    removed: list[str] = []
    freed = 0
    for file in sorted(files, key=lambda file: file.used):
        if file.blob_id in job["mounted"] or not (job["unused"] or used > job["limit"]):
            continue
        if _remove(folder, file.blob_id, job["strays"], job["pids"]):
            removed.append(file.blob_id)
            freed += file.size
            used -= file.size
    victims: dict[str, list[int]] = {}
    if used > job["limit"]:
        need = used - int(job["target"])
        for victim in sorted(_victims(job))[:_MOST]:
            victims.setdefault(str(victim.handle), []).append(victim.chunk)
            need -= victim.size
            if need <= 0:
                break
    return {"used": used, "removed": removed, "freed": freed, "victims": {k: sorted(v) for k, v in victims.items()}}


def _files(folder: Path) -> list[_File]:
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(_DATA) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        last = max(facts.st_atime, facts.st_mtime)
                        found.append(_File(entry.name.removesuffix(_DATA), facts.st_blocks * 512, last))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise CacheError(f"cache folder {folder}: {e.strerror}", e.errno) from e
    return found


def _remove(folder: Path, blob_id: str, strays: Mapping[str, int], pids: Collection[int]) -> bool:
    """Remove the files of a blob that no mount used when the job was ordered. False if somebody uses it now."""
    path = folder / f"{blob_id}{_DATA}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        map_file.lock(fd)
        if not is_still(path, fd):
            return False
        user = used_by_others(fd, pids, strays)
        if user:
            log.info("cache file %s stays: it is used by %s", path, user)
            return False
        for part in _PARTS:
            (folder / f"{blob_id}{part}").unlink(missing_ok=True)
            points.reach("evict: one file removed")
        log.info("cache files of blob %s were removed: no mount uses them", blob_id)
        return True
    except (OSError, CacheError) as e:
        log.warning("cache files of blob %s cannot be removed: %s", blob_id, e)
        return False
    finally:
        os.close(fd)


def _victims(job: Json) -> Iterator[_Victim]:
    """Chunks of mounted blobs that nobody has asked for in the last `keep` seconds."""
    newest, long_ago = int(job["now"]) - int(job["keep"]), int(job["now"]) - _IDLE
    for entries in job["mounted"].values():
        with contextlib.ExitStack() as opened:
            files: dict[tuple[int, int], list[tuple[int, Segment]]] = {}
            for entry in entries:
                try:
                    segment = Segment.open(entry["segment"])
                except NydusError as e:
                    log.warning("%s; nothing is taken out of its blob", e)
                    continue
                if segment is not None:
                    opened.callback(segment.close)
                    file = (segment.identity.dev, segment.identity.ino)
                    files.setdefault(file, []).append((entry["handle"], segment))
            for users in files.values():
                yield from _victims_of(users, newest, long_ago)


def _victims_of(users: Sequence[tuple[int, Segment]], newest: int, long_ago: int) -> Iterator[_Victim]:
    """Those of one data file: each once, and as old as for the one who has asked for it last."""
    touched = list(map(max, zip(*(segment.touched.tolist() for _, segment in users), strict=False)))
    group = 0 if max(touched, default=0) < long_ago else 1
    states = [(handle, bytes(segment.state), segment) for handle, segment in users]
    for chunk, last in enumerate(touched):
        if last <= newest:
            for handle, state, segment in states:
                if state[chunk] == READY:
                    yield _Victim(group, last, handle, chunk, segment.record(chunk).usize)
                    break


def _room_of(segment: Segment, chunk: int, alone: bool) -> tuple[int, int]:
    """Offset and length of what a chunk takes in the file: with the rest of its last block, unless another begins there.

    Where segments of other images speak of the file, too, they may know of one: then without.
    """
    record = segment.record(chunk)
    end = record.uoff + record.usize
    if alone:
        following = segment.record(chunk + 1).uoff if chunk + 1 < segment.count else segment.identity.size
        end = max(end, min(following, -(-end // _BLOCK) * _BLOCK))
    return record.uoff, end - record.uoff


def _can_give_back(fd: int, size: int) -> bool:
    """Whether its file system punches holes: one behind the end of the file changes nothing. Raises CacheError."""
    try:
        punch(fd, [(-(-size // _BLOCK) * _BLOCK, _BLOCK)])
    except CacheError as e:
        if e.cause_errno != errno.EOPNOTSUPP:
            raise
        return False
    return True


def evict(blobs: OpenBlobs, job: Json) -> Json:
    """Take job["chunks"] out of the cache file. Job: covered (in which segments they are claimed), strays, pids. Answer: stored
    (chunks in the map), evicted, bytes; or kept (who else uses the file, or what it is on), and nothing was done.
    """
    blob = blobs.get(job)
    path, segment = blob.spec.data_path, blob.segment
    assert path is not None
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        raise StaleCacheError(f"cache file {path}: {e.strerror}", e.errno) from e
    try:
        map_file.lock(fd)
        if not segment.is_current() or not segment.identity.is_of(fd):
            raise StaleCacheError(f"cache file {path} was replaced")
        user = used_by_others(fd, job["pids"], job["strays"], job["covered"])
        if user:
            return {"kept": user}
        if not _can_give_back(fd, segment.identity.size):
            return {"kept": "a file system without holes"}
        points.reach("evict: data file locked")
        stored = map_file.clear(blob.spec.map_path, job["chunks"], segment.count, segment.identity)
        points.reach("evict: map cleared")
        punch(fd, [_room_of(segment, chunk, len(job["covered"]) == 1) for chunk in job["chunks"]])
    except OSError as e:
        raise CacheError(f"cache file {path}: {e.strerror}", e.errno) from e
    finally:
        os.close(fd)
    size = sum(segment.record(chunk).usize for chunk in job["chunks"])
    return {"stored": stored, "evicted": len(job["chunks"]), "bytes": size}

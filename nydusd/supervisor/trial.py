"""The trial of new workers: each must do jobs whose results are known, before it is given any that a reader waits for.

Part of the supervisor, used by an upgrade. First a blob of our own: a fetch worker reads it, a decompress worker decodes and
verifies its chunk, both into shared memory, and the bytes are compared here with what they must be. Then, where a blob of an
image is open, the same chunk of it is brought by the old workers and by new ones. What the old ones cannot do either (the
backend is away) is no fault of the new ones.

All is written to an arena of the trial's own, so nothing that is wrong gets near a cache file or a reader.

What holds after SIGKILL of the supervisor: arenas, segment and folder stay under names of this daemon (`runtime.TRIAL`), by
which the next one removes them when it has ended the workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

from nydusd import points
from nydusd.errors import NydusError
from nydusd.formats.model import BlobFeature, BlobInfo, ChunkFlag, Cipher, Compressor, Digester
from nydusd.ipc.arena import PAGE, Arena
from nydusd.ipc.messages import Json
from nydusd.storage.api.factory import BlobFactory
from nydusd.storage.cache.blob_cache import BlobCache
from nydusd.storage.cache.requests import Job, Priority
from nydusd.storage.cache.spec import BlobSpec
from nydusd.storage.state.names import remove
from nydusd.storage.state.segment import EMPTY, RECORD, Identity, Segment
from nydusd.supervisor.children import Child
from nydusd.supervisor.pool import WorkerPool
from nydusd.supervisor.runtime import TRIAL, Runtime

Steps = Generator[None, None, None]
Result = Generator[None, None, Json]

_LOOK_AT = 64
"""Chunks of a blob among which the smallest is chosen."""
_BYTES_MOST = 8 << 20
"""Bytes of a chunk, stored and plain together, that the trial is worth."""
_DEADLINE = 20.0
"""Seconds that a backend may take for it, and that old workers may take in all: they have other things to do."""

_LINE = b"New workers must give this before they are trusted.\n"
PLAIN: Final = _LINE * 300
STORED: Final = bytes.fromhex(
    "28b52ffd60f03bd50100c4024e657720776f726b657273206d75737420676976"
    "652074686973206265666f72657920617275737465642e0a0300b9fc2ae62c4cf0b53c01"
)
"""The same by zstd."""
DIGEST: Final = bytes.fromhex("701f99d236fc1b27924c36df45b7797aea24ecd9d16d1ace5f65d8151906fd18")
"""Its BLAKE3."""


class TrialError(NydusError):
    """A new worker has not done what it had to."""


class _Side(NamedTuple):
    """Who does a job: `ask(role, message)` gives the answer; `base` is where its part of the arena begins."""

    ask: Callable[[str, Json], Result]
    base: int


class Trial:
    """`send(identity, message)` gives a worker a job; `answered` is to be called with what it reports.

    `let_go(cache)` is the end of our use of a blob of an image.
    """

    _numbers = count(1)

    def __init__(
        self,
        send: Callable[[bytes, Json], None],
        pools: Mapping[str, WorkerPool],
        factory: BlobFactory,
        runtime: Runtime,
        let_go: Callable[[BlobCache], None],
    ) -> None:
        self._send = send
        self._pools = pools
        self._factory = factory
        self._let_go = let_go
        self._folder = Path(runtime.folder) / TRIAL
        self._segment = f"{runtime.prefix}{TRIAL}"
        self._arena_name = f"{runtime.prefix}{runtime.term}.{TRIAL}"
        self._arenas: list[Arena] = []
        self._answers: dict[bytes, Json] = {}
        self.note = ""
        """What was tried beside the blob of our own, or why nothing was."""
        self.until = math.inf
        """How long old workers are waited for (`time.monotonic()`)."""

    def answered(self, identity: bytes, answer: Json) -> None:
        """A worker reports."""
        self._answers[identity] = answer

    def run(self, workers: Sequence[Child]) -> Steps:
        """Try them all. Raises TrialError, or NydusError or OSError when there is no room for it."""
        yield from self._own_blob(workers)
        points.reach("trial: own blob is good")
        chosen = self._choose()
        if chosen is None or all(worker.role != "decompress" for worker in workers):
            self.note = "no blob of an image is open that could be tried"
            return
        cache, chunks = chosen
        cache.users += 1  # its image may be unmounted meanwhile
        try:
            yield from self._blob_of_an_image(workers, cache, chunks)
        finally:  # also when this is closed in the middle
            self._let_go(cache)

    def close(self) -> None:
        """Give everything back. Workers that are still at it write where nobody looks."""
        for arena in self._arenas:
            arena.free(0, arena.size)
            arena.trim()  # workers keep it mapped
            arena.close()
            remove(arena.name)
        self._arenas.clear()
        remove(self._segment)
        for path in self._folder.glob("*"):
            path.unlink(missing_ok=True)
        if self._folder.exists():
            self._folder.rmdir()

    # --- a blob of our own ------------------------------------------------------------------------------------

    def _own_blob(self, workers: Sequence[Child]) -> Steps:
        spec = self._make_blob()
        points.reach("trial: blob made")
        arena = self._new_arena(len(workers) * _pages(len(PLAIN)))
        asked: dict[bytes, Json] = {}
        for number, worker in enumerate(workers):
            place = {"arena": arena.name, "offset": number * _pages(len(PLAIN))}
            message: Json = {"handle": spec.handle, "spec": spec.to_json(), "chunks": [0]}
            if worker.role == "fetch":
                message |= {"kind": "fetch", "slot": place | {"length": len(STORED)}} | _fetch_of(0)
            else:
                message |= {"kind": "fill", "slot": place | {"length": len(PLAIN)}, "verify": [], "source": None}
            asked[worker.identity] = message
        for identity, message in asked.items():
            self._send(identity, message | {"id": next(self._numbers)})
        while not asked.keys() <= self._answers.keys():
            yield
        for worker in workers:
            message, answer = asked[worker.identity], self._answers.pop(worker.identity)
            _check(worker.name, answer)
            expected = STORED if worker.role == "fetch" else PLAIN
            if arena.view(message["slot"]["offset"], len(expected)) != expected:
                raise TrialError(f"{worker.name} of the new generation gave wrong bytes in its trial")

    def _make_blob(self) -> BlobSpec:
        """A blob of one chunk in a local file, opened as `prepare` opens one."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        (self._folder / TRIAL).write_bytes(STORED)
        info = BlobInfo(
            index=0,
            blob_id=TRIAL,
            features=int(BlobFeature.ALIGNED),
            chunk_size=1 << 20,
            chunk_count=1,
            compressor=Compressor.ZSTD,
            digester=Digester.BLAKE3,
            cipher=Cipher.NONE,
            compressed_size=len(STORED),
            uncompressed_size=len(PLAIN),
            ci_compressor=Compressor.NONE,
            ci_offset=0,
            ci_compressed_size=0,
            ci_uncompressed_size=0,
            toc_size=0,
            toc_digest=b"",
            meta_digest=b"",
            meta_size=0,
            prefetch_offset=0,
            prefetch_size=0,
            cipher_key=b"",
            cipher_iv=b"",
            meta_blob_id=TRIAL,
        )
        flags = int(ChunkFlag.COMPRESSED | ChunkFlag.DIGEST)
        Segment.create(
            self._segment,
            generation=1,
            identity=Identity(0, 0, len(PLAIN)),
            records=RECORD.pack(0, 0, len(STORED), len(PLAIN), flags, 0, 0, 0),
            digests=DIGEST,
            contexts=b"",
            dict_offset=0,
            dict_size=0,
            state=bytes([EMPTY]),
        ).close()
        folder = str(self._folder)
        return BlobSpec(0, 1, info, self._segment, None, folder, "", None, False, "localfs", {"dir": folder}, False)

    # --- a blob of an image -----------------------------------------------------------------------------------

    def _choose(self) -> tuple[BlobCache, list[int]] | None:
        """A small chunk of a blob that can be read, with what is decoded with it.

        It has bytes that can be compared, and none of these chunks has failed of late: one that kills workers would go on.
        """
        for cache in self._factory.blobs():
            if cache.state != "ready" or cache.outage:
                continue
            looked_at: set[int] = set()
            for first in _smallest(cache):
                if first in looked_at:
                    continue
                chunks = cache.meta.with_units([first])
                looked_at.update(chunks)
                size = cache.meta.span(chunks)[1] + cache.meta.plain_bytes(chunks)
                if size <= _BYTES_MOST and not any(map(cache.failure, chunks)):
                    return cache, chunks
        return None

    def _blob_of_an_image(self, workers: Sequence[Child], cache: BlobCache, chunks: list[int]) -> Steps:
        spec = cache.spec
        place = f"chunk {chunks[0]} of blob {spec.info.blob_id}"
        _, stored = cache.meta.span(chunks)
        part = _pages(stored) + _pages(cache.meta.plain_bytes(chunks))
        arena = self._new_arena(2 * part)
        new = {worker.role: worker for worker in workers}

        def ask_old(role: str, message: Json) -> Result:
            told: list[Json] = []

            def done(job: Job, answer: Json) -> None:
                told.append({} if job.cancelled else answer)

            payload = {key: value for key, value in message.items() if key not in ("kind", "chunks")}
            job = Job(message["kind"], cache, Priority.USER, payload, done, chunks)
            self._pools[role].submit(job)
            try:
                while not told:
                    if time.monotonic() >= self.until:
                        raise TrialError(f"the old workers had no time for it within {_DEADLINE:g} s")
                    yield
            finally:
                self._pools[role].withdraw(job)
            return told[0] or {"error": "it was cancelled"}

        def ask_new(role: str, message: Json) -> Result:
            identity = new[role].identity
            told = {"handle": spec.handle, "spec": spec.to_json(secrets=role == "fetch"), "id": next(self._numbers)}
            self._send(identity, message | told)
            while identity not in self._answers:
                yield
            if cache.spec is not spec:
                raise TrialError("the blob was opened anew meanwhile")
            return self._answers.pop(identity)

        self.until = time.monotonic() + _DEADLINE
        try:
            expected = yield from self._bring(arena, cache, chunks, _Side(ask_old, 0))
        except NydusError as e:
            self.note = f"{place} was not tried: {e}"
            return
        finally:
            self.until = math.inf
        if cache.spec is not spec:
            self.note = f"{place} was not tried: the blob was opened anew meanwhile"
            return
        try:
            found = yield from self._bring(arena, cache, chunks, _Side(ask_new, part))
        except NydusError as e:
            if cache.spec is not spec:
                self.note = f"{place} was not tried: the blob was opened anew meanwhile"
                return
            raise TrialError(f"the new generation could not bring {place}: {e}") from e
        if found != expected:
            raise TrialError(f"the new generation gave other bytes for {place} than the old one")
        self.note = f"{place} is the same"

    def _bring(
        self, arena: Arena, cache: BlobCache, chunks: list[int], side: _Side
    ) -> Generator[None, None, dict[int, bytes]]:
        """The plain bytes of chunks, brought by the workers of one generation. Raises NydusError."""
        at, stored = cache.meta.span(chunks)
        source = None
        if cache.remote:
            source = {"arena": arena.name, "offset": side.base, "length": stored}
            answer = yield from side.ask("fetch", {"kind": "fetch", "chunks": chunks, "slot": source} | _fetch_of(at))
            _check("a fetch worker", answer)
            source |= {"coff": at, "final": True}
        offset, length = side.base + _pages(stored), cache.meta.plain_bytes(chunks)
        slot = {"arena": arena.name, "offset": offset, "length": length}
        message = {"kind": "fill", "chunks": chunks, "slot": slot, "verify": [], "source": source}
        answer = yield from side.ask("decompress", message)
        _check("a decompress worker", answer)
        placed = {chunk: (start, size) for chunk, start, size in answer["placed"]}
        for chunk in chunks:
            start, size = placed.get(chunk, (offset, -1))
            if size != cache.meta.record(chunk).usize or not offset <= start <= offset + length - size:
                raise TrialError(f"chunk {chunk} was placed wrongly: {size} bytes at {start}")
        return {chunk: bytes(arena.view(*placed[chunk])) for chunk in chunks}

    def _new_arena(self, size: int) -> Arena:
        """Shared memory of its own, backed in full. Raises CacheError."""
        # A worker keeps an arena by its name, and old ones have met those of earlier trials.
        arena = Arena.create(f"{self._arena_name}.{next(self._numbers)}.arena", size)
        self._arenas.append(arena)
        arena.allocate(arena.size)
        return arena


def _smallest(cache: BlobCache) -> list[int]:
    """The first chunks of a blob that have any bytes, the smallest first."""
    sizes = {chunk: cache.meta.record(chunk).usize for chunk in range(min(cache.chunk_map.count, _LOOK_AT))}
    return sorted(filter(sizes.__getitem__, sizes), key=sizes.__getitem__)


def _fetch_of(at: int) -> Json:
    """What a fetch job says beside where its bytes go."""
    return {"coff": at, "bypass": False, "prefetch": False, "until": time.monotonic() + _DEADLINE}


def _pages(size: int) -> int:
    return -(-max(size, 1) // PAGE) * PAGE


def _check(who: str, answer: Json) -> None:
    """Raises TrialError for an answer that is not that of a job well done."""
    failed = answer.get("failed") or answer.get("corrupt") or answer.get("unstored")
    if "error" in answer or failed:
        raise TrialError(f"{who} failed: {answer.get('error') or failed}")

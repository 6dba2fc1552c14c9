"""`python -m tests.support.readers`: many readers at once, each comparing every byte; a process of its own beside pytest.

`storm PATH TRUTH PROCESSES THREADS LENGTH`: all threads open the file, wait for each other, and read once, each at
another offset below LENGTH. `verify TREE TRUTH PROGRESS STOP PROCESSES SEED`: each process reads every file of TRUTH in
TREE, in pieces and in an order of its own, again and again until the file STOP exists, and keeps a row of numbers in the file
PROGRESS (`_WORDS`). A file is read in even pieces or, every second time, in such of any size at any place, over the ends of
chunks. Half of the processes read past the page cache; every fourth reads mapped memory, page by page, and dies by SIGBUS if
that fails; every fourth reads files from begin to end as most programs do, with the kernel's read-ahead.
Exit status 0 if every byte was right; else what was wrong on stderr.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Protocol

DIRECT = os.O_RDONLY | os.O_DIRECT
PIECE = 16 * 1024
"""Bytes of an even piece, and of an uneven one on the average."""
_PAGE = mmap.PAGESIZE
_MADV_PAGEOUT = 21
_SLOW = 250_000_000
_SLOW_MOST = 128
_HEAD = 4
_WORDS = _HEAD + 2 * _SLOW_MOST
"""Of a process, u64: pieces read, their bytes, the longest read (ns), when that began (ns of the epoch); then, of its last
reads of more than `_SLOW` ns, when each began and how long it took."""
_ROW = _WORDS * 8


def storm(path: str, truth: str, processes: int, threads: int, length: int) -> int:
    content = Path(truth).read_bytes()
    ready_out, ready_in = os.pipe()
    gate_out, gate_in = os.pipe()

    def process(number: int) -> int:
        os.close(gate_in)
        problems: list[str] = []

        def read_one(index: int) -> None:
            fd = os.open(path, DIRECT)
            os.write(ready_in, b".")
            os.read(gate_out, 1)
            offset = index * 37 * 512 % length
            try:
                have = os.pread(fd, 512, offset)
            except OSError as error:
                problems.append(f"{offset}: {error}")
            else:
                if have != content[offset : offset + 512]:
                    problems.append(f"{offset}: wrong bytes")
            finally:
                os.close(fd)

        running = [threading.Thread(target=read_one, args=(number * threads + index,)) for index in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        return report(problems)

    children = [fork(process, number) for number in range(processes)]
    waiting = 0
    while waiting < processes * threads:
        waiting += len(os.read(ready_out, 4096))
    os.close(gate_in)
    return wait_for(children)


def verify(tree: str, truth: str, progress: str, stop: str, processes: int, seed: int) -> int:
    files = {path.name: path.read_bytes() for path in Path(truth).iterdir()}
    with open(progress, "wb") as file:
        file.truncate(_ROW * processes)

    def process(number: int) -> int:
        order = random.Random(seed + number)
        how: type[File] = (Uncached, Buffered, Uncached, Mapped)[number % 4]
        opened = {name: how(os.path.join(tree, name)) for name in files}
        problems: list[str] = []
        slow = 0

        def check(name: str, offset: int, length: int) -> None:
            nonlocal slow
            opened[name].forget(offset, length)
            at, began = time.time_ns(), time.monotonic_ns()
            try:
                have = opened[name].read(offset, length)
            except OSError as error:
                problems.append(f"{name} at {offset}: {error}")
            else:
                if have != files[name][offset : offset + length]:
                    problems.append(f"{name} at {offset}: wrong bytes")
            took = time.monotonic_ns() - began
            counters[1] += length
            if took > counters[2]:
                counters[2], counters[3] = took, at
            if took > _SLOW:
                place = _HEAD + slow % _SLOW_MOST * 2
                counters[place], counters[place + 1] = at, took
                slow += 1

        with open(progress, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
            counters = memoryview(shared).cast("Q")[_WORDS * number : _WORDS * (number + 1)]
            rounds = 0
            while rounds == 0 or not os.path.exists(stop):
                for name, offset, length in cut(order, files, whole=how is Buffered):
                    check(name, offset, length)
                    counters[0] += 1
                    if rounds and counters[0] % 64 == 0 and os.path.exists(stop):
                        break
                rounds += 1
            counters.release()
        return report(problems)

    return wait_for([fork(process, number) for number in range(processes)])


def cut(order: random.Random, files: dict[str, bytes], *, whole: bool) -> list[tuple[str, int, int]]:
    """All bytes of all files in pieces (name, offset, length), in the order in which they are to be read.

    `whole`: the pieces of a file one after the other.
    """
    found = []
    for name, content in files.items():
        ends = list(range(PIECE, len(content), PIECE))
        if order.random() < 0.5:
            ends = sorted(order.sample(range(1, len(content)), len(ends)))
        found.append(
            [
                (name, start, end - start)
                for start, end in zip([0, *ends], [*ends, len(content)], strict=True)
                if end > start
            ]
        )
    order.shuffle(found)
    pieces = [piece for file in found for piece in file]
    if not whole:
        order.shuffle(pieces)
    return pieces


class File(Protocol):
    """A file as a process reads it."""

    def __init__(self, path: str) -> None: ...
    def forget(self, offset: int, length: int) -> None: ...
    def read(self, offset: int, length: int) -> bytes: ...


class Uncached:
    """A file that is read past the page cache; where it cannot be, what is in there is dropped before each read."""

    def __init__(self, path: str) -> None:
        try:
            self._fd, self._direct = os.open(path, DIRECT), True
        except OSError:
            self._fd, self._direct = os.open(path, os.O_RDONLY), False
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def forget(self, offset: int, length: int) -> None:
        if not self._direct:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, offset)
        except OSError as e:
            if e.errno != errno.EINVAL or not self._direct:
                raise
        # A file system on a device gives whole blocks only.
        start = offset - offset % _PAGE
        return os.pread(self._fd, -(-(offset + length - start) // _PAGE) * _PAGE, start)[offset - start :][:length]


class Buffered:
    """A file that is read by way of the page cache, which is emptied of it when it is read from its begin."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY)

    def forget(self, offset: int, length: int) -> None:
        if not offset:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)


class Mapped:
    """A file that is read through memory, of which nothing is in the page cache before."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._memory.madvise(mmap.MADV_RANDOM)

    def forget(self, offset: int, length: int) -> None:
        # Not posix_fadvise: it has work done on each processor, and waits for that, seconds where all are busy.
        start = offset - offset % _PAGE
        self._memory.madvise(_MADV_PAGEOUT, start, offset + length - start)

    def read(self, offset: int, length: int) -> bytes:
        return self._memory[offset : offset + length]


def pieces_read(progress: Path) -> int:
    """How many pieces the readers of a PROGRESS file have read so far."""
    return sum(pieces_of_each(progress))


def pieces_of_each(progress: Path) -> list[int]:
    """How many pieces each reader of a PROGRESS file has read so far."""
    return [row[0] for row in _rows(progress)]


def bytes_read(progress: Path) -> int:
    """How many bytes these were."""
    return sum(row[1] for row in _rows(progress))


def longest_read(progress: Path) -> float:
    """Seconds that the longest of all reads took."""
    return max((row[2] for row in _rows(progress)), default=0) / 1e9


def longest_reads(progress: Path) -> list[tuple[datetime, float]]:
    """Of each process its longest read and its last slow ones: when each began, and how many seconds it took."""
    found = []
    for row in _rows(progress):
        slow = zip(row[_HEAD::2], row[_HEAD + 1 :: 2], strict=True)
        found += [(row[3], row[2]), *((began, took) for began, took in slow if took)]
    return [(datetime.fromtimestamp(began / 1e9), took / 1e9) for began, took in found]


def _rows(progress: Path) -> list[tuple[int, ...]]:
    content = progress.read_bytes() if progress.exists() else b""
    return list(struct.iter_unpack(f"<{_WORDS}Q", content))


def report(problems: list[str]) -> int:
    for problem in problems[:5]:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def fork(run: Callable[[int], int], number: int) -> int:
    """Run `run(number)` in a child; its pid. The child ends with what `run` returns."""
    pid = os.fork()
    if pid:
        return pid
    status = 2
    try:
        status = run(number)
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(children: list[int]) -> int:
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    for status in statuses:
        if status < 0:
            print(f"a reader died by {signal.Signals(-status).name}", file=sys.stderr)
    return max(map(abs, statuses))


def main(arguments: list[str]) -> int:
    match arguments:
        case ["storm", path, truth, processes, threads, length]:
            return storm(path, truth, int(processes), int(threads), int(length))
        case ["verify", tree, truth, progress, stop, processes, seed]:
            return verify(tree, truth, progress, stop, int(processes), int(seed))
    raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

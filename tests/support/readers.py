"""`python -m tests.support.readers`: many readers at once, each comparing every byte; a process of its own beside pytest.

`storm PATH TRUTH PROCESSES THREADS LENGTH`: all threads open the file, wait for each other, and read once, each at
another offset below LENGTH. `verify TREE TRUTH PROGRESS STOP PROCESSES SEED`: each process reads every file of TRUTH in
TREE, in pieces and in an order of its own, again and again until the file STOP exists, and keeps two u64 in the file
PROGRESS: the pieces it has read, and its longest read in nanoseconds. All reads go past the page cache.
Exit status 0 if every byte was right; else what was wrong on stderr.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

DIRECT = os.O_RDONLY | os.O_DIRECT
PIECE = 16 * 1024


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
        file.truncate(16 * processes)

    def process(number: int) -> int:
        order = random.Random(seed + number)
        pieces = [(name, offset) for name, content in files.items() for offset in range(0, len(content), PIECE)]
        opened = {name: open_uncached(os.path.join(tree, name)) for name in files}
        problems: list[str] = []

        def check(name: str, offset: int) -> None:
            length = min(PIECE, len(files[name]) - offset)
            began = time.monotonic_ns()
            fd, direct = opened[name]
            if not direct:
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            try:
                have = os.pread(fd, length, offset)
            except OSError as error:
                problems.append(f"{name} at {offset}: {error}")
            else:
                if have != files[name][offset : offset + length]:
                    problems.append(f"{name} at {offset}: wrong bytes")
            counters[2 * number + 1] = max(counters[2 * number + 1], time.monotonic_ns() - began)

        with open(progress, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
            counters = memoryview(shared).cast("Q")
            rounds = 0
            while rounds == 0 or not os.path.exists(stop):
                order.shuffle(pieces)
                for name, offset in pieces:
                    check(name, offset)
                    counters[2 * number] += 1
                    if rounds and counters[2 * number] % 64 == 0 and os.path.exists(stop):
                        break
                rounds += 1
            counters.release()
        return report(problems)

    return wait_for([fork(process, number) for number in range(processes)])


def open_uncached(path: str) -> tuple[int, bool]:
    """A file opened to be read past the page cache; False where that cannot be, and what is in there is to be dropped."""
    try:
        return os.open(path, DIRECT), True
    except OSError:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd, False


def pieces_read(progress: Path) -> int:
    """How many pieces the readers of a PROGRESS file have read so far."""
    return sum(_counters(progress)[::2])


def longest_read(progress: Path) -> float:
    """Seconds that the longest of all reads took."""
    return max(_counters(progress)[1::2], default=0) / 1e9


def _counters(progress: Path) -> tuple[int, ...]:
    content = progress.read_bytes() if progress.exists() else b""
    return struct.unpack(f"<{len(content) // 8}Q", content)


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
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["storm", path, truth, processes, threads, length]:
            return storm(path, truth, int(processes), int(threads), int(length))
        case ["verify", tree, truth, progress, stop, processes, seed]:
            return verify(tree, truth, progress, stop, int(processes), int(seed))
    raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

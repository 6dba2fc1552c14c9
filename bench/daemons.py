"""`python -m bench.daemons [N]`: what each of N daemons on one node costs, one image each, as nydus-snapshotter starts them.

For the 1st, 2nd, … daemon: seconds from its start to the end of the first `ls`, and by how many MB of PSS all processes of
nydusd together have grown when its image has been read. Then what each of those after the 2nd costs when nothing has been
read for a while and workers rest, how long reads of what is not cached take then, and how many workers there are while all
daemons read at once.
With NYDUSD_NURSERY=off each of them loads all by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.image import Built, build, configuration
from bench.processes import family, pss, title
from nydusd.forkserver.process import take_in_orphans

_FILES = 200
_UNREAD = 20 << 20
"""Bytes of a file of which only the middle is read: nothing else brings that into the cache."""
_SETTLE = 1.5
"""Seconds after which processes that begin are done with it."""
_FIRST = 2
"""Daemons that start by themselves."""
_MISSES = 4
_unread = itertools.count()


def main(argv: list[str]) -> int:
    """Start the daemons in turn, print a line for each, and stop them."""
    count = int(argv[0]) if argv else 8
    # Whatever loses its parent stays below us, to be found and counted.
    take_in_orphans()
    with tempfile.TemporaryDirectory(prefix="nydusd-daemons-", dir="/dev/shm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        runtime = folder / "run"
        image = _image(folder)
        before = rested = 0.0
        print("daemon   to ls, s   PSS, MB   processes")
        for number in range(1, count + 1):
            seconds = _start(image, folder / str(number), runtime, stack)
            time.sleep(_SETTLE)
            now = _memory()
            print(f"{number:6}   {seconds:8.3f}   {now - before:7.1f}   {len(_pids()):9}", flush=True)
            before = now
            if number == _FIRST:
                rested = _rest()
        if count > _FIRST:
            each = (_rest() - rested) / (count - _FIRST)
            print(f"each after the {_FIRST}nd, workers at rest: {each:.1f} MB")
            times = [f"{_miss(folder / str(count) / 'mnt') * 1000:.1f}" for _ in range(_MISSES)]
            print(f"reads of what is not cached, the first one while workers rest, ms: {', '.join(times)}")
        places = [folder / str(number) / "mnt" for number in range(1, count + 1)]
        seconds, most = _all_at_once(places)
        print(f"all {count} reading {_UNREAD >> 20} MiB at once: {seconds:.2f} s, {most} workers at most on the node")
    return 0


def _pids() -> list[int]:
    return family(os.getpid())[1:]


def _memory() -> float:
    """PSS of all processes, MB."""
    return sum(map(pss, _pids())) * 1024 / 1e6


def _rest() -> float:
    """The same when all workers rest."""
    while _workers():
        time.sleep(0.5)
    return _memory()


def _workers() -> int:
    return sum(title(pid).startswith(("nydusd: fetch", "nydusd: decompress")) for pid in _pids())


def _all_at_once(mountpoints: list[Path]) -> tuple[float, int]:
    """Seconds until a file that nobody has read before was read through each, and how many workers there were at most."""
    begin = time.perf_counter()
    most = 0
    with ThreadPoolExecutor(len(mountpoints)) as threads:
        readers = [threads.submit((mountpoint / "together").read_bytes) for mountpoint in mountpoints]
        while not all(reader.done() for reader in readers):
            most = max(most, _workers())
            time.sleep(0.01)
        for reader in readers:
            reader.result()
    return time.perf_counter() - begin, most


def _miss(mountpoint: Path) -> float:
    """Seconds of a read that nobody has read before."""
    path = mountpoint / f"unread{next(_unread)}"
    begin = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        os.pread(file.fileno(), 4096, _UNREAD // 2)  # its beginning may have come with what lies before it
    return time.perf_counter() - begin


def _image(folder: Path) -> Built:
    tree = folder / "tree"
    tree.mkdir()
    for number in range(_FILES):
        (tree / f"{number:03}").write_bytes(os.urandom(5000))
    for name in ("together", *(f"unread{number}" for number in range(_MISSES))):
        (tree / name).write_bytes(os.urandom(_UNREAD))
    out = folder / "image"
    out.mkdir()
    return build(tree, out)


def _start(image: Built, work: Path, runtime: Path, stack: contextlib.ExitStack) -> float:
    """Start a daemon and read its whole image. Gives the seconds until the first listing."""
    mountpoint = work / "mnt"
    mountpoint.mkdir(parents=True)
    config = work / "config.json"
    config.write_text(configuration(image, work / "cache"))
    command = [str(Path(sys.executable).with_name("nydusd")), "fuse", "-B", str(image.bootstrap), "-C", str(config)]
    command += ["-M", str(mountpoint), "-A", str(work / "api.sock"), "--log-level", "info", "-L", str(work / "log")]
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"NYDUSD_RUNTIME_DIR": str(runtime)})
    stack.callback(process.wait)
    stack.callback(process.terminate)
    while not os.path.ismount(mountpoint):
        if process.poll() is not None:
            raise RuntimeError(f"nydusd ended with status {process.returncode}")
        time.sleep(0.001)
    os.listdir(mountpoint)
    seconds = time.perf_counter() - begin
    for path in mountpoint.glob("[0-9]*"):
        path.read_bytes()
    return seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

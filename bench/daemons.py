"""`python -m bench.daemons [N]`: what each of N daemons on one node costs, one image each, as nydus-snapshotter starts them.

For the 1st, 2nd, … daemon: seconds from its start to the end of the first `ls`, and by how many MB of PSS all processes of
nydusd together have grown when its image has been read. With NYDUSD_NURSERY=off each of them loads all by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.image import Built, build, configuration
from bench.processes import family, pss

_FILES = 200
_SET_CHILD_SUBREAPER = 36
_SETTLE = 1.5
"""Seconds after which processes that begin are done with it."""


def main(argv: list[str]) -> int:
    """Start the daemons in turn, print a line for each, and stop them."""
    count = int(argv[0]) if argv else 8
    # Whatever loses its parent stays below us, to be found and counted.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="nydusd-daemons-", dir="/dev/shm") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        runtime = folder / "run"
        image = _image(folder)
        before = 0.0
        print("daemon   to ls, s   PSS, MB   processes")
        for number in range(1, count + 1):
            seconds = _start(image, folder / str(number), runtime, stack)
            time.sleep(_SETTLE)
            pids = family(os.getpid())[1:]
            now = sum(map(pss, pids)) * 1024 / 1e6
            print(f"{number:6}   {seconds:8.3f}   {now - before:7.1f}   {len(pids):9}", flush=True)
            before = now
    return 0


def _image(folder: Path) -> Built:
    tree = folder / "tree"
    tree.mkdir()
    for number in range(_FILES):
        (tree / f"{number:03}").write_bytes(os.urandom(5000))
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
    command += ["-M", str(mountpoint), "-A", str(work / "api.sock"), "--log-level", "error"]
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
    for path in mountpoint.iterdir():
        path.read_bytes()
    return seconds


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

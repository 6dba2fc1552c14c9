"""Many images in one daemon: `python -m bench.mounts [--images N]`. Milliseconds of a mount through the API, and MB an image.

The image of `make bench` (14,700 entries), mounted N times beside each other, as that many images: each has its own metadata
in memory, as far as it is read, and all share one cache. With --use, after each mount its folders are listed to the third
level and one file is read. Needs root.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.image import Built, configuration
from bench.processes import family, memory
from bench.run import prepare


class _Api(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def mount(apisock: Path, place: str, bootstrap: Path, config: str) -> float:
    """Mount an image through the API; gives the seconds until the answer."""
    body = json.dumps({"fs_type": "rafs", "source": str(bootstrap), "config": config})
    api = _Api(apisock)
    begin = time.perf_counter()
    api.request("POST", f"/api/v1/mount?mountpoint={place}", body)
    answer = api.getresponse()
    text = answer.read()
    took = time.perf_counter() - begin
    api.close()
    if answer.status >= 300:
        raise RuntimeError(f"mount {place}: {answer.status} {text.decode(errors='replace')}")
    return took


def use(root: Path) -> None:
    """List an image's upper folders and read a file of it."""
    for first in os.scandir(root):
        if first.is_dir(follow_symlinks=False):
            for second in os.scandir(first):
                if second.is_dir(follow_symlinks=False):
                    os.listdir(second)
    (root / "etc/debian_version").read_bytes()


def measure(built: Built, images: int, used: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="nydusd-bench-", dir="/dev/shm") as name:
        work = Path(name)
        mountpoint, apisock = work / "mnt", work / "api.sock"
        mountpoint.mkdir()
        config = configuration(built, work / "cache")
        copies = [work / f"bootstrap-{number}" for number in range(images)]
        for copy in copies:
            shutil.copyfile(built.bootstrap, copy)
        process = subprocess.Popen(
            [sys.executable, "-m", "nydusd", "fuse", "-M", str(mountpoint), "-A", str(apisock), "--log-level", "error"],
            env=os.environ | {"NYDUSD_RUNTIME_DIR": str(work / "run")},
        )
        try:
            while not apisock.exists():
                time.sleep(0.01)
            times = [mount(apisock, "/0", copies[0], config)]
            use(mountpoint / "0")  # the first in any case
            time.sleep(1)
            before = memory(process.pid)
            for number in range(1, images):
                times.append(mount(apisock, f"/{number}", copies[number], config))
                if used:
                    use(mountpoint / str(number))
            time.sleep(1)
            each = (memory(process.pid) - before) / (images - 1)
            print(
                f"first mount {times[0] * 1e3:.1f} ms; others: median {statistics.median(times[1:]) * 1e3:.1f} ms, "
                f"longest {max(times[1:]) * 1e3:.1f} ms"
            )
            print(
                f"memory: {before:.1f} MB with one image in {len(family(process.pid))} processes, "
                f"{each:.2f} MB each further one"
            )
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--use", action="store_true")
    options = parser.parse_args()
    measure(prepare(), options.images, options.use)


if __name__ == "__main__":
    main()

"""The job `resolve`: which chunks hold the files of a prefetch list. Runs in a fetch worker: it walks the image.

Takes paths (the user's list) or inodes (the image's table); folders stand for all regular files below them.
"""

from __future__ import annotations

import logging
import mmap

from nydusd.errors import FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import Bootstrap
from nydusd.formats.walk import walk
from nydusd.ipc.messages import Json
from workers.blobs import OpenBlobs

log = logging.getLogger(__name__)

_FILES = 1_000_000
"""Files that one list may name, folders expanded."""


def resolve(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: bootstrap, path_id, extracted, paths (hex) or null for the image's table. Answer: runs [blob index, first, count]."""
    runs: list[list[int]] = []
    with open(job["bootstrap"], "rb") as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        view = memoryview(mapping)
        image = open_bootstrap(view, job["bootstrap"], job["path_id"], extracted=job["extracted"])
        if job["paths"] is None:
            inodes = image.prefetch_inodes()
        else:
            inodes = _find(image, [bytes.fromhex(path) for path in job["paths"]])
        whole = image.root_ino in inodes
        if not whole:
            seen: set[int] = set()
            for ino in inodes:
                for file in walk(image, ino, _FILES):
                    if file not in seen:
                        seen.add(file)
                        _add(image, file, runs)
        del image
        view.release()
    return {"whole": whole, "runs": runs}


def _find(image: Bootstrap, paths: list[bytes]) -> list[int]:
    found = []
    for path in paths:
        ino: int | None = image.root_ino
        for name in path.split(b"/"):
            if name and ino is not None:
                ino = image.lookup(ino, name)
        if ino is None:
            log.warning("prefetch list: %s is not in the image", path.decode(errors="backslashreplace"))
        else:
            found.append(ino)
    return found


def _add(image: Bootstrap, ino: int, runs: list[list[int]]) -> None:
    try:
        size = image.inode(ino).size
        extents = image.extents(ino, 0, size)
    except FormatError as e:
        log.warning("prefetch list: inode %d: %s", ino, e)
        return
    for extent in extents:
        if runs and runs[-1][0] == extent.blob and runs[-1][1] + runs[-1][2] == extent.chunk:
            runs[-1][2] += 1
        elif not (runs and runs[-1][0] == extent.blob and runs[-1][1] + runs[-1][2] - 1 == extent.chunk):
            runs.append([extent.blob, extent.chunk, 1])

"""The job `resolve`: which chunks hold the files of a prefetch list. Runs in a fetch worker: it walks the image.

Takes paths (the user's list) or inodes (the image's table); folders stand for all regular files below them.
"""

from __future__ import annotations

import logging
import time

from nydusd.errors import FormatError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import Bootstrap
from nydusd.formats.walk import walk
from nydusd.ipc.messages import Json
from workers.blobs import OpenBlobs, map_bootstrap

log = logging.getLogger(__name__)

_FILES = 1_000_000
"""Files that one entry of a list may stand for."""
_PATIENCE = 60.0
"""Seconds for a list: a hostile one names a million folders, each in the other."""
_RUNS = 1 << 16
"""Runs of an answer: the files of a hostile image may share chunks in an order that makes one of each, again and again."""


def resolve(_blobs: OpenBlobs, job: Json) -> Json:
    """Job: bootstrap, path_id, extracted, paths (hex) or null for the image's table.

    Answer: runs [blob index, first, count]; or `whole`: everything is wanted.
    """
    runs: list[list[int]] = []
    where, paths = job["bootstrap"], job["paths"]
    image = open_bootstrap(map_bootstrap(where), where, job["path_id"], extracted=job["extracted"])
    inodes = image.prefetch_inodes() if paths is None else _find(image, [bytes.fromhex(path) for path in paths])
    whole = image.root_ino in inodes
    deadline = time.monotonic() + _PATIENCE
    seen: set[int] = set()
    for ino in () if whole else dict.fromkeys(inodes):
        late, full = time.monotonic() > deadline, False
        try:
            for file in () if late else walk(image, ino, _FILES):
                if late := time.monotonic() > deadline:
                    break
                if file not in seen:
                    seen.add(file)
                    if full := not _add(image, file, runs):
                        break
        except FormatError as e:
            log.warning("prefetch list: inode %d: %s", ino, str(e))
        if late or full:
            why = "it takes too long" if late else f"it has more than {_RUNS} runs of chunks"
            log.warning("prefetch list: cut off after %d files: %s", len(seen), why)
            break
    return {"whole": whole, "runs": runs}


def _find(image: Bootstrap, paths: list[bytes]) -> list[int]:
    found = []
    for path in paths:
        ino: int | None = image.root_ino
        try:
            for name in path.split(b"/"):
                if name and ino is not None:
                    ino = image.lookup(ino, name)
        except FormatError as e:  # a file where the path has a folder, or a broken folder
            log.warning("prefetch list: %s", str(e))
            ino = None
        if ino is None:
            log.warning("prefetch list: %s is not in the image", path.decode(errors="backslashreplace"))
        else:
            found.append(ino)
    return found


def _add(image: Bootstrap, ino: int, runs: list[list[int]]) -> bool:
    """Add the chunks of a file. False if there are more runs than may be: the rest is left out."""
    try:
        size = image.inode(ino).size
        extents = image.extents(ino, 0, size)
    except FormatError as e:
        log.warning("prefetch list: inode %d: %s", ino, str(e))
        return True
    for extent in extents:
        if runs and runs[-1][0] == extent.blob and runs[-1][1] + runs[-1][2] == extent.chunk:
            runs[-1][2] += 1
        elif not (runs and runs[-1][0] == extent.blob and runs[-1][1] + runs[-1][2] - 1 == extent.chunk):
            if len(runs) >= _RUNS:
                return False
            runs.append([extent.blob, extent.chunk, 1])
    return True

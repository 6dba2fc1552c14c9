"""`nydusctl trace [--prefetch-list|--prefetch-ranges] [-m PATH]`: which files and chunks were read, in the order of
their first reads.

Noted since the mount: a file's first read and the first read of each of its chunks, as far as the daemon was asked and the page
cache did not answer. With --prefetch-list only the files, one path a line: what `nydusd --prefetch-files` reads,
and image builders take as their list of files to place first. With --prefetch-ranges the files and which bytes of them, as
JSON, which `nydus-image optimize` takes, too. The trace of an image ends at 65,536 records.

The daemon says where the trace and the image's metadata lie (GET /api/v1/nydusd/trace); they are read here.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Iterable, Iterator

from nydusd.cli.ctl.connection import Api
from nydusd.cli.ctl.image import add_mountpoint
from nydusd.cli.ctl.text import list_at, one_line, printable, table, text_at
from nydusd.cli.ctl.verb import Verb
from nydusd.cli.exit_status import writing
from nydusd.errors import NydusError
from nydusd.formats import open_bootstrap
from nydusd.formats.model import Bootstrap
from nydusd.formats.walk import paths_of
from nydusd.ipc.trace import MISSED, FirstRead, read_trace

HEAD = ("TIME", "BLOB", "CHUNKS", "MISS", "FILE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_mountpoint(parser)
    lists = parser.add_mutually_exclusive_group()
    lists.add_argument("--prefetch-list", action="store_true", help="only the paths of the files, one a line")
    lists.add_argument(
        "--prefetch-ranges",
        action="store_true",
        help="the files and what was read of each, as JSON for nydus-image optimize",
    )


def run(api: Api, args: argparse.Namespace) -> Iterator[str]:
    query = {} if args.mountpoint is None else {"mountpoint": args.mountpoint}
    images = list_at(api.get("/api/v1/nydusd/trace", query), "images")
    if len(images) != 1:
        places = ", ".join(text_at(image, "mountpoint") for image in images)
        where = "" if args.mountpoint is None else f" at {args.mountpoint}; `nydusctl info` lists them"
        raise NydusError(f"--mountpoint: name one of {places}" if images else f"no image is mounted{where}")
    image = images[0]
    try:
        reads = first_reads(read_trace(text_at(image, "trace")))
    except FileNotFoundError:
        reads = []
    except OSError as error:
        raise NydusError(f"trace {text_at(image, 'trace')}: {error.strerror}") from error
    bootstrap = _bootstrap(image) if reads else None
    names = paths_of(bootstrap, {read.ino for read in reads}) if bootstrap is not None else {}
    if args.prefetch_ranges:
        files = [] if bootstrap is None else list(_ranges(bootstrap, reads, names))
        yield one_line({"version": "v1", "files": files})
        return
    if args.prefetch_list:
        yield from _list(dict.fromkeys(read.ino for read in reads), names)
        return
    blobs = [str(blob) for blob in list_at(image, "blobs")]
    rows = [(read, blobs[read.blob] if read.blob < len(blobs) else "", names.get(read.ino)) for read in reads]
    if args.raw:
        yield one_line([_json(*row) for row in rows])
    elif not rows:
        yield "no reads were noted since the mount"
    else:
        yield table(HEAD, [_row(*row) for row in rows])


def first_reads(records: Iterable[FirstRead]) -> list[FirstRead]:
    """The records in which something was read for the first time, by any front end."""
    seen: set[tuple[int, int, int]] = set()
    found = []
    for read in records:
        if read.chunks > 1 << 20:
            continue  # no front end writes such a one
        new = {(read.ino, read.blob, chunk) for chunk in range(read.chunk, read.chunk + read.chunks)} - seen
        if new:
            seen |= new
            found.append(read)
    return found


def _bootstrap(image: object) -> Bootstrap:
    assert isinstance(image, dict)
    path = text_at(image, "bootstrap")
    try:
        with open(path, "rb") as f:
            view = memoryview(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ))
    except (OSError, ValueError) as error:
        raise NydusError(f"bootstrap {path}: {getattr(error, 'strerror', None) or error}") from error
    return open_bootstrap(view, path, image.get("path_id"), extracted=bool(image.get("extracted")))


def _ranges(bootstrap: Bootstrap, reads: Iterable[FirstRead], names: dict[int, bytes]) -> Iterator[dict[str, object]]:
    """Each file once, in the order of first reads, and the parts [offset, length] of it that the chunks that were read hold."""
    chunks: dict[int, set[tuple[int, int]]] = {}
    for read in reads:
        known = chunks.setdefault(read.ino, set())
        known |= {(read.blob, chunk) for chunk in range(read.chunk, read.chunk + read.chunks)}
    for ino, wanted in chunks.items():
        name = names.get(ino)
        if name is None:
            continue
        found: list[list[int]] = []
        offset = 0
        for extent in bootstrap.extents(ino, 0, bootstrap.inode(ino).size):
            if (extent.blob, extent.chunk) in wanted:
                if found and sum(found[-1]) == offset:
                    found[-1][1] += extent.length
                else:
                    found.append([offset, extent.length])
            offset += extent.length
        yield {"path": os.fsdecode(name), "ranges": found}


def _list(inodes: Iterable[int], names: dict[int, bytes]) -> Iterator[str]:
    """Paths that a list can hold: a line end, or a blank at an end, has no place in it."""
    for ino in inodes:
        name = names.get(ino)
        if name is None:
            continue
        if b"\n" in name or name != name.strip():
            print(f"left out, a list cannot hold it: {_shown(name)}", file=sys.stderr)
        else:
            with writing():
                sys.stdout.buffer.write(name + b"\n")  # as its bytes: a list is not text
    yield from ()


def _shown(name: bytes | None) -> str:
    return "?" if name is None else printable(os.fsdecode(name).encode(errors="backslashreplace").decode())


def _json(read: FirstRead, blob: str, name: bytes | None) -> dict[str, object]:
    return {
        "time": read.when / 1e9,
        "ino": read.ino,
        "path": None if name is None else _shown(name),
        "blob_id": blob,
        "chunk": read.chunk,
        "chunks": read.chunks,
        "missed": bool(read.flags & MISSED),
    }


def _row(read: FirstRead, blob: str, name: bytes | None) -> list[str]:
    seconds, nanos = divmod(read.when, 1_000_000_000)
    last = read.chunk + read.chunks - 1
    return [
        f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{nanos // 1000:06}",
        blob[:12],
        f"{read.chunk}" if read.chunks == 1 else f"{read.chunk}-{last}",
        "miss" if read.flags & MISSED else "hit",
        _shown(name),
    ]


VERB = Verb(("trace",), "which files and chunks were read, in order", run, add_arguments)
